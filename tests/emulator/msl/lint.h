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
#define __METAL__ 1
#define __METAL_VERSION__ 310

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

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define M_PI_F 3.14159265f
#define M_LOG2E_F 1.44269504f
#define M_LN2_F 0.69314718f

namespace metal {

template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));

#define VECTOR_TYPES(T)  \
  using T##2 = vec<T, 2>; \
  using T##3 = vec<T, 3>; \
  using T##4 = vec<T, 4>;
VECTOR_TYPES(char)
VECTOR_TYPES(uchar)
VECTOR_TYPES(short)
VECTOR_TYPES(ushort)
VECTOR_TYPES(int)
VECTOR_TYPES(uint)
VECTOR_TYPES(long)
VECTOR_TYPES(ulong)
VECTOR_TYPES(half)
VECTOR_TYPES(float)
#undef VECTOR_TYPES

template <class T, T Value>
struct integral_constant {
  static constexpr constant T value = Value;
};
template <class T, class U>
struct is_same : integral_constant<bool, false> {};
template <class T>
struct is_same<T, T> : integral_constant<bool, true> {};
template <class T, class U>
constexpr constant bool is_same_v = is_same<T, U>::value;
template <bool Condition, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  using type = T;
};
template <bool Condition, class T = void>
using enable_if_t = typename enable_if<Condition, T>::type;
template <bool Condition, class T, class U>
struct conditional {
  using type = T;
};
template <class T, class U>
struct conditional<false, T, U> {
  using type = U;
};
template <bool Condition, class T, class U>
using conditional_t = typename conditional<Condition, T, U>::type;

template <class T>
struct numeric_limits {
  static constexpr T max() { return T(1); }
  static constexpr T min() { return T(1); }
  static constexpr T lowest() { return T(1); }
  static constexpr T epsilon() { return T(1); }
  static constexpr T infinity() { return T(1); }
  static constexpr T quiet_NaN() { return T(1); }
};

// ---- math.h's functions, for the same types
#define FOR_FLOATS(F) F(float) F(half) F(bfloat) F(float2) F(float3) F(float4) F(half2) F(half4)
#define FOR_INTEGERS(F) \
  F(char) F(uchar) F(short) F(ushort) F(int) F(uint) F(long) F(ulong) F(uint2) F(uint4) F(int4)
#define MATH(T)                                                                             \
  T exp(T); T exp2(T); T log(T); T log2(T); T sqrt(T); T rsqrt(T); T sin(T); T cos(T);      \
  T tanh(T); T pow(T, T); T max(T, T); T min(T, T);
#define MORE_MATH(T)                                                                        \
  T floor(T); T ceil(T); T trunc(T); T rint(T); T round(T); T fabs(T); T abs(T); T sign(T); \
  T fmax(T, T); T fmin(T, T); T fmod(T, T); T atan2(T, T); T copysign(T, T);                \
  T clamp(T, T, T); T fma(T, T, T);
#define INTEGER_MATH(T) T max(T, T); T min(T, T); T abs(T); T clamp(T, T, T);
FOR_FLOATS(MATH)
FOR_FLOATS(MORE_MATH)
FOR_INTEGERS(INTEGER_MATH)
namespace fast {
FOR_FLOATS(MATH)
}
namespace precise {
FOR_FLOATS(MATH)
}

bool isnan(float);
bool isinf(float);
bool isfinite(float);
uint popcount(uint);
uint clz(uint);
uint ctz(uint);
uint extract_bits(uint, uint, uint);

template <class T, class Condition>
T select(T, T, Condition);
template <class Condition>
bool any(Condition);
template <class Condition>
bool all(Condition);

#define DOT(T, V) T dot(V, V); T length(V);
DOT(float, float2)
DOT(float, float3)
DOT(float, float4)
DOT(half, half2)
DOT(half, half4)

// ---- simdgroup.h
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

template <class T> T simd_sum(T);
template <class T> T simd_max(T);
template <class T> T simd_min(T);
template <class T> T simd_or(T);
template <class T> T simd_prefix_inclusive_sum(T);
template <class T> T simd_shuffle(T, ushort);
template <class T> T simd_broadcast(T, ushort);
template <class T> T simd_shuffle_xor(T, ushort);
template <class T> T simd_shuffle_down(T, ushort);
template <class T> T simd_shuffle_up(T, ushort);
template <class T> T simd_shuffle_and_fill_down(T, T, ushort);
template <class T> T simd_shuffle_and_fill_up(T, T, ushort);
bool simd_any(bool);
bool simd_all(bool);

// ---- simdgroup_matrix.h
template <class T, int Columns, int Rows>
struct simdgroup_matrix {
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T);
  thread vec<T, 2>& thread_elements();
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;

template <class T, int Columns, int Rows = Columns>
simdgroup_matrix<T, Columns, Rows> make_filled_simdgroup_matrix(T);

#define MATRIX_MEMORY(space)                                                                    \
  template <class T>                                                                            \
  void simdgroup_load(thread simdgroup_matrix<T, 8, 8>&, const space T*, ulong = 8, ulong2 = 0, \
                      bool = false);                                                            \
  template <class T>                                                                            \
  void simdgroup_store(simdgroup_matrix<T, 8, 8>, space T*, ulong = 8, ulong2 = 0, bool = false);
MATRIX_MEMORY(device)
MATRIX_MEMORY(threadgroup)

template <class R, class A, class B, class C>
void simdgroup_multiply_accumulate(thread simdgroup_matrix<R, 8, 8>&,
                                   thread simdgroup_matrix<A, 8, 8>&,
                                   thread simdgroup_matrix<B, 8, 8>&,
                                   thread simdgroup_matrix<C, 8, 8>&);
template <class R, class A, class B>
void simdgroup_multiply(thread simdgroup_matrix<R, 8, 8>&, thread simdgroup_matrix<A, 8, 8>&,
                        thread simdgroup_matrix<B, 8, 8>&);

// ---- atomic.h
enum memory_order { memory_order_relaxed };
template <class T>
struct atomic {
  T value;
};
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_float = atomic<float>;

#define ATOMICS(space)                                                                         \
  template <class T>                                                                           \
  T atomic_load_explicit(const volatile space atomic<T>*, memory_order);                       \
  template <class T, class U>                                                                  \
  void atomic_store_explicit(volatile space atomic<T>*, U, memory_order);                      \
  template <class T, class U>                                                                  \
  T atomic_fetch_add_explicit(volatile space atomic<T>*, U, memory_order);                     \
  template <class T, class U>                                                                  \
  T atomic_fetch_max_explicit(volatile space atomic<T>*, U, memory_order);                     \
  template <class T, class U>                                                                  \
  T atomic_fetch_min_explicit(volatile space atomic<T>*, U, memory_order);                     \
  template <class T, class U>                                                                  \
  T atomic_fetch_or_explicit(volatile space atomic<T>*, U, memory_order);
ATOMICS(device)
ATOMICS(threadgroup)

// OpenCL writes (float4)(x, y, z, w) where Metal writes float4(x, y, z, w).
template <class V, class... Parts>
constexpr V make_vector(Parts...) {
  return V{};
}

}  // namespace metal

template <class To, class From>
To as_type(From) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of equal size");
  return To{};
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

#define char2(...) make_vector<char2>(__VA_ARGS__)
#define char4(...) make_vector<char4>(__VA_ARGS__)
#define uchar2(...) make_vector<uchar2>(__VA_ARGS__)
#define uchar4(...) make_vector<uchar4>(__VA_ARGS__)
#define ushort2(...) make_vector<ushort2>(__VA_ARGS__)
#define ushort4(...) make_vector<ushort4>(__VA_ARGS__)
#define int2(...) make_vector<int2>(__VA_ARGS__)
#define int3(...) make_vector<int3>(__VA_ARGS__)
#define int4(...) make_vector<int4>(__VA_ARGS__)
#define uint2(...) make_vector<uint2>(__VA_ARGS__)
#define uint3(...) make_vector<uint3>(__VA_ARGS__)
#define uint4(...) make_vector<uint4>(__VA_ARGS__)
#define ulong2(...) make_vector<ulong2>(__VA_ARGS__)
#define half2(...) make_vector<half2>(__VA_ARGS__)
#define half3(...) make_vector<half3>(__VA_ARGS__)
#define half4(...) make_vector<half4>(__VA_ARGS__)
#define float2(...) make_vector<float2>(__VA_ARGS__)
#define float3(...) make_vector<float3>(__VA_ARGS__)
#define float4(...) make_vector<float4>(__VA_ARGS__)
