// Trellis codes (caches use them at 2 and 3 bits), and the reading of words of any width (docs/FORMAT.md, sections 3
// and 5). Included after levels.h.
//
// Number and Bits are float and uint, or vectors of them. With vectors, each component has a sequence or a word of its
// own.

// A stored code gives an index into LEVELS levels; the upper half of the levels is the lower half, negated. At 4 and 8
// bits the index is the code itself. At 2 and 3 bits the index has one bit more than the code.
template <int BITS>
struct Stored {
  enum { HAS_TRELLIS = BITS < 4 ? 1 : 0, INDEX_BITS = BITS < 4 ? BITS + 1 : BITS, LEVELS = 1 << INDEX_BITS };
};

// The level of an index below LEVELS.
template <int BITS>
DEVICE_FN float stored_level(uint index) {
  const uint negative = index >> (Stored<BITS>::INDEX_BITS - 1);
  const uint magnitude = index & (Stored<BITS>::LEVELS / 2 - 1u);
  return float_of_bits(magnitude_bits<BITS>(magnitude) ^ (negative << 31));
}

// Write all levels to `table` [LEVELS], which the threads of a threadgroup share. One load without bank conflicts then
// gives a level with its sign. A barrier must follow.
template <int BITS>
DEVICE_FN void fill_levels(THREADGROUP float* table, uint thread_index, uint threads) {
  for (uint index = thread_index; index < Stored<BITS>::LEVELS; index += threads) {
    table[index] = stored_level<BITS>(index);
  }
}

// ---- words to indices -----------------------------------------------------------------------------

// The bits of a code in its first and second plane.
template <int BITS>
struct Planes {
  enum { FIRST = BITS, SECOND = 0 };
};
template <>
struct Planes<3> {
  enum { FIRST = 2, SECOND = 1 };
};

// Rows of words in each plane, for COUNT codes along the packed axis.
template <int BITS, int COUNT>
struct WordRows {
  enum {
    FIRST = (COUNT * Planes<BITS>::FIRST + 31) / 32,
    SECOND = (COUNT * Planes<BITS>::SECOND + 31) / 32,
    ALL = FIRST + SECOND
  };
};

// The codes of one word as indices of levels. Trellis codes: `even` and `odd` each hold eight fields of 4 bits, for the
// even and the odd positions. Other codes: `even` is the word itself.
template <typename Bits>
struct Indices {
  Bits even, odd;
};

// The indices of the codes in `word`. `before` is the preceding word of the same lane, or 0 for the first. `high` (3
// bits only) is the word of the second plane that belongs to `word`; each serves two words of the first plane, and is
// shifted right by two for the second of them.
template <int BITS, typename Bits>
DEVICE_FN Indices<Bits> indices_of(Bits word, Bits before, Bits high) {
  Indices<Bits> made;
  made.even = made.odd = word;
  if (Stored<BITS>::HAS_TRELLIS) {
    const Bits path = word & 0x55555555u, last = before & 0x55555555u;
    const Bits sign = (word >> 1) & 0x55555555u;
    // The two bits of the subset. First: the path bit two positions back. Second: the sum modulo 2 of the path bits at
    // this position, one back and three back.
    const Bits first = (path << 4) | (last >> 28);
    const Bits second = path ^ ((path << 2) | (last >> 30)) ^ ((path << 6) | (last >> 26));
    const Bits low = (first ^ sign) | ((second ^ sign) << 1);
    made.even = low & 0x33333333u;
    made.odd = (low >> 2) & 0x33333333u;
    if (BITS == 2) {
      made.even = made.even | ((word & 0x22222222u) << 1);
      made.odd = made.odd | ((word & 0x88888888u) >> 1);
    } else {
      made.even = made.even | ((word & 0x22222222u) << 2) | ((high & 0x11111111u) << 2);
      made.odd = made.odd | (word & 0x88888888u) | ((high & 0x22222222u) << 1);
    }
  }
  return made;
}

// The index of the code in field `field` of the word, in the low bits; the bits above it belong to other fields.
template <int BITS>
DEVICE_FN uint shifted_field(Indices<uint> word, uint field) {
  if (!Stored<BITS>::HAS_TRELLIS) return word.even >> (BITS * field);
  return (field % 2 == 0 ? word.even : word.odd) >> (field / 2 * 4);
}

// The index of the code in field `field` of the word, alone.
template <int BITS>
DEVICE_FN uint index_of_field(Indices<uint> word, uint field) {
  return shifted_field<BITS>(word, field) & (Stored<BITS>::LEVELS - 1u);
}

// ---- the path with the least squared error --------------------------------------------------------
//
// A state is the last three path bits; the latest is the lowest bit. State t is reached from state t / 2 through the
// subset c = entering_subset(t), and from state t / 2 + 4 through the subset c ^ 2. Each step stores its decisions as
// `choices`: bit t is set if state t comes from t / 2 + 4; bits 8 + 2 c and 9 + 2 c name the nearest member of subset c
// (sign, then high bit).

enum { TRELLIS_STATES = 8 };

template <typename Bits>
DEVICE_FN Bits entering_subset(Bits state) {
  return ((state >> 2) & 1u) | (((state ^ (state >> 1)) & 1u) << 1);
}

// Set the sums of all states for a path that begins in `state`.
template <typename Number, typename Bits>
DEVICE_FN void begin_path(Bits state, THREAD Number* sums) {  // sums: [TRELLIS_STATES]
  UNROLL
  for (uint t = 0; t < TRELLIS_STATES; ++t) sums[t] = state == t ? Number{} : Number{} + 1e30f;
}

// Return the nearest member of subset `c`, in its place in choices, and its cost. Every operation is rounded; no
// product and sum here can be contracted to an fma.
template <int BITS, typename Bits, typename Number>
DEVICE_FN Bits nearest_member(Number z, uint c, THREAD Number& cost) {
  Bits member = Bits{};
  // Members in the order (sign, high bit) = (0, 0), (0, 1), (1, 0), (1, 1); among equal costs the first wins.
  UNROLL
  for (uint m = 0; m < (1u << (BITS - 1)); ++m) {
    const uint sign = m >> (BITS - 2), high = BITS == 3 ? m & 1u : 0u;
    const uint magnitude = (c ^ (3u * sign)) + 4u * high;
    const float level = stored_level<BITS>(magnitude | (sign << BITS));
    const Number distance = (z - level) * (z - level);
    if (m == 0) {
      cost = distance;
    } else {
      member = distance < cost ? Bits{} + (sign | (high << 1)) : member;
      cost = distance < cost ? distance : cost;
    }
  }
  return member << (8 + 2 * c);
}

// Advance the sums by one position, and return the choices of that position.
template <int BITS, typename Bits, typename Number>
DEVICE_FN Bits extend_path(Number z, THREAD Number* sums) {  // sums: [TRELLIS_STATES]
  Number cost[4];
  Bits choices = Bits{};
  UNROLL
  for (uint c = 0; c < 4; ++c) choices = choices | nearest_member<BITS, Bits>(z, c, cost[c]);
  Number next[TRELLIS_STATES];
  UNROLL
  for (uint t = 0; t < TRELLIS_STATES; ++t) {
    const uint c = entering_subset(t);
    const Number first = sums[t / 2] + cost[c], second = sums[t / 2 + 4] + cost[c ^ 2u];
    choices = choices | (second < first ? Bits{} + (1u << t) : Bits{});
    next[t] = second < first ? second : first;
  }
  UNROLL
  for (uint t = 0; t < TRELLIS_STATES; ++t) sums[t] = next[t];
  return choices;
}

// The state in which the cheapest path ends.
template <typename Bits, typename Number>
DEVICE_FN Bits end_of_path(THREAD const Number* sums) {  // sums: [TRELLIS_STATES]
  Bits state = Bits{};
  Number least = sums[0];
  UNROLL
  for (uint t = 1; t < TRELLIS_STATES; ++t) {
    state = sums[t] < least ? Bits{} + t : state;
    least = sums[t] < least ? sums[t] : least;
  }
  return state;
}

// Trace one position back from `state`. Returns the byte of that position: the stored code in the low four bits, the
// index of its level from bit 4 on. `state` becomes the state before the position.
template <int BITS, typename Bits>
DEVICE_FN Bits step_back(Bits choices, THREAD Bits& state) {
  const Bits far = (choices >> state) & 1u;
  const Bits subset = entering_subset(state) ^ (far << 1);
  const Bits member = (choices >> (subset * 2u + 8u)) & 3u;
  const Bits sign = member & 1u, high = member >> 1;
  const Bits code = (state & 1u) | (member << 1);
  const Bits index = ((subset ^ (sign * 3u)) + (high << 2)) | (sign << BITS);
  state = (state >> 1) | (far << 2);
  return code | (index << 4);
}

// How many of SEQUENCES sequences of LENGTH numbers a threadgroup codes at once: as many as fit into BYTES, at most
// 128.
template <int LENGTH, int BYTES, int SEQUENCES>
struct Slice {
  enum {
    STRIDE = LENGTH + 1,  // odd, so that lanes at the same position of neighbouring sequences use different banks
    MOST = BYTES / 4 / STRIDE,
    COUNT = MOST >= 128 && SEQUENCES > 64 ? 128 : MOST >= 64 ? 64 : MOST >= 32 ? 32 : MOST >= 16 ? 16 : 8
  };
};
