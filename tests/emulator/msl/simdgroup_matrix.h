// 8 x 8 matrices of floats spread over a simdgroup, two neighbouring elements of a row in each lane.
// Apple does not document which; this is the placement that MLX's own kernels rely on.
#pragma once

#include "simdgroup.h"

namespace emulator {

// Where the first element of a lane lies, and which lane has an element.
METAL_FUNC uint matrix_row(uint lane) { return (lane / 4 & 4) + lane / 2 % 4; }
METAL_FUNC uint matrix_column(uint lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }
METAL_FUNC uint matrix_lane(uint row, uint column) {
  return (row & 4) * 4 + (column & 4) * 2 + row % 4 * 2 + column / 2 % 2;
}

}  // namespace emulator

namespace metal {

template <class T, int Columns, int Rows>
struct simdgroup_matrix;

template <>
struct simdgroup_matrix<float, 8, 8> {
  float elements[2];
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;

template <class T, int Columns, int Rows>
METAL_FUNC simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
  return {value, value};
}

METAL_FUNC void simdgroup_load(simdgroup_float8x8& matrix, const float* source,
                               ulong elements_per_row, ulong2 origin = {0, 0},
                               bool transpose = false, AT_LINE) {
  meet(0, line);
  const uint row = emulator::matrix_row(emulator_lane());
  for (uint i = 0; i < 2; ++i) {
    const uint column = emulator::matrix_column(emulator_lane()) + i;
    matrix.elements[i] =
        transpose ? source[(origin.y + column) * elements_per_row + origin.x + row]
                  : source[(origin.y + row) * elements_per_row + origin.x + column];
  }
}

METAL_FUNC void simdgroup_store(const simdgroup_float8x8& matrix, float* destination,
                                ulong elements_per_row, AT_LINE) {
  meet(0, line);
  const uint row = emulator::matrix_row(emulator_lane());
  const uint column = emulator::matrix_column(emulator_lane());
  for (uint i = 0; i < 2; ++i) {
    destination[row * elements_per_row + column + i] = matrix.elements[i];
  }
}

// result = left * right + addend
UNCHECKED inline void simdgroup_multiply_accumulate(simdgroup_float8x8& result,
                                                    const simdgroup_float8x8& left,
                                                    const simdgroup_float8x8& right,
                                                    const simdgroup_float8x8& addend, AT_LINE) {
  struct Operands {
    simdgroup_float8x8 left, right;
  };
  const Lanes<Operands> lanes({left, right}, line);
  const uint row = emulator::matrix_row(emulator_lane());
  const uint column = emulator::matrix_column(emulator_lane());
  for (uint i = 0; i < 2; ++i) {
    float sum = addend.elements[i];
    for (uint k = 0; k < 8; ++k) {
      sum += lanes.from(emulator::matrix_lane(row, k)).left.elements[k % 2] *
             lanes.from(emulator::matrix_lane(k, column)).right.elements[i];
    }
    result.elements[i] = sum;
  }
}

METAL_FUNC void simdgroup_multiply(simdgroup_float8x8& result, const simdgroup_float8x8& left,
                                   const simdgroup_float8x8& right, AT_LINE) {
  simdgroup_multiply_accumulate(result, left, right, {0.0f, 0.0f}, line);
}

}  // namespace metal
