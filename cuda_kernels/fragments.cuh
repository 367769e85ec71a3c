// From words to the operands of the tensor cores.
//
// A chunk is 8 codes of one lane of the words, next to each other on the packed axis; that is the axis a product sums
// over, and the order of the sum is free. So a lane of a warp takes whole chunks: the products of two steps of 16
// places take 32 codes, four chunks, one from each of the four lanes that share a row of the operand. What stands
// on the other side of the product (a query, or softmax weights) is put into the same order.

// How the chunks of AXIS codes are dealt to the four lanes. A load brings WORDS words of one lane of the words, which
// hold SHARE chunks.
template <int BITS, int AXIS>
struct Chunks {
  enum {
    COUNT = AXIS / 8,
    SHARE = BITS == 2 || BITS == 3 ? 2 : 1,
    WORDS = BITS == 3 || BITS == 8 ? 2 : 1,
    LOADS = (COUNT + 4 * SHARE - 1) / (4 * SHARE),
    STEPS = LOADS * SHARE
  };
  // The chunk of a lane in a step; where the lanes' chunks are more than COUNT, it may not exist.
  static DEVICE_FN int chunk(int step, int quad_lane) {
    return (step / SHARE * 4 + quad_lane) * SHARE + step % SHARE;
  }
  // The row of words that word `i` of a load is; one that exists, if not its chunks.
  static DEVICE_FN int row(int load, int i, int quad_lane) {
    const int place = load * 4 + quad_lane;
    const int last = WordRows<BITS, AXIS>::FIRST - 1;
    if (BITS == 8) return min(2 * place + i, last);
    if (i == 0) return min(place, last);
    return last + 1 + min(place / 2, int(WordRows<BITS, AXIS>::SECOND) - 1);
  }
};

// Where code i of a chunk stands among the 8 levels that levels_of_chunk makes: the codes of 2 and 3 bits are taken two
// fields at a time, even ones first.
template <int BITS>
struct Order {
  enum { NEXT = BITS == 2 || BITS == 3 ? 2 : 1 };  // between the codes of a pair
  static DEVICE_FN int place(int i) { return NEXT == 2 ? i % 2 * 4 + i / 2 : i; }
};

// ---- levels as float16 ----------------------------------------------------------------------------

// A magnitude, which is a normal number of float16, rounded to nearest, ties to even.
__host__ __device__ constexpr uint half_magnitude(uint bits) {
  const uint half = (((bits >> 23) - 112u) << 10) | ((bits >> 13) & 0x3ffu);
  const uint rest = bits & 0x1fffu;
  return half + (rest > 0x1000u || (rest == 0x1000u && half % 2 == 1) ? 1u : 0u);
}

// The level of an index (see Stored), of at most 16 levels.
template <int BITS>
__device__ constexpr uint half_level(uint index) {
  const uint half = Stored<BITS>::LEVELS / 2, magnitude = index % half;
  const uint bits = BITS == 2   ? MAGNITUDES_2[magnitude % 4]
                    : BITS == 3 ? MAGNITUDES_3[magnitude % 8]
                                : MAGNITUDES_4[magnitude % 8];
  return half_magnitude(bits) | (index / half << 15);
}

// Byte `byte` of the levels of indices `first` to `first` + 3.
template <int BITS>
__device__ constexpr uint level_bytes(uint first, uint byte) {
  uint bytes = 0;
  for (uint i = 0; i < 4; ++i) {
    bytes |= (half_level<BITS>(first + i) >> (8 * byte) & 0xffu) << (8 * i);
  }
  return bytes;
}

// Two pairs of float16 from the low and the high bytes of four.
DEVICE_FN void join_bytes(uint low, uint high, uint* pairs) {
  pairs[0] = chosen_bytes(low, high, 0x5140u);
  pairs[1] = chosen_bytes(low, high, 0x7362u);
}

// The levels of four indices, the nibbles of the upper or lower half of `word`.
template <int BITS>
DEVICE_FN void look_up(uint word, int half, uint* pairs) {
  constexpr uint LOW_0 = level_bytes<BITS>(0, 0), LOW_1 = level_bytes<BITS>(4, 0);
  constexpr uint HIGH_0 = level_bytes<BITS>(0, 1), HIGH_1 = level_bytes<BITS>(4, 1);
  const uint selector = (word & 0x77777777u) >> (16 * half);
  uint high = chosen_bytes(HIGH_0, HIGH_1, selector);
  if (Stored<BITS>::LEVELS == 16) {
    // Eight magnitudes: each sign bit goes to the highest bit of a byte.
    high ^= chosen_bytes(word << 4, word, half == 0 ? 0x5140u : 0x7362u) & 0x80808080u;
  }
  join_bytes(chosen_bytes(LOW_0, LOW_1, selector), high, pairs);
}

// The 8 levels of a chunk, as four pairs of float16, in the order of Order<BITS>. words: those of the load; `before`
// the one before the first of them on the packed axis, of a trellis. `part` is the chunk's number among those of the
// load, `place` the number of the load's lane among all (see Chunks); `table` holds the 256 levels of 8 bits.
template <int BITS>
struct ChunkLevels {
  static DEVICE_FN void make(const uint* words, uint before, int part, int place, const ushort*, uint* pairs) {
    // Both chunks of the load come to these same lines.
    const uint high = BITS == 3 ? words[1] >> (place % 2 * 2) : 0;
    const Indices<uint> indices = indices_of<BITS>(words[0], before, high);
    look_up<BITS>(indices.even, part, pairs);
    look_up<BITS>(indices.odd, part, pairs + 2);
  }
};

template <>
struct ChunkLevels<4> {
  static DEVICE_FN void make(const uint* words, uint, int, int, const ushort*, uint* pairs) {
    look_up<4>(words[0], 0, pairs);
    look_up<4>(words[0], 1, pairs + 2);
  }
};

template <>
struct ChunkLevels<8> {
  static DEVICE_FN void make(const uint* words, uint, int, int, const ushort* table, uint* pairs) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint codes = words[i / 2] >> (16 * (i % 2));
      pairs[i] = table[codes & 0xffu] | uint(table[(codes >> 8) & 0xffu]) << 16;
    }
  }
};

// The table for 8 bits, by all threads together. A barrier must follow.
DEVICE_FN void fill_half_levels(ushort* table, int thread, int threads) {
  for (int code = thread; code < 256; code += threads) {
    table[code] = ushort(half_magnitude(MAGNITUDES_8[code % 128]) | uint(code / 128) << 15);
  }
}
