// Declarations of Metal's types and functions for clang's "C++ for OpenCL", which shares with Metal
// what a C++ compiler cannot check: address spaces, and the parts of C++ that GPUs lack. Nothing
// here is ever run.
#pragma once

#pragma OPENCL EXTENSION cl_khr_fp16 : enable

#define device __global
#define threadgroup __local
#define constant __constant
#define thread __private
#define kernel

// Keywords of OpenCL, but not of Metal.
#define global global_
#define local local_
#define generic generic_

#define METAL_FUNC inline

using size_t = __SIZE_TYPE__;
using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;
using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long;
using uint8_t = uchar;
using uint16_t = ushort;
using uint32_t = uint;
using uint64_t = ulong;
using bfloat = __bf16;
using float16_t = half;
using bfloat16_t = bfloat;

namespace metal {

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

using uint2 = vec<uint, 2>;
using uint3 = vec<uint, 3>;
using uint4 = vec<uint, 4>;
using ulong2 = vec<ulong, 2>;
using float2 = vec<float, 2>;
using float4 = vec<float, 4>;

// ---- math.h's functions, for the same types
float exp(float);
float sqrt(float);
float fabs(float);
float fma(float, float, float);
#define OF_INTEGERS(T) T max(T, T); T min(T, T);
OF_INTEGERS(char)
OF_INTEGERS(uchar)
OF_INTEGERS(short)
OF_INTEGERS(ushort)
OF_INTEGERS(int)
OF_INTEGERS(uint)
OF_INTEGERS(long)
OF_INTEGERS(ulong)
#define OF_FLOATS(T) T max(T, T); T min(T, T); T clamp(T, T, T);
OF_FLOATS(float)
OF_FLOATS(half)
OF_FLOATS(bfloat)
namespace fast {
float exp(float);
}

// ---- simdgroup.h
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

template <class T> T simd_sum(T);
template <class T> T simd_max(T);
template <class T> T simd_shuffle_xor(T, ushort);
template <class T> T quad_shuffle(T, ushort);
bool simd_any(bool);

// ---- simdgroup_matrix.h
template <class T, int Columns, int Rows>
struct simdgroup_matrix {};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;

template <class T, int Columns, int Rows>
simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T);

#define MATRIX_MEMORY(space)                                                             \
  void simdgroup_load(thread simdgroup_float8x8&, const space float*, ulong, ulong2 = 0, \
                      bool = false);                                                     \
  void simdgroup_store(simdgroup_float8x8, space float*, ulong);
MATRIX_MEMORY(device)
MATRIX_MEMORY(threadgroup)

void simdgroup_multiply_accumulate(thread simdgroup_float8x8&, thread simdgroup_float8x8&,
                                   thread simdgroup_float8x8&, thread simdgroup_float8x8&);
void simdgroup_multiply(thread simdgroup_float8x8&, thread simdgroup_float8x8&,
                        thread simdgroup_float8x8&);

// OpenCL writes (float4)(x, y, z, w) where Metal writes float4(x, y, z, w).
template <class V, class... Parts>
constexpr V make_vector(Parts... parts) {
  return V{(decltype(V{}.x))parts...};
}

}  // namespace metal

template <class To, class From>
To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of equal size");
  return __builtin_astype(from, To);
}

// What a variable `threadgroup T name[n];` is rewritten to: clang takes __local variables only in
// kernels of OpenCL's own kind, which cannot be templates.
template <class T>
threadgroup T* shared_variable();
#define LINT_SHARED_VARIABLE(name) threadgroup name##_type& name = *shared_variable<name##_type>()

using namespace metal;

// From MLX's utils.h, which precedes every kernel.
template <class T>
struct Limits {
  static constexpr constant T max = T(1), min = T(1), finite_max = T(1), finite_min = T(1);
};

#define ulong2(...) make_vector<ulong2>(__VA_ARGS__)
#define float2(...) make_vector<float2>(__VA_ARGS__)
#define float4(...) make_vector<float4>(__VA_ARGS__)
