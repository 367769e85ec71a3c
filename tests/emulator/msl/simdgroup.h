// Barriers, and what the lanes of a simdgroup do together. Each function remembers the line it was
// called from: all lanes must meet at the same one.
#pragma once

#include "math.h"

namespace metal {

enum class mem_flags : unsigned {
  mem_none = emulator::kNoMemory,
  mem_device = emulator::kDeviceMemory,
  mem_threadgroup = emulator::kThreadgroupMemory,
};
#define AT_LINE int line = __builtin_LINE()

METAL_FUNC void threadgroup_barrier(mem_flags flags, AT_LINE) {
  emulator_barrier(static_cast<unsigned>(flags), line);
}
METAL_FUNC void simdgroup_barrier(mem_flags flags, AT_LINE) {
  emulator_simdgroup_barrier(static_cast<unsigned>(flags), line);
}

// The emulator's own bookkeeping needs no checks and may be fast.
#define UNCHECKED __attribute__((no_sanitize("thread"), noinline, optimize("O2")))

// What the lanes of the simdgroup, or of a quad, bring to a line.
template <class T>
class Lanes {
 public:
  UNCHECKED Lanes(T mine, int line, bool of_quad = false) : line_(line) {
    const auto exchange = of_quad ? emulator_exchange_in_quad : emulator_exchange;
    present_ = exchange(&mine, sizeof(T), values_, line);
  }

  UNCHECKED T from(uint lane) const {
    if (lane >= emulator::kSimdWidth || !(present_ >> lane & 1)) {
      emulator_fail("absent lane", "a value is taken from a lane that does not exist", line_);
    }
    return values_[lane];
  }

  // Pairwise, since the order on a GPU is not specified but is hardly sequential.
  template <class F>
  UNCHECKED T reduce(F f) const {
    T result[emulator::kSimdWidth];
    int count = 0;
    for (int i = 0; i < emulator::kSimdWidth; ++i) {
      if (present_ >> i & 1) result[count++] = values_[i];
    }
    for (int step = 1; step < count; step *= 2) {
      for (int i = 0; i + step < count; i += 2 * step) result[i] = f(result[i], result[i + step]);
    }
    return result[0];
  }

 private:
  T values_[emulator::kSimdWidth];
  uint32_t present_;
  int line_;
};

template <class T>
METAL_FUNC Lanes<T> meet(T mine, int line, bool of_quad = false) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) == 4, "simd functions take 32 bits here");
  return Lanes<T>(mine, line, of_quad);
}

template <class T>
METAL_FUNC T simd_sum(T value, AT_LINE) {
  return meet(value, line).reduce([](T a, T b) { return a + b; });
}
template <class T>
METAL_FUNC T simd_max(T value, AT_LINE) {
  return meet(value, line).reduce([](T a, T b) { return max(a, b); });
}
METAL_FUNC bool simd_any(bool value, AT_LINE) { return simd_max(uint(value), line) != 0; }

template <class T>
METAL_FUNC T simd_shuffle_xor(T value, ushort mask, AT_LINE) {
  return meet(value, line).from(emulator_lane() ^ mask);
}

template <class T>
METAL_FUNC T quad_shuffle(T value, ushort quad_lane, AT_LINE) {
  return meet(value, line, true).from(quad_lane);
}

// What else MLX's utils.h calls, in functions that no kernel here calls: declared only.
template <class T>
T simd_shuffle(T, ushort);
template <class T>
T simd_shuffle_down(T, ushort);
template <class T>
T simd_shuffle_up(T, ushort);
template <class T>
T simd_shuffle_and_fill_up(T, T, ushort);
template <class T>
T simd_prefix_inclusive_sum(T);

}  // namespace metal
