// CUDA C++ for g++: what stands in front of the text of kernels and of the functions that launch them.
#pragma once
#pragma GCC system_header

#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../msl/types.h"

#define ROTORMLX_EMULATED 1

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __grid_constant__
#define __launch_bounds__(...)

// The emulator's own bookkeeping needs no checks and may be fast.
#define UNCHECKED __attribute__((no_sanitize("thread"), noinline, optimize("O2")))
#define AT_LINE int line = __builtin_LINE()

// ---- types

using __half = half;
using __nv_bfloat16 = bfloat;
struct __half2 {
  half x, y;
};

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline float __half2float(half x) { return static_cast<float>(x); }
inline half __float2half_rn(float x) { return static_cast<half>(x); }
inline float __bfloat162float(bfloat x) { return static_cast<float>(x); }
inline bfloat __float2bfloat16_rn(float x) { return bfloat(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {static_cast<half>(x), static_cast<half>(y)}; }
inline half __ushort_as_half(ushort bits) { return as_type<half>(bits); }
inline float __uint_as_float(uint bits) { return as_type<float>(bits); }
inline uint __float_as_uint(float x) { return as_type<uint>(x); }

#define FOR_TYPES(FUNCTION) FUNCTION(int) FUNCTION(uint) FUNCTION(long) FUNCTION(size_t) FUNCTION(float)
#define SMALLER_AND_LARGER(T)                    \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
FOR_TYPES(SMALLER_AND_LARGER)
#undef SMALLER_AND_LARGER
#undef FOR_TYPES

// ---- where a thread is

namespace emulator {
UNCHECKED inline Index3 thread_index() { return emulator_context()->position_in_threadgroup; }
UNCHECKED inline Index3 block_index() { return emulator_context()->threadgroup_position; }
UNCHECKED inline Index3 block_size() { return emulator_context()->threadgroup_size; }
UNCHECKED inline Index3 block_count() { return emulator_context()->threadgroup_count; }
}  // namespace emulator
#define threadIdx emulator::thread_index()
#define blockIdx emulator::block_index()
#define blockDim emulator::block_size()
#define gridDim emulator::block_count()

// ---- what threads do together; all must meet at the same line

inline void __syncthreads(AT_LINE) {
  emulator_barrier(emulator::kDeviceMemory | emulator::kThreadgroupMemory, line);
}
inline void __syncwarp(AT_LINE) {
  emulator_simdgroup_barrier(emulator::kDeviceMemory | emulator::kThreadgroupMemory, line);
}

// What lets thread blocks read from each other: counters that they add to, and fences.
__forceinline__ int atomicAdd(int* counter, int addend) { return emulator_add(counter, addend); }
__forceinline__ void __threadfence() { emulator_fence(); }

template <class T>
UNCHECKED T __shfl_sync(unsigned, T mine, uint32_t lane, AT_LINE) {
  T values[emulator::kSimdWidth];
  const uint32_t present = emulator_exchange(&mine, sizeof(T), values, line);
  if (lane >= emulator::kSimdWidth || !(present >> lane & 1)) {
    emulator_fail("absent lane", "a value is taken from a lane that does not exist", line);
  }
  return values[lane];
}
template <class T>
T __shfl_xor_sync(unsigned lanes, T mine, int mask, AT_LINE) {
  return __shfl_sync(lanes, mine, emulator_lane() ^ mask, line);
}

UNCHECKED inline int __any_sync(unsigned, int mine, AT_LINE) {
  int values[emulator::kSimdWidth];
  const uint32_t present = emulator_exchange(&mine, sizeof(mine), values, line);
  int any = 0;
  for (uint32_t lane = 0; lane < emulator::kSimdWidth; ++lane) any |= present >> lane & 1 && values[lane];
  return any;
}

// ---- what stands in vocabulary.cuh for a GPU

UNCHECKED inline uint chosen_bytes(uint low, uint high, uint selector, AT_LINE) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint chosen = 0;
  for (int i = 0; i < 4; ++i) {
    const uint nibble = selector >> (4 * i) & 15;
    // The instruction would copy the sign of that byte to all its bits, which nobody here wants.
    if (nibble > 7) emulator_fail("arithmetic", "a selector of bytes is above 7", line);
    chosen |= uint(bytes >> (8 * nibble) & 0xff) << (8 * i);
  }
  return chosen;
}

inline uint joined(uint mask, uint one, uint other) { return (one & mask) | (other & ~mask); }
inline float power_of_two(float x) { return exp2f(x); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float log_of_size(float x) { return log2f(fabsf(x)); }
inline void keep_in_register(uint&) {}
// Checked as a read: a GPU lets a wrong address pass, but its line is not the one that was meant.
inline void prefetch(const void* global) { (void)*static_cast<const volatile char*>(global); }
inline float __fdividef(float x, float y) { return x / y; }

// mma.m16n8k16 of float16 with float32 sums. Which lane has what is the table "Matrix Fragments for mma.m16n8k16" of
// the PTX documentation, written here as the row and column of each element.
UNCHECKED inline void multiply_add(float* sums, const uint* a, const uint* b, AT_LINE) {
  struct Operands {
    float a[8], b[4];
  };
  half numbers[12];
  std::memcpy(static_cast<void*>(numbers), a, 8 * sizeof(half));
  std::memcpy(static_cast<void*>(numbers + 8), b, 4 * sizeof(half));
  Operands mine, all[emulator::kSimdWidth];
  // To float before all have them: g++ has no instruction for it.
  for (int i = 0; i < 8; ++i) mine.a[i] = static_cast<float>(numbers[i]);
  for (int i = 0; i < 4; ++i) mine.b[i] = static_cast<float>(numbers[8 + i]);
  if (emulator_exchange(&mine, sizeof(mine), all, line) != ~uint32_t{0}) {
    emulator_fail("absent lane", "a matrix product needs all lanes of a warp", line);
  }
  float left[16][16], right[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = (i >= 0 && i < 2) || (i >= 4 && i < 6) ? group : group + 8;
      const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
      left[row][column] = all[lane].a[i];
    }
    for (int i = 0; i < 4; ++i) {
      right[in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)][group] = all[lane].b[i];
    }
  }
  const int lane = emulator_lane();
  for (int i = 0; i < 4; ++i) {
    const int row = (lane >> 2) + (i < 2 ? 0 : 8), column = lane % 4 * 2 + (i & 1);
    for (int k = 0; k < 16; ++k) sums[i] += left[row][k] * right[k][column];
  }
}

// Asynchronous copies: nothing arrives before the thread waits for it, and what was there is gone at once.
class Copies {
 public:
  template <int BYTES>
  void start(void* shared, const void* global, AT_LINE) {
    static_assert(BYTES == 8 || BYTES == 16, "copies are of 8 or 16 bytes");
    if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % BYTES) {
      emulator_fail("alignment", "a copy of 8 or 16 bytes must lie on a multiple of that", line);
    }
    if (count_ == kMost) emulator_fail("arithmetic", "too many copies are under way", line);
    for (int i = 0; i < count_; ++i) {
      if (under_way_[i].shared == shared) emulator_fail("race", "two copies to one place are under way", line);
    }
    for (int i = 0; i < BYTES / 8; ++i) static_cast<uint64_t*>(shared)[i] = ~uint64_t{0};
    under_way_[count_++] = {shared, global, BYTES, groups_};
  }
  void commit() { ++groups_; }
  template <int LATER>
  void wait() {
    int left = 0;
    for (int i = 0; i < count_; ++i) {
      const Copy& copy = under_way_[i];
      if (copy.group >= groups_ - LATER) {
        under_way_[left++] = copy;
        continue;
      }
      for (int j = 0; j < copy.bytes / 8; ++j) {
        static_cast<uint64_t*>(copy.shared)[j] = static_cast<const uint64_t*>(copy.global)[j];
      }
    }
    count_ = left;
  }

 private:
  static constexpr int kMost = 512;
  struct Copy {
    void* shared;
    const void* global;
    int bytes, group;
  };
  Copy under_way_[kMost];
  int count_ = 0, groups_ = 0;
};

// ---- shared memory

// How much a launch has asked for.
size_t emulator_dynamic_shared_bytes();

// What `__shared__ T name[n];` is rewritten to, after a type `name_type`.
#define EMULATOR_SHARED_VARIABLE(name)                                                      \
  static emulator::SharedVariable name##_variable{#name, 0, nullptr};                       \
  auto& name = *static_cast<name##_type*>(                                                  \
      emulator_shared_variable(&name##_variable, sizeof(name##_type), alignof(name##_type), \
                               sizeof(std::remove_all_extents_t<name##_type>)))

// What `extern __shared__ T name[];` is rewritten to. Cells of two bytes, as the smallest type in it.
#define EMULATOR_DYNAMIC_SHARED(T, name)                                   \
  static emulator::SharedVariable name##_variable{#name, 0, nullptr};      \
  T* name = static_cast<T*>(emulator_shared_variable(                      \
      &name##_variable, emulator_dynamic_shared_bytes(), alignof(T), 2))
