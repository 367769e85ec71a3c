// From words to the operands of the tensor cores.
//
// A chunk is 8 codes of one lane of the words, neighbours on the packed axis. A product sums over that axis, and the
// order of a sum is free, so a lane of a warp takes whole chunks. Two steps of 16 positions take 32 codes, which are
// four chunks, one from each of the four lanes that share a row of the operand. The other side of the product (a query,
// or softmax weights) is put into the same order.

// How the chunks of AXIS codes are distributed over the four lanes. A load reads WORDS words of one lane of the words,
// which hold SHARE chunks.
template <int BITS, int AXIS>
struct Chunks {
  enum {
    COUNT = AXIS / 8,
    SHARE = BITS == 2 || BITS == 3 ? 2 : 1,
    WORDS = BITS == 3 || BITS == 8 ? 2 : 1,
    LOADS = (COUNT + 4 * SHARE - 1) / (4 * SHARE),
    STEPS = LOADS * SHARE
  };
  // The chunk of a lane in a step. If the lanes have room for more than COUNT chunks, it may not exist.
  static DEVICE_FN int chunk(int step, int quad_lane) {
    return (step / SHARE * 4 + quad_lane) * SHARE + step % SHARE;
  }
  // The row of words that word `i` of a load comes from. The row always exists, even if its chunks do not.
  static DEVICE_FN int row(int load, int i, int quad_lane) {
    constexpr int FIRST = WordRows<BITS, AXIS>::FIRST, SECOND = WordRows<BITS, AXIS>::SECOND;
    const bool in_first = BITS == 8 || i == 0;
    const int lane_row = BITS == 8 ? 2 * quad_lane + i : in_first ? quad_lane : FIRST + quad_lane / 2;
    const int row = lane_row + load * (BITS == 8 ? 8 : in_first ? 4 : 2);
    if (COUNT % (4 * SHARE) == 0) return row;
    return min(row, in_first ? FIRST - 1 : FIRST + SECOND - 1);
  }
};

// The position of code i of a chunk among the chunk's 8 levels. Codes of 2 and 3 bits are decoded two fields at a time,
// so that of four codes the even ones come first.
template <int BITS>
struct Order {
  enum { NEXT = BITS == 2 || BITS == 3 ? 2 : 1 };  // between the codes of a pair
  static DEVICE_FN int place(int i) { return NEXT == 2 ? i / 4 * 4 + i % 2 * 2 + i % 4 / 2 : i; }
};

// ---- levels as float16 ----------------------------------------------------------------------------

// A magnitude, a normal number of float16, as float16 bits: rounded to nearest, ties to even.
__host__ __device__ constexpr uint half_magnitude(uint bits) {
  const uint half = (((bits >> 23) - 112u) << 10) | ((bits >> 13) & 0x3ffu);
  const uint rest = bits & 0x1fffu;
  return half + (rest > 0x1000u || (rest == 0x1000u && half % 2 == 1) ? 1u : 0u);
}

// ---- selectors: they pick levels, four at a time, by one nibble each

// `word` of a lane of the words, shifted up by SHIFT bits; bits of the preceding word `before` are shifted in.
template <int SHIFT>
DEVICE_FN uint moved_up(uint word, uint before) { return (word << SHIFT) | (before >> (32 - SHIFT)); }

// Join four low and four high bytes into two pairs of float16.
DEVICE_FN void join_bytes(uint low, uint high, uint* pairs) {
  pairs[0] = chosen_bytes(low, high, 0x5140u);
  pairs[1] = chosen_bytes(low, high, 0x7362u);
}

// The bytes of the 8 float16 numbers that a selector picks from: low bytes of the first four and of the last four, then
// their high bytes.
struct LevelBytes {
  uint low[2], high[2];
};

// Look up four levels, by the lower half of `selector`.
DEVICE_FN void look_up(const LevelBytes& bytes, uint selector, uint* pairs) {
  join_bytes(chosen_bytes(bytes.low[0], bytes.low[1], selector), chosen_bytes(bytes.high[0], bytes.high[1], selector),
             pairs);
}

// The same with signs, which are the highest bits of the nibbles in one half of `nibbles`; `below` holds these nibbles
// shifted up by four bits.
DEVICE_FN void look_up_signed(
    const LevelBytes& bytes, uint selector, uint below, uint nibbles, int half, uint* pairs) {
  const uint signs = chosen_bytes(below, nibbles, half == 0 ? 0x5140u : 0x7362u) & 0x80808080u;
  join_bytes(chosen_bytes(bytes.low[0], bytes.low[1], selector),
             chosen_bytes(bytes.high[0], bytes.high[1], selector) ^ signs, pairs);
}

// For each width: `level(nibble)`, the float16 that a nibble of a selector picks; and `make`, which turns a load into
// its levels, SHARE times four pairs of float16 in the order of Order<BITS>. words: those of the load. before: for a
// trellis, the word that precedes the first of them on the packed axis. quad_lane: the lane that has the load. table:
// the levels of 8 bits.
template <int BITS>
struct Levels;

// A trellis: bits 2 i and 2 i + 1 of a word are p(i), the path, and s(i), the sign of code i. The bits of the code's
// subset are p(i - 2) and q(i) = p(i) + p(i - 1) + p(i - 3) modulo 2, each inverted if the sign is set (see
// indices_of). A nibble is (q, s, p(i - 2)), lowest bit first; `level` does the inversion.
template <>
struct Levels<2> {
  static __device__ constexpr uint level(uint nibble) {
    const uint negative = nibble >> 1 & 1u, subset = (nibble >> 2) | (nibble & 1u) << 1;
    return half_magnitude(MAGNITUDES_2[subset ^ (3u * negative)]) | (negative << 15);
  }
  static DEVICE_FN void make(
      const uint* words, uint before, int, const LevelBytes& bytes, const ushort*, uint* pairs) {
    const uint word = words[0];
    const uint by_four = moved_up<4>(word, before), by_six = moved_up<6>(word, before);
    const uint fields = joined(0x55555555u, word ^ moved_up<2>(word, before) ^ by_six, word);
    const uint even = (fields & 0x33333333u) | (by_six & 0x44444444u);
    const uint odd = ((fields >> 2) & 0x33333333u) | (by_four & 0x44444444u);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint four[2][2];
      look_up(bytes, even >> (16 * half), four[0]);
      look_up(bytes, odd >> (16 * half), four[1]);
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[4 * half + i] = four[i % 2][i / 2];
    }
  }
};

// A nibble is (h, q + s, p(i - 2) + s), sums modulo 2, with h from the second plane: the index of a magnitude with its
// bits reversed.
template <>
struct Levels<3> {
  static __device__ constexpr uint level(uint nibble) {
    return half_magnitude(MAGNITUDES_3[(nibble >> 2) | (nibble & 2u) | (nibble & 1u) << 2]);
  }
  static DEVICE_FN void make(
      const uint* words, uint before, int quad_lane, const LevelBytes& bytes, const ushort*, uint* pairs) {
    const uint word = words[0], high = words[1] >> (quad_lane % 2 * 2);
    const uint by_two = moved_up<2>(word, before), by_four = moved_up<4>(word, before);
    const uint by_six = moved_up<6>(word, before);
    const uint subsets = word ^ (((word >> 1) ^ by_two) & 0x55555555u) ^
                         joined(0x55555555u, by_six, moved_up<5>(word, before));
    const uint even = (high & 0x11111111u) | ((subsets << 1) & 0x66666666u);
    const uint odd = (high & 0x22222222u) | (subsets & 0xccccccccu);  // one bit too high; the selector is shifted below
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint four[2][2];
      look_up_signed(bytes, even >> (16 * half), by_six, by_two, half, four[0]);
      look_up_signed(bytes, odd >> (16 * half + 1), by_four, word, half, four[1]);
#pragma unroll
      for (int i = 0; i < 4; ++i) pairs[4 * half + i] = four[i % 2][i / 2];
    }
  }
};

template <>
struct Levels<4> {
  static __device__ constexpr uint level(uint nibble) { return half_magnitude(MAGNITUDES_4[nibble]); }
  static DEVICE_FN void make(
      const uint* words, uint, int, const LevelBytes& bytes, const ushort*, uint* pairs) {
    const uint word = words[0], indices = word & 0x77777777u;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      look_up_signed(bytes, indices >> (16 * half), word << 4, word, half, pairs + 2 * half);
    }
  }
};

template <>
struct Levels<8> {
  static __device__ constexpr uint level(uint) { return 0; }  // too many levels for a selector; `make` uses the table
  static DEVICE_FN void make(
      const uint* words, uint, int, const LevelBytes&, const ushort* table, uint* pairs) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint codes = words[i / 2] >> (16 * (i % 2));
      pairs[i] = table[codes & 0xffu] | uint(table[(codes >> 8) & 0xffu]) << 16;
    }
  }
};

// Byte `byte` of the levels that nibbles `first` to `first` + 3 pick.
template <int BITS>
__device__ constexpr uint level_bytes(uint first, uint byte) {
  uint bytes = 0;
  for (uint i = 0; i < 4; ++i) bytes |= (Levels<BITS>::level(first + i) >> (8 * byte) & 0xffu) << (8 * i);
  return bytes;
}

// Write the bytes or the table that levels of a width are picked from to shared memory. A thread then loads them and
// keeps them in registers, instead of making them anew for each use. Each lane of a quad has its own copy; otherwise
// the compiler would use registers of the warp, which must be copied for each use. table: [256], for 8 bits. All
// threads call this; a barrier must follow.
template <int BITS>
DEVICE_FN void fill_half_levels(uint4* bytes, ushort* table, int thread, int threads) {  // bytes: [4]
  if (BITS == 8) {
    for (int code = thread; code < 256; code += threads) {
      table[code] = ushort(half_magnitude(MAGNITUDES_8[code % 128]) | uint(code / 128) << 15);
    }
  } else if (thread < 4) {
    constexpr uint LOW_0 = level_bytes<BITS>(0, 0), LOW_1 = level_bytes<BITS>(4, 0);
    constexpr uint HIGH_0 = level_bytes<BITS>(0, 1), HIGH_1 = level_bytes<BITS>(4, 1);
    bytes[thread] = {LOW_0, LOW_1, HIGH_0, HIGH_1};
  }
}

template <int BITS>
DEVICE_FN LevelBytes kept_levels(const uint4* bytes, int quad_lane) {
  LevelBytes kept = {};
  if (BITS != 8) {
    const uint4 four = bytes[quad_lane];
    kept = {{four.x, four.y}, {four.z, four.w}};
    for (int i = 0; i < 2; ++i) keep_in_register(kept.low[i]), keep_in_register(kept.high[i]);
  }
  return kept;
}
