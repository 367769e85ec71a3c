// Stands before MLX's header of this name, which overloads constructors by address space only.
// Just enough of the type for MLX's utils.h to compile; no kernel here is complex.
#pragma once

template <class T>
struct complex_t {
  T real, imag;
  constexpr complex_t(T r, T i) : real(r), imag(i) {}
};
using complex64_t = complex_t<float>;
