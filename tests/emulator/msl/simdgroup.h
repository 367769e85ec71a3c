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
constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return static_cast<mem_flags>(static_cast<unsigned>(a) | static_cast<unsigned>(b));
}

#define AT_LINE int line = __builtin_LINE()

METAL_FUNC void threadgroup_barrier(mem_flags flags, AT_LINE) {
  emulator_barrier(static_cast<unsigned>(flags), line);
}
METAL_FUNC void simdgroup_barrier(mem_flags flags, AT_LINE) {
  emulator_simdgroup_barrier(static_cast<unsigned>(flags), line);
}

// The emulator's own bookkeeping needs no checks; leaving them out saves most of its time.
#define UNCHECKED __attribute__((no_sanitize("thread"), noinline))

// What the lanes of the simdgroup bring to a line.
template <class T>
class Lanes {
 public:
  UNCHECKED Lanes(T mine, int line) : line_(line) {
    present_ = emulator_exchange(&mine, sizeof(T), values_, line);
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
METAL_FUNC Lanes<T> meet(T mine, int line) {
  static_assert(sizeof(element_t<T>) == 4, "simd functions take 32-bit scalars and vectors here");
  return Lanes<T>(mine, line);
}

template <class T>
METAL_FUNC T simd_sum(T value, AT_LINE) {
  return meet(value, line).reduce([](T a, T b) { return a + b; });
}
template <class T>
METAL_FUNC T simd_max(T value, AT_LINE) {
  return meet(value, line).reduce([](T a, T b) { return max(a, b); });
}
template <class T>
METAL_FUNC T simd_min(T value, AT_LINE) {
  return meet(value, line).reduce([](T a, T b) { return min(a, b); });
}
template <class T>
METAL_FUNC T simd_or(T value, AT_LINE) {
  return meet(value, line).reduce([](T a, T b) { return a | b; });
}
METAL_FUNC bool simd_any(bool value, AT_LINE) { return simd_or(uint(value), line) != 0; }
METAL_FUNC bool simd_all(bool value, AT_LINE) { return !simd_any(!value, line); }

template <class T>
METAL_FUNC T simd_prefix_inclusive_sum(T value, AT_LINE) {
  const Lanes<T> lanes = meet(value, line);
  T sum = lanes.from(0);
  for (uint i = 1; i <= emulator_lane(); ++i) sum += lanes.from(i);
  return sum;
}

template <class T>
METAL_FUNC T simd_shuffle(T value, ushort lane, AT_LINE) {
  return meet(value, line).from(lane);
}
template <class T>
METAL_FUNC T simd_broadcast(T value, ushort lane, AT_LINE) {
  return meet(value, line).from(lane);
}
template <class T>
METAL_FUNC T simd_shuffle_xor(T value, ushort mask, AT_LINE) {
  return meet(value, line).from(emulator_lane() ^ mask);
}
// Lanes whose source would lie outside the simdgroup keep `filling`.
template <class T>
METAL_FUNC T simd_shuffle_and_fill_down(T value, T filling, ushort delta, AT_LINE) {
  const Lanes<T> lanes = meet(value, line);
  const uint source = emulator_lane() + delta;
  return source < emulator::kSimdWidth ? lanes.from(source) : filling;
}
template <class T>
METAL_FUNC T simd_shuffle_and_fill_up(T value, T filling, ushort delta, AT_LINE) {
  const Lanes<T> lanes = meet(value, line);
  return emulator_lane() >= delta ? lanes.from(emulator_lane() - delta) : filling;
}
template <class T>
METAL_FUNC T simd_shuffle_down(T value, ushort delta, AT_LINE) {
  return simd_shuffle_and_fill_down(value, value, delta, line);
}
template <class T>
METAL_FUNC T simd_shuffle_up(T value, ushort delta, AT_LINE) {
  return simd_shuffle_and_fill_up(value, value, delta, line);
}

}  // namespace metal
