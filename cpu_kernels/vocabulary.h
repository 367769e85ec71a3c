// The macros and functions that shared_kernels/{levels,trellis}.h use, for the CPU.
#pragma once

#include <cstdint>

#define DEVICE_FN static constexpr
#define THREAD
#define THREADGROUP
#define CONSTANT static constexpr
#ifdef __clang__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

using uint = std::uint32_t;
using uchar = std::uint8_t;

inline float float_of_bits(std::uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

inline std::uint32_t bits_of_float(float x) {
  std::uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

#include "levels.h"
#include "trellis.h"

}  // namespace
