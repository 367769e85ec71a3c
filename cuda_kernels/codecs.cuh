// The codecs of keys and values of the configuration, as the kernels that encode and decode take them.
#pragma once

#include "launch.cuh"

// Made by kernel_source.cuda_header(): namespaces with LANES, HELD, BOUNDARIES, rotate_rows and unrotate_rows.
#include "key_rotation.h"
#include "value_rotation.h"

namespace {

constexpr int CODEC_THREADS = 256;

struct KeyCodec {
  enum { IS_KEY = 1, BITS = KEY_BITS, D = KEY_DIM, LANES = key_rotation::LANES, HELD = key_rotation::HELD };
  static DEVICE_FN const float* boundaries() { return key_rotation::BOUNDARIES; }
  template <int ROWS>
  static DEVICE_FN void rotate(float* rows, const float* coefficients, uint lane) {
    key_rotation::rotate_rows<LANES, ROWS>(rows, coefficients, lane);
  }
  template <int ROWS>
  static DEVICE_FN void unrotate(float* rows, const float* coefficients, uint lane) {
    key_rotation::unrotate_rows<LANES, ROWS>(rows, coefficients, lane);
  }
};

struct ValueCodec {
  enum { IS_KEY = 0, BITS = VALUE_BITS, D = VALUE_DIM, LANES = value_rotation::LANES, HELD = value_rotation::HELD };
  static DEVICE_FN const float* boundaries() { return value_rotation::BOUNDARIES; }
  template <int ROWS>
  static DEVICE_FN void rotate(float* rows, const float* coefficients, uint lane) {
    value_rotation::rotate_rows<LANES, ROWS>(rows, coefficients, lane);
  }
  template <int ROWS>
  static DEVICE_FN void unrotate(float* rows, const float* coefficients, uint lane) {
    value_rotation::unrotate_rows<LANES, ROWS>(rows, coefficients, lane);
  }
};

}  // namespace
