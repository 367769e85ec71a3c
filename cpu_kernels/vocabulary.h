// The words in which shared_kernels/levels.h is written, for the CPU.
#pragma once

#include <cstdint>

#define DEVICE_FN static constexpr
#define THREADGROUP
#define CONSTANT static constexpr

namespace {

using uint = std::uint32_t;

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

}  // namespace
