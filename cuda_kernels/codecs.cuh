// The codecs of the configuration's keys and values, in the form that the kernels take them.
#pragma once

#include "launch.cuh"

// Written by cuda_header of rotormlx/kernels/source.py: namespaces with LANES, HELD, tables and rotations.
#include "key_rotation.h"
#include "value_rotation.h"

namespace {

constexpr int CODEC_THREADS = 256;

struct KeyCodec {
  enum { IS_KEY = 1, BITS = KEY_BITS, D = KEY_DIM, LANES = key_rotation::LANES, HELD = key_rotation::HELD };
  enum { NEIGHBOURS = key_rotation::NEIGHBOURS, CELL_COUNT = key_rotation::CELL_COUNT };
  enum { CELLS_OF_UNIT = key_rotation::CELLS_OF_UNIT };
  static DEVICE_FN const float* boundaries() { return key_rotation::BOUNDARIES; }
  static DEVICE_FN const uint2* cells() { return key_rotation::CELLS; }
  template <int ROWS>
  static DEVICE_FN void rotate(float* rows, const float* coefficients, uint lane) {
    key_rotation::rotate_rows<LANES, ROWS>(rows, coefficients, lane);
  }
  template <int NEAR_LANES, int ROWS>
  static DEVICE_FN void rotate_near(float* rows, const float* coefficients, uint lane) {
    key_rotation::rotate_near<NEAR_LANES, ROWS>(rows, coefficients, lane);
  }
  template <int ROWS>
  static DEVICE_FN void rotate_far(float* rows, const float* coefficients, uint lane) {
    key_rotation::rotate_far<LANES, ROWS>(rows, coefficients, lane);
  }
  template <int ROWS>
  static DEVICE_FN void unrotate(float* rows, const float* coefficients, uint lane) {
    key_rotation::unrotate_rows<LANES, ROWS>(rows, coefficients, lane);
  }
};

struct ValueCodec {
  enum { IS_KEY = 0, BITS = VALUE_BITS, D = VALUE_DIM, LANES = value_rotation::LANES, HELD = value_rotation::HELD };
  enum { NEIGHBOURS = value_rotation::NEIGHBOURS, CELL_COUNT = value_rotation::CELL_COUNT };
  enum { CELLS_OF_UNIT = value_rotation::CELLS_OF_UNIT };
  static DEVICE_FN const float* boundaries() { return value_rotation::BOUNDARIES; }
  static DEVICE_FN const uint2* cells() { return value_rotation::CELLS; }
  template <int ROWS>
  static DEVICE_FN void rotate(float* rows, const float* coefficients, uint lane) {
    value_rotation::rotate_rows<LANES, ROWS>(rows, coefficients, lane);
  }
  template <int NEAR_LANES, int ROWS>
  static DEVICE_FN void rotate_near(float* rows, const float* coefficients, uint lane) {
    value_rotation::rotate_near<NEAR_LANES, ROWS>(rows, coefficients, lane);
  }
  template <int ROWS>
  static DEVICE_FN void rotate_far(float* rows, const float* coefficients, uint lane) {
    value_rotation::rotate_far<LANES, ROWS>(rows, coefficients, lane);
  }
  template <int ROWS>
  static DEVICE_FN void unrotate(float* rows, const float* coefficients, uint lane) {
    value_rotation::unrotate_rows<LANES, ROWS>(rows, coefficients, lane);
  }
};

}  // namespace
