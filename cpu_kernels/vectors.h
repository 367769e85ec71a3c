// Vectors of LANES floats, the same text for every processor: compiler vectors, and intrinsics only where a
// level is looked up in registers.
//
// This file is compiled several times into one library, with different flags. Everything in it, and in what includes
// it, is in an unnamed namespace, and no inline function of the C++ library is called. Otherwise the linker would keep
// one copy of such a function, possibly one for a processor that is not present.
#pragma once

#include <utility>

#include "vocabulary.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#ifndef LANES
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#endif

#define INLINE inline __attribute__((always_inline))

namespace {

using std::int32_t;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uintptr_t;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Mask __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

INLINE Floats load(const float* p) {
  Floats x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
INLINE Words load(const uint32_t* p) {
  Words x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
INLINE void store(float* p, Floats x) { __builtin_memcpy(p, &x, sizeof x); }
INLINE void store(uint32_t* p, Words x) { __builtin_memcpy(p, &x, sizeof x); }

INLINE Floats all(float x) { return x - Floats{}; }
INLINE Words all_words(uint32_t x) { return x - Words{}; }

INLINE Words bits_of(Floats x) { return (Words)x; }
INLINE Floats floats_of(Words x) { return (Floats)x; }

INLINE Floats choose(Mask mask, Floats yes, Floats no) { return mask ? yes : no; }
INLINE Floats larger(Floats a, Floats b) { return choose(a > b, a, b); }

// The lanes `index...` of a, counted on in b.
template <int... INDEX>
INLINE Floats pick(Floats a, Floats b, std::integer_sequence<int, INDEX...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, INDEX...);
#else
  return __builtin_shuffle(a, b, Mask{INDEX...});
#endif
}

// Halves are combined until lane 0 holds the sum, or the maximum.
template <int SIZE, int... LANE>
INLINE Floats swapped(Floats x, std::integer_sequence<int, LANE...>) {
  return pick(x, x, std::integer_sequence<int, (LANE ^ SIZE)...>());
}
template <int SIZE = LANES / 2>
INLINE float sum_of_lanes(Floats x) {
  if constexpr (SIZE == 0) {
    return x[0];
  } else {
    return sum_of_lanes<SIZE / 2>(x + swapped<SIZE>(x, std::make_integer_sequence<int, LANES>()));
  }
}
template <int SIZE = LANES / 2>
INLINE float largest_lane(Floats x) {
  if constexpr (SIZE == 0) {
    return x[0];
  } else {
    return largest_lane<SIZE / 2>(larger(swapped<SIZE>(x, std::make_integer_sequence<int, LANES>()), x));
  }
}

// Exchanges, in every square of 2 SIZE by 2 SIZE numbers, the quarter right of the top with the one left below.
template <int SIZE, int... LANE>
INLINE void exchange(Floats* x, std::integer_sequence<int, LANE...> lanes) {
  if constexpr (SIZE > 0) {
    UNROLL
    for (int i = 0; i < LANES; ++i) {
      if (i & SIZE) continue;
      const Floats a = x[i], b = x[i + SIZE];
      x[i] = pick(a, b, std::integer_sequence<int, (LANE & SIZE ? LANES + LANE - SIZE : LANE)...>());
      x[i + SIZE] = pick(a, b, std::integer_sequence<int, (LANE & SIZE ? LANES + LANE : LANE + SIZE)...>());
    }
    exchange<SIZE / 2>(x, lanes);
  }
}

// to[c][r] = from[r][c] for LANES rows and `columns` columns, rounded up to whole vectors.
INLINE void transpose(const float* from, int64_t from_pitch, int64_t columns, float* to, int64_t to_pitch) {
  for (int64_t c = 0; c < columns; c += LANES) {
    Floats x[LANES];
    UNROLL
    for (int r = 0; r < LANES; ++r) x[r] = load(from + r * from_pitch + c);
    exchange<LANES / 2>(x, std::make_integer_sequence<int, LANES>());
    UNROLL
    for (int r = 0; r < LANES; ++r) store(to + (c + r) * to_pitch, x[r]);
  }
}

// ---- 16-bit numbers --------------------------------------------------------------------------------

// float16 to float32; subnormal numbers are exact, whatever the processor does with subnormal float32 numbers.
INLINE Floats floats_of_halves(Words h) {
  const Words size = (h & 0x7fffu) << 13;
  const Words exponent = size & 0x0f800000u;
  const Floats normal = floats_of(size + (112u << 23));
  const Floats subnormal = floats_of(size + (113u << 23)) - floats_of(all_words(113u << 23));
  const Floats special = floats_of(size + (224u << 23));  // infinite or not a number
  Floats x = choose(exponent == 0u, subnormal, normal);
  x = choose(exponent == 0x0f800000u, special, x);
  return floats_of(bits_of(x) | ((h & 0x8000u) << 16));
}

INLINE Words load_halves(const uint16_t* p) {
  Halves x;
  __builtin_memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, Words);
}

// float32 of the float16 numbers at p.
INLINE Floats load_as_floats(const uint16_t* p) {
#if defined(__AVX512F__) && LANES == 16
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
  return floats_of_halves(load_halves(p));
#endif
}

inline float float_of_half(uint16_t h) {
  const uint32_t size = (h & 0x7fffu) << 13, exponent = size & 0x0f800000u;
  const uint32_t sign = (h & 0x8000u) << 16;
  float x = float_of_bits(size + (exponent == 0x0f800000u ? 224u << 23 : 112u << 23));
  if (exponent == 0u) x = float_of_bits(size + (113u << 23)) - float_of_bits(113u << 23);
  return float_of_bits(bits_of_float(x) | sign);
}

// Rounded to nearest, ties to even.
inline uint16_t half_of_float(float x) {
  uint32_t bits = bits_of_float(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits >= 0x47800000u) return uint16_t(sign | (bits > 0x7f800000u ? 0x7e00u : 0x7c00u));
  if (bits < 0x38800000u) {
    // The last place of 0.5 is that of subnormal float16, so the addition rounds.
    return uint16_t(sign | (bits_of_float(float_of_bits(bits) + 0.5f) - bits_of_float(0.5f)));
  }
  return uint16_t(sign | ((bits - (112u << 23) + 0xfffu + (bits >> 13 & 1u)) >> 13));
}

inline uint16_t bfloat_of_float(float x) {
  const uint32_t bits = bits_of_float(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40u);
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// ---- exponentials ----------------------------------------------------------------------------------

// e^x for x <= 0, to 2 units in the last place; zero below -87, a NaN for a NaN.
INLINE Floats exponential(Floats x) {
  const Floats to_nearest = all(12582912.0f);  // 1.5 * 2^23: adding it drops the fraction
  const Floats shifted = x * 1.44269504f + to_nearest;
  const Floats n = shifted - to_nearest;
  const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // x - n ln 2, ln 2 in two parts
  Floats p = r * 1.98412698e-4f + 1.38888889e-3f;  // the series of e^r, |r| <= 0.35
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Words power = (bits_of(shifted) - bits_of(to_nearest) + 127u) << 23;
  return choose(x < -87.0f, Floats{}, p * floats_of(power));
}

// ---- look-ups --------------------------------------------------------------------------------------

// table[index mod 128] of 128 numbers.
INLINE Floats of_128(const float* table, Words index) {
#if defined(__AVX512F__) && LANES == 16
  // From eight registers: four look-ups of 32 numbers each; two more bits choose among them.
  const auto of_32 = [&](int first) {
    const __m512 low = _mm512_loadu_ps(table + first), high = _mm512_loadu_ps(table + first + 16);
    return _mm512_permutex2var_ps(low, (__m512i)index, high);
  };
  const __mmask16 bit_5 = _mm512_test_epi32_mask((__m512i)index, _mm512_set1_epi32(32));
  const __mmask16 bit_6 = _mm512_test_epi32_mask((__m512i)index, _mm512_set1_epi32(64));
  const __m512 low = _mm512_mask_blend_ps(bit_5, of_32(0), of_32(32));
  const __m512 high = _mm512_mask_blend_ps(bit_5, of_32(64), of_32(96));
  return (Floats)_mm512_mask_blend_ps(bit_6, low, high);
#elif defined(__AVX2__) && LANES == 8
  return (Floats)_mm256_i32gather_ps(table, (__m256i)(index & 127u), 4);
#else
  Floats x;
  for (int i = 0; i < LANES; ++i) x[i] = table[index[i] & 127u];
  return x;
#endif
}

// ---- levels ----------------------------------------------------------------------------------------

// The levels of indices (see Stored) as bit patterns; at 8 bits the magnitudes alone. Eight levels are there twice: an
// index of 3 bits lies in a field of 4.
template <int BITS>
struct LevelTable {
  enum { HALF = Stored<BITS>::LEVELS / 2, SIZE = BITS == 8 ? 128 : 16 };
  alignas(64) uint32_t bits[SIZE] = {};
  constexpr LevelTable() {
    for (uint32_t i = 0; i < SIZE; ++i) {
      bits[i] = magnitude_bits<BITS>(i % HALF) ^ (i / HALF % 2u << 31);
    }
  }
};

// `level` takes the index in field `field` of words.
template <int BITS>
struct Levels {
  static constexpr LevelTable<BITS> TABLE{};
  enum { LEVELS = Stored<BITS>::LEVELS, FIELD = BITS == 8 ? 8 : 4 };

  INLINE Floats level(Words word, int field) const {
    const Words code = word >> (unsigned)(FIELD * field);
    if (BITS == 8) return floats_of(bits_of(of_128(numbers(), code)) ^ (code << 24 & 0x80000000u));
#if defined(__AVX512F__) && LANES == 16
    return (Floats)_mm512_permutexvar_ps((__m512i)code, _mm512_load_ps(numbers()));
#elif defined(__AVX2__) && LANES == 8
    // A table of 8: at 4 bits of magnitudes, without their signs.
    const Floats x = (Floats)_mm256_permutevar8x32_ps(_mm256_load_ps(numbers()), (__m256i)code);
    if (LEVELS == 8) return x;
    const Words sign = field == 7 ? word : word << (unsigned)(28 - 4 * field);
    return floats_of(bits_of(x) ^ (sign & 0x80000000u));
#elif defined(__ARM_NEON) && LANES == 4
    return by_bytes(code & 15u);
#else
    Floats x;
    for (int i = 0; i < LANES; ++i) x[i] = float_of_bits(TABLE.bits[code[i] & 15u]);
    return x;
#endif
  }

 private:
  static const float* numbers() { return (const float*)TABLE.bits; }

#if defined(__ARM_NEON) && LANES == 4
  // The four bytes of every lane's level.
  INLINE Floats by_bytes(Words code) const {
    const uint8x16_t index = (uint8x16_t)(code * 0x04040404u + 0x03020100u);
    const uint8_t* bytes = (const uint8_t*)TABLE.bits;
    if (LEVELS == 8) return (Floats)vqtbl2q_u8(vld1q_u8_x2(bytes), index);
    return (Floats)vqtbl4q_u8(vld1q_u8_x4(bytes), index);
  }
#endif
};

}  // namespace
