// The scalar types of the Metal Shading Language, and the traits its headers offer.
#pragma once
#pragma GCC system_header  // literal suffixes without an underscore are reserved for such headers

#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "../runtime/emulator.h"

#define __METAL__ 1
#define __METAL_VERSION__ 310
#define METAL_FUNC inline __attribute__((always_inline))

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = unsigned long;
using std::int16_t, std::int32_t, std::int64_t, std::int8_t, std::size_t;
using std::uint16_t, std::uint32_t, std::uint64_t, std::uint8_t;

using half = _Float16;

constexpr half operator""h(long double value) { return static_cast<half>(value); }
constexpr half operator""h(unsigned long long value) { return static_cast<half>(value); }

// The upper half of a float. Arithmetic rounds after every operation. It converts implicitly to
// float and from nothing, so a kernel must write T(x) on every store, as it must for Apple.
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

// bfloat with bfloat or an integer stays bfloat; with float it becomes float.
#define BFLOAT_OPERATOR(op)                                                              \
  constexpr bfloat operator op(bfloat a, bfloat b) { return bfloat(float(a) op float(b)); } \
  constexpr float operator op(bfloat a, float b) { return float(a) op b; }                \
  constexpr float operator op(float a, bfloat b) { return a op float(b); }                \
  template <class I, class = std::enable_if_t<std::is_integral_v<I>>>                    \
  constexpr bfloat operator op(bfloat a, I b) { return bfloat(float(a) op float(b)); }   \
  template <class I, class = std::enable_if_t<std::is_integral_v<I>>>                    \
  constexpr bfloat operator op(I a, bfloat b) { return bfloat(float(a) op float(b)); }   \
  constexpr bfloat& operator op##=(bfloat& a, bfloat b) { return a = a op b; }
BFLOAT_OPERATOR(+)
BFLOAT_OPERATOR(-)
BFLOAT_OPERATOR(*)
BFLOAT_OPERATOR(/)
#undef BFLOAT_OPERATOR

template <class To, class From>
METAL_FUNC To as_type(From value) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of equal size");
  To result;
  __builtin_memcpy(static_cast<void*>(&result), &value, sizeof(To));
  return result;
}

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define M_PI_F 3.14159265358979323846f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.693147180559945309417f

namespace metal {

using std::conditional, std::conditional_t, std::enable_if, std::enable_if_t;
using std::integral_constant, std::is_convertible_v, std::is_integral_v, std::is_same;
using std::is_same_v, std::is_signed_v, std::is_unsigned_v;

template <class T>
inline constexpr bool is_floating_point_v =
    std::is_floating_point_v<T> || std::is_same_v<T, half> || std::is_same_v<T, bfloat>;

template <class T>
inline constexpr bool is_scalar_v = std::is_arithmetic_v<T> || is_floating_point_v<T>;

template <class T>
struct numeric_limits : std::numeric_limits<T> {};

template <>
struct numeric_limits<half> {
  static constexpr half max() { return 65504.0f; }
  static constexpr half lowest() { return -65504.0f; }
  static constexpr half min() { return 0x1p-14f; }
  static constexpr half epsilon() { return 0x1p-10f; }
  static constexpr half infinity() { return __builtin_inff(); }
  static constexpr half quiet_NaN() { return __builtin_nanf(""); }
};

template <>
struct numeric_limits<bfloat> {
  static constexpr bfloat max() { return bfloat::from_bits(0x7f7f); }
  static constexpr bfloat lowest() { return bfloat::from_bits(0xff7f); }
  static constexpr bfloat min() { return bfloat::from_bits(0x0080); }
  static constexpr bfloat epsilon() { return bfloat::from_bits(0x3c00); }
  static constexpr bfloat infinity() { return bfloat::from_bits(0x7f80); }
  static constexpr bfloat quiet_NaN() { return bfloat::from_bits(0x7fc0); }
};

}  // namespace metal
