// The scalar types of the Metal Shading Language, and what MLX's headers ask about them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../runtime/emulator.h"

// Always inlined: g++ does not check the store of a structure that a call returns.
#define METAL_FUNC inline __attribute__((always_inline))

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;
using half = _Float16;

// The upper half of a float. It converts implicitly to float and from nothing, so a kernel must
// write T(x) on every store, as it must for Apple.
class bfloat {
 public:
  bfloat() = default;

  template <class T, class = std::enable_if_t<std::is_convertible_v<T, float>>>
  explicit constexpr bfloat(T value) : bits_(round(static_cast<float>(value))) {}

  static constexpr bfloat from_bits(uint16_t bits) {
    bfloat result(0);
    result.bits_ = bits;
    return result;
  }

  constexpr operator float() const { return __builtin_bit_cast(float, uint32_t{bits_} << 16); }

  constexpr bfloat operator-() const { return from_bits(bits_ ^ 0x8000); }

 private:
  static constexpr uint16_t round(float value) {  // to nearest, ties to even
    const uint32_t bits = __builtin_bit_cast(uint32_t, value);
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    if (is_nan) return static_cast<uint16_t>(bits >> 16 | 0x0040);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }

  uint16_t bits_;
};

// Not as floats, since Apple rounds each result to bfloat; kernels here compute in float anyway.
#define NO_OPERATOR(op)                                                \
  bfloat operator op(bfloat, bfloat) = delete;                         \
  template <class I, class = std::enable_if_t<std::is_integral_v<I>>> \
  bfloat operator op(bfloat, I) = delete;                              \
  template <class I, class = std::enable_if_t<std::is_integral_v<I>>> \
  bfloat operator op(I, bfloat) = delete;
NO_OPERATOR(+)
NO_OPERATOR(-)
NO_OPERATOR(*)
NO_OPERATOR(/)
#undef NO_OPERATOR

template <class To, class From>
METAL_FUNC To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of equal size");
  To result;
  __builtin_memcpy(static_cast<void*>(&result), &value, sizeof(To));
  return result;
}

namespace metal {

template <class T>
struct numeric_limits : std::numeric_limits<T> {};

template <>
struct numeric_limits<half> {
  static constexpr half max() { return 65504.0f; }
  static constexpr half infinity() { return __builtin_inff(); }
};

template <>
struct numeric_limits<bfloat> {
  static constexpr bfloat max() { return bfloat::from_bits(0x7f7f); }
  static constexpr bfloat infinity() { return bfloat::from_bits(0x7f80); }
};

}  // namespace metal
