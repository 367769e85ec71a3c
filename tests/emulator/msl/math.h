// Metal's math and integer functions, as far as kernels here use them. Scalars are plain overloads,
// not templates: a call with mixed types is then ambiguous, as it is for Apple's compiler.
#pragma once

#include "vectors.h"

namespace metal {

// For float, half and bfloat, computed in float, and componentwise for vectors of them.
#define UNARY(name, expression)                                                             \
  METAL_FUNC float name(float x) { return expression; }                                     \
  METAL_FUNC half name(half h) { return static_cast<half>(name(static_cast<float>(h))); }   \
  METAL_FUNC bfloat name(bfloat b) { return bfloat(name(static_cast<float>(b))); }          \
  template <class A, class V = as_vec_t<A>>                                                 \
  METAL_FUNC V name(const A& a) {                                                           \
    return map(V(a), [](auto x) { return name(x); });                                       \
  }
#define BINARY(name, expression)                                                            \
  METAL_FUNC float name(float x, float y) { return expression; }                            \
  METAL_FUNC half name(half x, half y) {                                                    \
    return static_cast<half>(name(static_cast<float>(x), static_cast<float>(y)));           \
  }                                                                                         \
  METAL_FUNC bfloat name(bfloat x, bfloat y) {                                              \
    return bfloat(name(static_cast<float>(x), static_cast<float>(y)));                      \
  }                                                                                         \
  template <class A, class B, class V = common_vec_t<A, B>>                                 \
  METAL_FUNC V name(const A& a, const B& b) {                                               \
    return zip<element_t<V>>(V(a), V(b), [](auto x, auto y) { return name(x, y); });        \
  }
#define FOR_INTEGERS(FUNCTION)                                             \
  FUNCTION(char) FUNCTION(int8_t) FUNCTION(uchar) FUNCTION(short) FUNCTION(ushort) \
  FUNCTION(int) FUNCTION(uint) FUNCTION(long) FUNCTION(ulong)

#define INTEGER_FUNCTIONS(T)                                                        \
  METAL_FUNC T max(T a, T b) { return a > b ? a : b; }                              \
  METAL_FUNC T min(T a, T b) { return b < a ? b : a; }                              \
  METAL_FUNC T abs(T a) { return static_cast<T>(a < T(0) ? -a : a); }               \
  METAL_FUNC T clamp(T x, T low, T high) { return x < low ? low : high < x ? high : x; }
FOR_INTEGERS(INTEGER_FUNCTIONS)
#undef INTEGER_FUNCTIONS
#undef FOR_INTEGERS

UNARY(exp, __builtin_expf(x))
UNARY(exp2, __builtin_exp2f(x))
UNARY(log, __builtin_logf(x))
UNARY(log2, __builtin_log2f(x))
UNARY(sqrt, __builtin_sqrtf(x))
UNARY(rsqrt, 1.0f / __builtin_sqrtf(x))
UNARY(sin, __builtin_sinf(x))
UNARY(cos, __builtin_cosf(x))
UNARY(tanh, __builtin_tanhf(x))
UNARY(floor, __builtin_floorf(x))
UNARY(ceil, __builtin_ceilf(x))
UNARY(trunc, __builtin_truncf(x))
UNARY(rint, __builtin_rintf(x))
UNARY(round, __builtin_roundf(x))
UNARY(fabs, __builtin_fabsf(x))
UNARY(abs, __builtin_fabsf(x))
UNARY(sign, x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x)
BINARY(max, __builtin_fmaxf(x, y))
BINARY(min, __builtin_fminf(x, y))
BINARY(fmax, __builtin_fmaxf(x, y))
BINARY(fmin, __builtin_fminf(x, y))
BINARY(pow, __builtin_powf(x, y))
BINARY(fmod, __builtin_fmodf(x, y))
BINARY(atan2, __builtin_atan2f(x, y))
BINARY(copysign, __builtin_copysignf(x, y))
#undef UNARY
#undef BINARY

#define CLAMP(T) \
  METAL_FUNC T clamp(T x, T low, T high) { return fmin(fmax(x, low), high); }
CLAMP(float)
CLAMP(half)
CLAMP(bfloat)
#undef CLAMP
template <class T, int N>
METAL_FUNC vec<T, N> clamp(vec<T, N> x, vec<T, N> low, vec<T, N> high) {
  return min(max(x, low), high);
}

METAL_FUNC float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
METAL_FUNC half fma(half a, half b, half c) {
  // The product of two halves is exact in float; the sum may round twice, as nowhere on a GPU.
  return static_cast<half>(static_cast<double>(a) * b + c);
}
template <class T, int N>
METAL_FUNC vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
  vec<T, N> result;
  for (int i = 0; i < N; ++i) result[i] = fma(a[i], b[i], c[i]);
  return result;
}

METAL_FUNC bool isnan(float x) { return __builtin_isnan(x); }
METAL_FUNC bool isinf(float x) { return __builtin_isinf(x); }
METAL_FUNC bool isfinite(float x) { return __builtin_isfinite(x); }

template <class T, class = std::enable_if_t<is_scalar_v<T>>>
METAL_FUNC T select(T if_false, T if_true, bool condition) {
  return condition ? if_true : if_false;
}
template <class T, int N>
METAL_FUNC vec<T, N> select(vec<T, N> if_false, vec<T, N> if_true, vec<bool, N> condition) {
  vec<T, N> result;
  for (int i = 0; i < N; ++i) result[i] = condition[i] ? if_true[i] : if_false[i];
  return result;
}

template <class A, class B, class V = common_vec_t<A, B>,
          class = std::enable_if_t<count_v<A> == count_v<B>>>
METAL_FUNC element_t<V> dot(const A& a, const B& b) {
  const V products = V(a) * V(b);
  element_t<V> sum = products[0];
  for (int i = 1; i < count_v<V>; ++i) sum += products[i];
  return sum;
}
template <class A, class V = as_vec_t<A>>
METAL_FUNC element_t<V> length(const A& a) {
  return sqrt(dot(a, a));
}

METAL_FUNC uint popcount(uint x) { return __builtin_popcount(x); }
METAL_FUNC uint clz(uint x) { return x == 0 ? 32 : __builtin_clz(x); }
METAL_FUNC uint ctz(uint x) { return x == 0 ? 32 : __builtin_ctz(x); }
METAL_FUNC uint extract_bits(uint x, uint offset, uint bits) {
  const uint mask = bits < 32 ? (1u << bits) - 1 : ~0u;
  return bits == 0 ? 0 : x >> offset & mask;
}

// Precision is Apple's to vary; here both are the same.
#define IN_BOTH_PRECISIONS                                                       \
  using metal::exp, metal::exp2, metal::log, metal::log2, metal::sqrt, metal::rsqrt; \
  using metal::sin, metal::cos, metal::tanh, metal::pow, metal::max, metal::min;
namespace fast {
IN_BOTH_PRECISIONS
}
namespace precise {
IN_BOTH_PRECISIONS
}
#undef IN_BOTH_PRECISIONS

}  // namespace metal
