// 8 x 8 matrices spread over a simdgroup, two neighbouring elements of a row in each lane. Apple
// does not document which; this is the placement that MLX's own kernels rely on.
#pragma once

#include "simdgroup.h"

namespace metal {

template <class T, int Columns, int Rows>
class simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "simdgroup matrices are 8 x 8");

 public:
  simdgroup_matrix() = default;
  METAL_FUNC explicit simdgroup_matrix(T diagonal) {
    const uint row = row_of(emulator_lane()), column = column_of(emulator_lane());
    elements_ = vec<T, 2>(row == column ? diagonal : T(0), row == column + 1 ? diagonal : T(0));
  }

  METAL_FUNC vec<T, 2>& thread_elements() { return elements_; }
  METAL_FUNC const vec<T, 2>& thread_elements() const { return elements_; }

  static METAL_FUNC uint row_of(uint lane) { return (lane / 4 & 4) + lane / 2 % 4; }
  static METAL_FUNC uint column_of(uint lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }
  static METAL_FUNC uint lane_of(uint row, uint column) {
    return (row & 4) * 4 + (column & 4) * 2 + row % 4 * 2 + column / 2 % 2;
  }

 private:
  vec<T, 2> elements_;
};

using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;

template <class T, int Columns, int Rows = Columns>
METAL_FUNC simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Columns, Rows> result;
  result.thread_elements() = vec<T, 2>(value);
  return result;
}

// Where element `i` of this lane lies in memory.
METAL_FUNC ulong matrix_offset(uint i, ulong elements_per_row, ulong2 origin, bool transpose) {
  const uint row = simdgroup_float8x8::row_of(emulator_lane());
  const uint column = simdgroup_float8x8::column_of(emulator_lane()) + i;
  return transpose ? (origin.y + column) * elements_per_row + origin.x + row
                   : (origin.y + row) * elements_per_row + origin.x + column;
}

template <class T>
METAL_FUNC void simdgroup_load(simdgroup_matrix<T, 8, 8>& matrix, const T* source,
                               ulong elements_per_row = 8, ulong2 origin = 0,
                               bool transpose = false, AT_LINE) {
  meet(0, line);
  for (uint i = 0; i < 2; ++i) {
    matrix.thread_elements()[i] =
        source[matrix_offset(i, elements_per_row, origin, transpose)];
  }
}

template <class T>
METAL_FUNC void simdgroup_store(const simdgroup_matrix<T, 8, 8>& matrix, T* destination,
                                ulong elements_per_row = 8, ulong2 origin = 0,
                                bool transpose = false, AT_LINE) {
  meet(0, line);
  for (uint i = 0; i < 2; ++i) {
    destination[matrix_offset(i, elements_per_row, origin, transpose)] =
        matrix.thread_elements()[i];
  }
}

// result = left * right + addend, summed in float.
template <class R, class A, class B, class C>
UNCHECKED void multiply_accumulate(simdgroup_matrix<R, 8, 8>& result,
                                   const simdgroup_matrix<A, 8, 8>& left,
                                   const simdgroup_matrix<B, 8, 8>& right,
                                   const simdgroup_matrix<C, 8, 8>& addend, int line) {
  using Matrix = simdgroup_float8x8;
  const auto &l = left.thread_elements(), &r = right.thread_elements();
  const auto lanes = meet(float4(float(l[0]), float(l[1]), float(r[0]), float(r[1])), line);
  const uint row = Matrix::row_of(emulator_lane()), column = Matrix::column_of(emulator_lane());
  for (uint i = 0; i < 2; ++i) {
    float sum = float(addend.thread_elements()[i]);
    for (uint k = 0; k < 8; ++k) {
      sum += lanes.from(Matrix::lane_of(row, k))[k % 2] *
             lanes.from(Matrix::lane_of(k, column))[2 + i];
    }
    result.thread_elements()[i] = R(sum);
  }
}

template <class R, class A, class B, class C>
METAL_FUNC void simdgroup_multiply_accumulate(simdgroup_matrix<R, 8, 8>& result,
                                              const simdgroup_matrix<A, 8, 8>& left,
                                              const simdgroup_matrix<B, 8, 8>& right,
                                              const simdgroup_matrix<C, 8, 8>& addend, AT_LINE) {
  multiply_accumulate(result, left, right, addend, line);
}
template <class R, class A, class B>
METAL_FUNC void simdgroup_multiply(simdgroup_matrix<R, 8, 8>& result,
                                   const simdgroup_matrix<A, 8, 8>& left,
                                   const simdgroup_matrix<B, 8, 8>& right, AT_LINE) {
  multiply_accumulate(result, left, right, make_filled_simdgroup_matrix<float, 8, 8>(0.0f), line);
}

}  // namespace metal
