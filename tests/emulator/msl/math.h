// Metal's math functions, as far as kernels here use them, and for the types they use: any other
// call does not compile.
#pragma once

#include "vectors.h"

namespace metal {

#define UNARY(name)                                                 \
  METAL_FUNC float name(float x) { return __builtin_##name##f(x); } \
  template <class T>                                                \
  void name(T) = delete;
UNARY(exp)
UNARY(sqrt)
UNARY(fabs)
#undef UNARY

METAL_FUNC float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
template <class A, class B, class C>
void fma(A, B, C) = delete;

// Plain overloads, not templates: a call with mixed types is then ambiguous, as it is for Apple's
// compiler.
#define OF_INTEGERS(T)                                 \
  METAL_FUNC T max(T a, T b) { return a > b ? a : b; } \
  METAL_FUNC T min(T a, T b) { return b < a ? b : a; }
OF_INTEGERS(char)
OF_INTEGERS(int8_t)
OF_INTEGERS(uchar)
OF_INTEGERS(short)
OF_INTEGERS(ushort)
OF_INTEGERS(int)
OF_INTEGERS(uint)
OF_INTEGERS(long)
OF_INTEGERS(ulong)
#undef OF_INTEGERS
#define OF_FLOATS(T)                                                     \
  METAL_FUNC T max(T a, T b) { return static_cast<T>(__builtin_fmaxf(a, b)); } \
  METAL_FUNC T min(T a, T b) { return static_cast<T>(__builtin_fminf(a, b)); } \
  METAL_FUNC T clamp(T x, T low, T high) { return min(max(x, low), high); }
OF_FLOATS(float)
OF_FLOATS(half)
OF_FLOATS(bfloat)
#undef OF_FLOATS

// What else MLX's utils.h calls, in functions that no kernel here calls: declared only.
float log(float);
float atan2(float, float);
float fmax(float, float);
float fmin(float, float);
bool isinf(float);
bool isnan(float);
float select(float, float, bool);

// Precision is Apple's to vary; here all are the same.
namespace fast {
using metal::exp;
}
namespace precise {
using metal::sqrt;
}

}  // namespace metal
