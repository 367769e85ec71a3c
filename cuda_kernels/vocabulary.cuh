// The macros and functions that shared_kernels/ uses, for CUDA, and the few instructions without a name in CUDA C++.
// The emulator of the tests replaces what is assembly here with its own functions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;

#define DEVICE_FN __device__ __forceinline__

// CUDA needs no words for address spaces.
#define THREAD
#define THREADGROUP
#define GLOBAL

// Written before a table at program scope. Not __constant__, because lanes read different entries of it.
#define CONSTANT static __device__ constexpr

DEVICE_FN float float_of_bits(uint bits) { return __uint_as_float(bits); }
DEVICE_FN uint bits_of_float(float x) { return __float_as_uint(x); }
DEVICE_FN __half half_of_bits(ushort bits) { return __ushort_as_half(bits); }

// The x of the lane whose number differs in the bits of `mask`. All lanes of a warp must call it together.
DEVICE_FN float shuffle_xor(float x, ushort mask) { return __shfl_xor_sync(~0u, x, mask); }
DEVICE_FN uint shuffle_xor(uint x, ushort mask) { return __shfl_xor_sync(~0u, x, mask); }

// The x of the first lane of the warp. If all lanes have the same x, this tells the compiler so.
DEVICE_FN int of_first_lane(int x) { return __shfl_sync(~0u, x, 0); }

// Whether x is true in any lane of a warp. All lanes must call it together.
DEVICE_FN bool any_lane(bool x) { return __any_sync(~0u, x); }

// A barrier for all threads of a thread block, after which they see each other's writes to shared memory.
#define MEET() __syncthreads()

// A barrier for the lanes of a warp, after which they see each other's writes to shared memory.
#define MEET_LANES() __syncwarp()

// Written before a loop whose arrays must stay in registers.
#define UNROLL _Pragma("unroll")

// Two floats as float16, the first in the low half.
DEVICE_FN uint half_pair(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  uint bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}

// Arrays of a call may hold any of three dtypes.
DEVICE_FN float to_float(float x) { return x; }
DEVICE_FN float to_float(__half x) { return __half2float(x); }
DEVICE_FN float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T>
DEVICE_FN T from_float(float x);
template <>
DEVICE_FN float from_float<float>(float x) { return x; }
template <>
DEVICE_FN __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
DEVICE_FN __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }

#ifndef ROTORMLX_EMULATED

// Templates compare unsigned numbers with bounds that may be zero, which this warning reports.
#pragma nv_diag_suppress 186

// The bytes of (low, high), 0 to 7, that the nibbles of `selector` name; their highest bits must be 0.
DEVICE_FN uint chosen_bytes(uint low, uint high, uint selector) {
  uint bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selector));
  return bytes;
}

// Bits of `one` where `mask` is set, else of `other`, in one instruction; the compiler makes two of the expression.
DEVICE_FN uint joined(uint mask, uint one, uint other) {
  uint bits;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(bits) : "r"(mask), "r"(one), "r"(other));
  return bits;
}

// 2^x, within 2 units in the last place.
DEVICE_FN float power_of_two(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// The logarithm of |x| to base 2, within 2^-21.
DEVICE_FN float log_of_size(float x) {
  float power;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(fabsf(x)));
  return power;
}

// Prefetch the memory at `global` into the L2 cache.
DEVICE_FN void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// Hide from the compiler how x was computed, so that it keeps x in a register and does not recompute it.
DEVICE_FN void keep_in_register(uint& x) { asm volatile("" : "+r"(x)); }

// sums += a b on the tensor cores: [16, 16] times [16, 8] in float16, summed in float32. With g = lane / 4 and
// t = lane % 4, a lane has of a: rows g and g + 8 (registers 0 and 1) of columns 2 t and 2 t + 1, and the same rows
// (2 and 3) of columns 2 t + 8 and 2 t + 9; of b: rows 2 t, 2 t + 1 (0) and 2 t + 8, 2 t + 9 (1) of column g; of the
// sums: columns 2 t and 2 t + 1 of row g (0 and 1) and of row g + 8 (2 and 3).
DEVICE_FN void multiply_add(float* sums, const uint* a, const uint* b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Copies from global to shared memory that a thread starts now and waits for later.
struct Copies {
  template <int BYTES>
  DEVICE_FN void start(void* shared, const void* global) {
    const uint address = static_cast<uint>(__cvta_generic_to_shared(shared));
    if (BYTES == 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
    } else {
      asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(address), "l"(global) : "memory");
    }
  }
  // End a group of copies.
  DEVICE_FN void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
  // Wait for all groups but the latest `LATER`. This covers only the thread's own copies.
  template <int LATER>
  DEVICE_FN void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
  }
};

#endif
