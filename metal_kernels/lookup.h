// Ways to find the level of a code, for the kernel of few queries. All return the same numbers, bit for bit.
//
// `at` returns the level of a field of a word. FLOATS is the size of the threadgroup memory that a way needs. The
// threads fill it together in `make`; a barrier must follow.

enum { FROM_TABLE = 0, COMPUTED = 1, FROM_QUAD = 2, FROM_PAIRS = 3 };

template <int BITS, int WAY>
struct Lookup;

// ---- a table in threadgroup memory ------------------------------------------------------------------

template <int BITS>
struct Lookup<BITS, FROM_TABLE> {
  enum { FLOATS = Stored<BITS>::LEVELS };
  threadgroup const float* table;

  static METAL_FUNC Lookup make(threadgroup float* memory, uint thread_index, uint threads) {
    fill_levels<BITS>(memory, thread_index, threads);
    return {memory};
  }
  METAL_FUNC float at(Indices<uint> word, uint field) const { return table[index_of_field<BITS>(word, field)]; }
};

// ---- a table of pairs in threadgroup memory, indexed by the byte that holds two fields -----------------

template <int BITS>
struct Lookup<BITS, FROM_PAIRS> {
  enum { FLOATS = 512 };
  threadgroup const float2* table;

  static METAL_FUNC Lookup make(threadgroup float* memory, uint thread_index, uint threads) {
    for (uint i = thread_index; i < 512; i += threads) {
      const uint field = i % 2 == 0 ? i / 2 & 15u : i / 32;
      memory[i] = stored_level<BITS>(field & (Stored<BITS>::LEVELS - 1u));
    }
    return {(threadgroup const float2*)memory};
  }
  METAL_FUNC float at(Indices<uint> word, uint field) const {
    const bool is_odd = Stored<BITS>::HAS_TRELLIS && field % 2 == 1;
    const uint place = Stored<BITS>::HAS_TRELLIS ? field / 2 : field;
    const float2 pair = table[(is_odd ? word.odd : word.even) >> (place / 2 * 8) & 0xFFu];
    return pair[place % 2];
  }
};

// ---- without memory: the low bits of an index select the magnitude, its top bit is the sign ---------------

template <int BITS>
METAL_FUNC float with_sign(uint magnitude, uint shifted) {
  return as_type<float>(magnitude | (shifted << (32 - Stored<BITS>::INDEX_BITS) & 0x80000000u));
}

// A magnitude of 2 or 3 bits is a byte divided by 64. 2^23 + byte has the byte in its low bits; both steps are exact.
METAL_FUNC uint from_byte(uint byte) {
  return as_type<uint>(fma(as_type<float>(0x4B000000u | byte), 0.015625f, -131072.0f));
}

template <int BITS>
METAL_FUNC uint computed_magnitude(uint shifted) {
  if (BITS == 2) return from_byte(0x7745270Cu >> ((shifted & 3u) * 8) & 0xFFu);
  if (BITS == 3) {
    const uint bytes = (shifted & 4u) == 0 ? 0x30221307u : 0x9E725641u;
    return from_byte(bytes >> ((shifted & 3u) * 8) & 0xFFu);
  }
  // 4 bits: a polynomial in 1 + index / 8 - 1.46. Its coefficients are chosen so that its values, with each step
  // rounded, are exactly the magnitudes.
  const float t = as_type<float>(0x3F800000u | (shifted & 7u) << 20) - 1.46f;
  float x = fma(15.9235315f, t, 12.7114096f);
  x = fma(x, t, 3.03974319f);
  x = fma(x, t, 1.3990401f);
  x = fma(x, t, 1.70666432f);
  x = fma(x, t, 1.27201033f);
  x = fma(x, t, 2.55958676f);
  return as_type<uint>(fma(x, t, 1.15169942f));
}

template <int BITS>
struct Lookup<BITS, COMPUTED> {
  enum { FLOATS = 1 };
  static METAL_FUNC Lookup make(threadgroup float*, uint, uint) { return {}; }
  METAL_FUNC float at(Indices<uint> word, uint field) const {
    const uint shifted = shifted_field<BITS>(word, field);
    return with_sign<BITS>(computed_magnitude<BITS>(shifted), shifted);
  }
};

// The four lanes of a quad hold the 4 or 8 magnitudes, so all four must call `at` together.
template <int BITS>
struct Lookup<BITS, FROM_QUAD> {
  enum { FLOATS = 1, MAGNITUDES = Stored<BITS>::LEVELS / 2 };
  uint lower, upper;  // this lane's magnitude of the lower four, and of the upper four

  static METAL_FUNC Lookup make(threadgroup float*, uint thread_index, uint) {
    const uint lane = thread_index % 4;
    return {magnitude_bits<BITS>(lane), magnitude_bits<BITS>(MAGNITUDES == 8 ? lane + 4 : lane)};
  }
  METAL_FUNC float at(Indices<uint> word, uint field) const {
    const uint shifted = shifted_field<BITS>(word, field);
    const ushort lane = ushort(shifted & 3u);
    uint magnitude = quad_shuffle(lower, lane);
    if (MAGNITUDES == 8) {
      const uint other = quad_shuffle(upper, lane);
      magnitude = (shifted & 4u) == 0 ? magnitude : other;
    }
    return with_sign<BITS>(magnitude, shifted);
  }
};
