// Rotations, codes, scales and words (docs/FORMAT.md, sections 3 to 6), in one text for every platform.
// A vocabulary header, levels.h and trellis.h precede this text.
//
// D is head_dim. LANES neighbouring lanes of a simdgroup share a row; each holds some of its channels in registers (see
// LaneRow). A lane holds ROWS rows at once, so that coefficients are read once for all of them. BACK selects the
// inverse.

// ---- blocks: what a stage does with the channels of one group ------------------------------------------

// A block in which each output channel is a weighted sum of the group's channels: channel r of the group becomes
// sum_m weight(r, m) x[r ^ m]. One definition thus serves a group in the registers of one lane and a group spread over
// neighbouring lanes, where one shuffle fetches x[r ^ m].
template <typename Block, int N>
struct Crossing {
  enum { RADIX = N };
  template <bool BACK>
  static DEVICE_FN void rotate(THREAD float* x, GLOBAL const float* coefficients) {
    float rotated[N];
    UNROLL
    for (uint r = 0; r < N; ++r) {
      rotated[r] = Block::template weight<BACK>(coefficients, r, 0) * x[r];
      UNROLL
      for (uint m = 1; m < N; ++m) {
        rotated[r] = fma(Block::template weight<BACK>(coefficients, r, m), x[r ^ m], rotated[r]);
      }
    }
    UNROLL
    for (uint r = 0; r < N; ++r) x[r] = rotated[r];
  }
};

// Bit 4 m + r of a table of signs, as a factor: 1 for a clear bit, -1 for a set bit.
DEVICE_FN float sign_at(uint table, uint r, uint m) {
  return (table >> (4 * m + r)) & 1u ? -1.0f : 1.0f;
}

// x -> R x, or R~ x with BACK: the one-sided product with a rotor (a, b, c, d). In the cascade all four are +1/2 or
// -1/2. The products are then exact, and the fused operations are additions with signs, which cost a GPU no more.
struct Left : Crossing<Left, 4> {
  enum { COEFFICIENTS = 4 };
  template <bool BACK>
  static DEVICE_FN float weight(GLOBAL const float* rotor, uint r, uint m) {
    return sign_at(BACK ? 0xAC60u : 0x5390u, r, m) * rotor[m];
  }
};

// The rotation of a plane by the angle with cosine and sine (c, s).
struct Plane : Crossing<Plane, 2> {
  enum { COEFFICIENTS = 2 };
  template <bool BACK>
  static DEVICE_FN float weight(GLOBAL const float* plane, uint r, uint m) {
    return sign_at(BACK ? 0x20u : 0x10u, r, m) * plane[m];
  }
};

// Walsh-Hadamard blocks, which are their own inverses, and the signs that precede them.
struct Walsh4 : Crossing<Walsh4, 4> {
  enum { COEFFICIENTS = 0 };
  template <bool BACK>
  static DEVICE_FN float weight(GLOBAL const float*, uint r, uint m) {
    return sign_at(0x0AC6u, r, m) * 0.5f;
  }
};
struct Walsh2 : Crossing<Walsh2, 2> {
  enum { COEFFICIENTS = 0 };
  template <bool BACK>
  static DEVICE_FN float weight(GLOBAL const float*, uint r, uint m) {
    return sign_at(0x02u, r, m) * 0.707106781f;
  }
};
struct Signs : Crossing<Signs, 1> {
  enum { COEFFICIENTS = 1 };
  template <bool BACK>
  static DEVICE_FN float weight(GLOBAL const float* sign, uint, uint) {
    return sign[0];
  }
};

// v -> R v R~, or R~ v R with BACK: the sandwich product with a rotor, as a 3 x 3 rotation.
struct Sandwich {
  enum { RADIX = 3, COEFFICIENTS = 4 };
  template <bool BACK>
  static DEVICE_FN void rotate(THREAD float* v, GLOBAL const float* rotor) {
    const float a = rotor[0];
    const float b = BACK ? -rotor[1] : rotor[1];
    const float c = BACK ? -rotor[2] : rotor[2];
    const float d = BACK ? -rotor[3] : rotor[3];
    const float aa = a * a, bb = b * b, cc = c * c, dd = d * d;
    const float ab = a * b, ac = a * c, ad = a * d, bc = b * c, bd = b * d, cd = c * d;
    const float x = v[0], y = v[1], z = v[2];
    v[0] = fma(aa - bb - cc + dd, x, 2.0f * fma(ab - cd, y, (ac + bd) * z));
    v[1] = fma(aa - bb + cc - dd, y, 2.0f * fma(-(ab + cd), x, (ad - bc) * z));
    v[2] = fma(aa + bb - cc - dd, z, 2.0f * fma(bd - ac, x, -(ad + bc) * y));
  }
};

// diag(t) E diag(t), with signs t and the odd block E = SUM J + SELF I, where J is the matrix of ones.
struct Odd3 {
  enum { RADIX = 3, COEFFICIENTS = 3 };
  template <bool BACK>
  static DEVICE_FN void rotate(THREAD float* x, GLOBAL const float* signs) {
    const float sum = 0.666666667f * fma(signs[0], x[0], fma(signs[1], x[1], signs[2] * x[2]));
    UNROLL
    for (uint i = 0; i < RADIX; ++i) x[i] = fma(signs[i], sum, -x[i]);
  }
};
struct Odd5 {
  enum { RADIX = 5, COEFFICIENTS = 5 };
  template <bool BACK>
  static DEVICE_FN void rotate(THREAD float* x, GLOBAL const float* signs) {
    float sum = 0.0f;
    UNROLL
    for (uint i = 0; i < RADIX; ++i) sum = fma(signs[i], x[i], sum);
    UNROLL
    for (uint i = 0; i < RADIX; ++i) x[i] = fma(signs[i], -0.4f * sum, x[i]);
  }
};

// The same with a block of two values: X where (j - i) mod 7 is 1, 2 or 4, Y elsewhere. The inverse is the transpose.
struct Odd7 {
  enum { RADIX = 7, COEFFICIENTS = 7 };
  template <bool BACK>
  static DEVICE_FN void rotate(THREAD float* x, GLOBAL const float* signs) {
    const float y = 0.445902914f;
    const float x_minus_y = -0.707106781f;
    float signed_x[RADIX];
    float sum = 0.0f;
    UNROLL
    for (uint i = 0; i < RADIX; ++i) {
      signed_x[i] = signs[i] * x[i];
      sum += signed_x[i];
    }
    UNROLL
    for (uint i = 0; i < RADIX; ++i) {
      const uint j = BACK ? i + RADIX - 1 : i + 1;
      const uint k = BACK ? i + RADIX - 2 : i + 2;
      const uint l = BACK ? i + RADIX - 4 : i + 4;
      const float residues = signed_x[j % RADIX] + signed_x[k % RADIX] + signed_x[l % RADIX];
      x[i] = signs[i] * fma(y, sum, x_minus_y * residues);
    }
  }
};

// ---- rows in registers ----------------------------------------------------------------------------------

// The channels of a lane: HELD neighbouring channels, then HELD more, LANES * HELD channels further on, and so on.
template <int D, int LANES, int HELD>
struct LaneRow {
  enum { CHANNELS = HELD * ((D + LANES * HELD - 1) / (LANES * HELD)) };
  static DEVICE_FN uint channel(uint lane, uint p) {
    return (p / HELD * LANES + lane) * HELD + p % HELD;
  }
  // If the lanes have room for more than D channels, the channels from D on do not exist.
  static DEVICE_FN bool exists(uint channel) {
    return D % (LANES * HELD) == 0 || channel < D;
  }
};

// A stage whose groups are spread over lanes: a group is RADIX lanes, STRIDE apart, one channel each.
template <typename Block, int D, int LANES, int ROWS, int STRIDE, bool BACK>
DEVICE_FN void rotate_across_lanes(
    THREAD float* rows,  // [ROWS][D / LANES]
    GLOBAL const float* coefficients, uint lane) {
  enum { RADIX = Block::RADIX, CHANNELS = D / LANES };
  const uint place = lane / STRIDE % RADIX;
  UNROLL
  for (uint p = 0; p < CHANNELS; ++p) {
    const uint c = lane + p * LANES;
    const uint group = c / (RADIX * STRIDE) * STRIDE + c % STRIDE;
    float weights[RADIX];
    UNROLL
    for (uint m = 0; m < RADIX; ++m) {
      weights[m] =
          Block::template weight<BACK>(coefficients + group * Block::COEFFICIENTS, place, m);
    }
    UNROLL
    for (uint row = 0; row < ROWS; ++row) {
      const float x = rows[row * CHANNELS + p];
      float rotated = weights[0] * x;
      UNROLL
      for (uint m = 1; m < RADIX; ++m) {
        rotated = fma(weights[m], shuffle_xor(x, ushort(m * STRIDE)), rotated);
      }
      rows[row * CHANNELS + p] = rotated;
    }
  }
}

// One group in registers, for each of ROWS rows: RADIX numbers, STEP apart, the first at `first`; rows are CHANNELS
// apart.
template <typename Block, int CHANNELS, int ROWS, int STEP, bool BACK>
DEVICE_FN void rotate_group(THREAD float* first, GLOBAL const float* coefficients) {
  enum { RADIX = Block::RADIX };
  UNROLL
  for (uint row = 0; row < ROWS; ++row) {
    THREAD float* of_row = first + row * CHANNELS;
    float x[RADIX];
    UNROLL
    for (uint r = 0; r < RADIX; ++r) x[r] = of_row[r * STEP];
    Block::template rotate<BACK>(x, coefficients);
    UNROLL
    for (uint r = 0; r < RADIX; ++r) of_row[r * STEP] = x[r];
  }
}

// A stage whose groups are each in the registers of one lane, with members STRIDE / LANES registers apart.
template <typename Block, int D, int LANES, int ROWS, int STRIDE, bool BACK>
DEVICE_FN void rotate_in_lanes(
    THREAD float* rows,  // [ROWS][D / LANES]
    GLOBAL const float* coefficients, uint lane) {
  enum { RADIX = Block::RADIX, CHANNELS = D / LANES, STEP = STRIDE / LANES };
  UNROLL
  for (uint g = 0; g < CHANNELS / RADIX; ++g) {
    rotate_group<Block, CHANNELS, ROWS, STEP, BACK>(
        rows + g / STEP * (RADIX * STEP) + g % STEP, coefficients + (g * LANES + lane) * Block::COEFFICIENTS);
  }
}

// A stage whose groups are each in one lane, where lane l of LANES holds the HELD neighbouring channels from l * HELD
// on.
template <typename Block, int D, int LANES, int HELD, int ROWS, int STRIDE, bool BACK>
DEVICE_FN void rotate_neighbours(
    THREAD float* rows,  // [ROWS][HELD]
    GLOBAL const float* coefficients, uint lane) {
  enum { RADIX = Block::RADIX, GROUPS = HELD / RADIX };
  UNROLL
  for (uint g = 0; g < GROUPS; ++g) {
    const uint start = g / STRIDE * (RADIX * STRIDE) + g % STRIDE;
    if (LANES * HELD == D || lane * HELD + start < D) {
      rotate_group<Block, HELD, ROWS, STRIDE, BACK>(
          rows + start, coefficients + (lane * GROUPS + g) * Block::COEFFICIENTS);
    }
  }
}

// A stage of GROUPS groups of HELD neighbouring channels, from channel FIRST * HELD on; each group is in one lane.
template <typename Block, int CHANNELS, int LANES, int HELD, int ROWS, int FIRST, int GROUPS, bool BACK>
DEVICE_FN void rotate_held(
    THREAD float* rows,  // [ROWS][CHANNELS]
    GLOBAL const float* coefficients, uint lane) {
  UNROLL
  for (uint p = 0; p < CHANNELS / HELD; ++p) {
    const uint place = p * LANES + lane;
    if (place >= FIRST && place < FIRST + GROUPS) {
      UNROLL
      for (uint row = 0; row < ROWS; ++row) {
        Block::template rotate<BACK>(
            rows + row * CHANNELS + p * HELD, coefficients + (place - FIRST) * Block::COEFFICIENTS);
      }
    }
  }
}

// The whole rotation as a matrix product: rows times `matrix` [D, D], of which each entry is read once for all ROWS.
template <int D, int LANES, int ROWS>
DEVICE_FN void rotate_by_matrix(
    THREAD float* rows,  // [ROWS][D / LANES]
    GLOBAL const float* matrix, uint lane) {
  enum { CHANNELS = D / LANES };
  float sums[ROWS * CHANNELS];
  UNROLL
  for (uint i = 0; i < ROWS * CHANNELS; ++i) sums[i] = 0.0f;
  UNROLL
  for (uint p = 0; p < CHANNELS; ++p) {
    for (uint m = 0; m < LANES; ++m) {
      GLOBAL const float* entries = matrix + (p * LANES + (lane ^ m)) * D + lane;
      UNROLL
      for (uint row = 0; row < ROWS; ++row) {
        const float x = shuffle_xor(rows[row * CHANNELS + p], ushort(m));
        UNROLL
        for (uint q = 0; q < CHANNELS; ++q) {
          sums[row * CHANNELS + q] = fma(x, entries[q * LANES], sums[row * CHANNELS + q]);
        }
      }
    }
  }
  UNROLL
  for (uint i = 0; i < ROWS * CHANNELS; ++i) rows[i] = sums[i];
}

// The sum of x over the lanes of a row. All lanes get the same number, added in the same order on every platform.
template <int LANES>
DEVICE_FN float lane_sum(float x) {
  for (ushort mask = LANES / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// The bitwise or of `bits` over the lanes of a row.
template <int LANES>
DEVICE_FN uint lane_any(uint bits) {
  for (ushort mask = LANES / 2; mask > 0; mask /= 2) bits |= shuffle_xor(bits, mask);
  return bits;
}

// ---- codes, levels, scales ------------------------------------------------------------------------

// Tests the bits, because fast math may assume that every float is finite.
DEVICE_FN bool is_finite(float x) {
  return (bits_of_float(x) & 0x7f800000u) != 0x7f800000u;
}

// Levels that are computed but index like a table: by a nearest-level code, or by an index of a stored code.
template <int BITS>
struct NearestLevels {
  DEVICE_FN float operator[](uint code) const { return level_of_code<BITS>(code); }
};
template <int BITS>
struct StoredLevels {
  DEVICE_FN float operator[](uint index) const { return stored_level<BITS>(index); }
};

// The index of the magnitude nearest to |z| = size: the number of boundaries that are at most |z|. `boundaries` holds
// 2^(BITS - 1) - 1 of them. A tie goes to the larger magnitude.
template <int BITS, typename Table>
DEVICE_FN uint index_of_size(float size, Table boundaries) {
  uint index = 0;
  if (BITS <= 4) {
    // The boundaries still to compare, in registers. They start as constants.
    float left[7];
    UNROLL
    for (uint i = 0; i < (1u << (BITS - 1)) - 1u; ++i) left[i] = boundaries[i];
    UNROLL
    for (uint step = 1u << (BITS - 2); step > 0; step /= 2) {
      const bool above = size >= left[step - 1];
      index += above ? step : 0u;
      UNROLL
      for (uint i = 0; i + 1 < step; ++i) left[i] = above ? left[i + step] : left[i];
    }
  } else {
    for (uint step = 1u << (BITS - 2); step > 0; step /= 2) {
      if (size >= boundaries[index + step - 1]) index += step;
    }
  }
  return index;
}

// The code of the nearest level. Zero of either sign and NaN get code 0.
template <int BITS, typename Table>
DEVICE_FN uint nearest_code(float z, Table boundaries) {
  const uint index = index_of_size<BITS>(fabs(z), boundaries);
  return z < 0.0f ? index | (1u << (BITS - 1)) : index;
}

// |w| / sqrt(D) as float16. A row for which this is 0, infinite or NaN is special: it is coded as zeros.
template <int D>
DEVICE_FN half size_of_row(float norm) {
  return half(norm / sqrt(float(D)));
}

// The stored scale of a row w with levels l: shrink <w, w> / <l, w>. `along` is <l, z>; it is taken as at least D / 2,
// so that a scale is at most twice |w| / sqrt(D).
template <int D>
DEVICE_FN half stored_scale(float norm, float along, float shrink) {
  const float size = float(size_of_row<D>(norm)), least = 0.5f * float(D);
  const float scale = norm * (shrink * sqrt(float(D))) / (along > least ? along : least);
  if (size == 0.0f) return half(0.0f);
  return is_finite(size) && scale < 65520.0f ? half(scale) : half_of_bits(0x7e00);
}

// Divide a row w by |w| / sqrt(D), or set a special row to zeros. Returns |w|, the same in all lanes.
template <int D, int LANES, int HELD>
DEVICE_FN float to_unit_variance(THREAD float* row) {
  enum { CHANNELS = LaneRow<D, LANES, HELD>::CHANNELS };
  float square_sum = 0.0f;
  UNROLL
  for (uint p = 0; p < CHANNELS; ++p) square_sum = fma(row[p], row[p], square_sum);
  const float norm = sqrt(lane_sum<LANES>(square_sum));
  const float size = float(size_of_row<D>(norm)), factor = sqrt(float(D)) / norm;
  const bool special = size == 0.0f || !is_finite(size);
  UNROLL
  for (uint p = 0; p < CHANNELS; ++p) row[p] = special ? 0.0f : row[p] * factor;
  return norm;
}

// Round a row to its nearest levels. code[p] is the code of channel p of this lane, 0 where the channel does not exist.
// Returns the scale, the same in all lanes. The row's numbers become z. `levels` gives the level of each code.
template <int BITS, int D, int LANES, int HELD, typename Table, typename Levels>
DEVICE_FN half encode_row(THREAD float* row, THREAD uint* code, Table boundaries, Levels levels, float shrink) {
  const float norm = to_unit_variance<D, LANES, HELD>(row);
  float along = 0.0f;
  UNROLL
  for (uint p = 0; p < LaneRow<D, LANES, HELD>::CHANNELS; ++p) {
    code[p] = nearest_code<BITS>(row[p], boundaries);
    along = fma(levels[code[p]], row[p], along);
  }
  return stored_scale<D>(norm, lane_sum<LANES>(along), shrink);
}

// ---- the cheapest path of a trellis, found by two neighbouring lanes ---------------------------------
//
// Lane `side`, 0 or 1, holds states 4 side to 4 side + 3. Only the subsets side and side + 2 (modulo 4) lead there. The
// lane's state at place i is state_at(i, side). In this order each lane keeps its places 0 and 1, and sends places 2
// and 3 to the other lane, for the states there that have the same successors.

enum { HALF_STATES = TRELLIS_STATES / 2 };

DEVICE_FN uint state_at(uint i, uint side) { return (i ^ (i >> 1)) ^ (7u * side); }

DEVICE_FN void begin_half_path(uint state, THREAD float* sums, uint side) {  // sums: [HALF_STATES]
  UNROLL
  for (uint i = 0; i < HALF_STATES; ++i) sums[i] = state == state_at(i, side) ? 0.0f : 1e30f;
}

// Advance by one position, as extend_path does: update the sums of the lane's states, and return its part of the
// choices.
template <int BITS>
DEVICE_FN uint extend_half_path(float z, THREAD float* sums, uint side) {  // sums: [HALF_STATES]
  const float got[2] = {shuffle_xor(sums[2], ushort(1)), shuffle_xor(sums[3], ushort(1))};
  float cost[2];  // of the subset that leads from what the lane keeps to place 0, and of the other subset
  uint choices = nearest_member<BITS, uint>(z, 3u * side, cost[0]);
  choices |= nearest_member<BITS, uint>(z, 2u - side, cost[1]);
  // Of the two preceding states, lane 0 keeps t / 2 and lane 1 keeps t / 2 + 4. So lane 1 starts with all bits set.
  choices |= 0xF0u * side;
  const float kept[2] = {sums[0], sums[1]};
  UNROLL
  for (uint i = 0; i < HALF_STATES; ++i) {
    const float here = kept[i / 2] + cost[i % 2], there = got[i / 2] + cost[1 - i % 2];
    // Negative as an int if the path comes from the other lane: bit patterns of positive floats order as the floats do,
    // and among equal sums t / 2 wins.
    const uint difference = bits_of_float(there) - bits_of_float(here) - side;
    choices ^= uint(int(difference) >> 31) & (1u << state_at(i, side));
    sums[i] = min(here, there);
  }
  return choices;
}

// The state in which the cheapest path ends; both lanes get it.
DEVICE_FN uint end_of_half_paths(THREAD const float* sums, uint side) {  // sums: [HALF_STATES]
  float all[TRELLIS_STATES];
  UNROLL
  for (uint i = 0; i < HALF_STATES; ++i) {
    const float theirs = shuffle_xor(sums[i], ushort(1));
    all[state_at(i, 0)] = side == 0 ? sums[i] : theirs;
    all[state_at(i, 1)] = side == 0 ? theirs : sums[i];
  }
  return end_of_path<uint>(all);
}

// Code one sequence from position `start` on, with lanes 2 n and 2 n + 1. All lanes of a warp must call it; those
// without a sequence pass `is_one` false. numbers: z as bits, [LENGTH], with LENGTH even; the choices replace them.
// codes: bytes as step_back returns them, `step` apart; those before `start` become 0.
template <int BITS, int LENGTH>
DEVICE_FN void encode_sequence(
    THREADGROUP uint* numbers, THREADGROUP uchar* codes, uint step, uint start, uint state, uint side, bool is_one) {
  float sums[HALF_STATES];
  begin_half_path(state, sums, side);
  // Two positions at a time; each lane stores the choices of one of them.
  for (uint i = start & ~1u; i < LENGTH; i += 2) {
    const float z = is_one ? float_of_bits(numbers[i]) : 0.0f;
    const float next = is_one ? float_of_bits(numbers[i + 1]) : 0.0f;
    const uint even = extend_half_path<BITS>(z, sums, side);
    if (i < start) begin_half_path(state, sums, side);
    const uint odd = extend_half_path<BITS>(next, sums, side);
    const uint choices = (side == 0 ? even : odd) | shuffle_xor(side == 0 ? odd : even, ushort(1));
    MEET_LANES();  // both have read what is replaced
    if (is_one) numbers[i + side] = choices;
  }
  uint at = end_of_half_paths(sums, side);
  MEET_LANES();  // the choices are there
  if (!is_one || side != 0) return;
  for (uint i = LENGTH; i > start; --i) {
    codes[(i - 1) * step] = uchar(step_back<BITS>(numbers[i - 1], at));
  }
  for (uint i = 0; i < start; ++i) codes[i * step] = 0;
}

// ---- blocks of codes -------------------------------------------------------------------------------

// The codes of a block of TOKENS rows, which THREADS threads hold in registers, LANES per row. They are gathered as
// bytes in `codes` [TOKENS][CODE_STRIDE]; a trellis code is in the low four bits of its byte. MEMORY is the number of
// bytes for `codes` and `numbers` together.
template <int BITS, bool KEY, int D, int LANES, int HELD, int TOKENS, int THREADS, int MEMORY>
struct BlockEncoder {
  using Channels = LaneRow<D, LANES, HELD>;
  enum {
    CHANNELS = Channels::CHANNELS,
    WORKERS = THREADS / LANES,
    ROWS = TOKENS / WORKERS,  // rows of a lane: every WORKERS-th
    // Four bytes more than a row, so that lanes that read the same channel of neighbouring tokens use different banks.
    CODE_STRIDE = D + 4,
    // Sequences run along the packed axis; there is one per lane of words.
    SEQUENCES = KEY ? TOKENS : D,
    LENGTH = KEY ? D : TOKENS,
    SEQUENCE_STEP = KEY ? CODE_STRIDE : 1,
    POSITION_STEP = KEY ? 1 : CODE_STRIDE,
    SLICE = Slice<LENGTH, MEMORY - TOKENS * CODE_STRIDE, SEQUENCES>::COUNT,
    STRIDE = Slice<LENGTH, 0, SEQUENCES>::STRIDE,
    NUMBERS = Stored<BITS>::HAS_TRELLIS ? SLICE * STRIDE : 1
  };

  // Nearest-level codes. `levels` gives the level of each code. A barrier must follow.
  template <typename Table, typename Levels>
  static DEVICE_FN void round(
      THREAD float* rows, THREAD half* scales, THREADGROUP uchar* codes, uint thread_index, Table boundaries,
      Levels levels) {
    const uint worker = thread_index / LANES, lane = thread_index % LANES;
    UNROLL
    for (uint r = 0; r < ROWS; ++r) {
      uint code[CHANNELS];
      scales[r] = encode_row<BITS, D, LANES, HELD>(
          rows + r * CHANNELS, code, boundaries, levels, KEY ? 1.0f : value_shrink(BITS));
      UNROLL
      for (uint p = 0; p < CHANNELS; ++p) {
        const uint c = Channels::channel(lane, p);
        if (Channels::exists(c)) codes[(worker + r * WORKERS) * CODE_STRIDE + c] = uchar(code[p]);
      }
    }
  }

  // Trellis codes: a slice of the sequences at a time is gathered in `numbers`, and two lanes code each sequence.
  // `state`: the trellis state of each sequence behind the positions before `start`, `state_stride` apart; null stands
  // for state 0. `levels` gives the level of each index. No barrier needs to follow.
  template <typename Levels>
  static DEVICE_FN void find_paths(
      THREAD float* rows, THREAD half* scales, THREADGROUP uchar* codes, THREADGROUP uint* numbers, uint thread_index,
      uint start, GLOBAL const uint* state, long state_stride, Levels levels) {
    const uint worker = thread_index / LANES, lane = thread_index % LANES;
    float norms[ROWS];
    UNROLL
    for (uint r = 0; r < ROWS; ++r) norms[r] = to_unit_variance<D, LANES, HELD>(rows + r * CHANNELS);
    for (uint first = 0; first < SEQUENCES; first += SLICE) {
      MEET();  // no numbers are in use
      UNROLL
      for (uint r = 0; r < ROWS; ++r) {
        UNROLL
        for (uint p = 0; p < CHANNELS; ++p) {
          const uint c = Channels::channel(lane, p), token = worker + r * WORKERS;
          const uint sequence = KEY ? token : c, position = KEY ? c : token;
          if (Channels::exists(c) && sequence >= first && sequence < first + SLICE) {
            numbers[(sequence - first) * STRIDE + position] = bits_of_float(rows[r * CHANNELS + p]);
          }
        }
      }
      MEET();  // the numbers are there
      const uint place = thread_index / 2, sequence = first + place;
      // Whole warps enter encode_sequence, because their lanes meet in it.
      const bool is_one = (SLICE % 16 == 0 && SEQUENCES % 16 == 0) || (place < SLICE && sequence < SEQUENCES);
      if (thread_index / 32 * 16 < SLICE && first + thread_index / 32 * 16 < SEQUENCES) {
        encode_sequence<BITS, LENGTH>(
            numbers + place * STRIDE, codes + sequence * SEQUENCE_STEP, POSITION_STEP, start,
            is_one && state != nullptr ? state[sequence * state_stride] : 0, thread_index % 2, is_one);
      }
    }
    MEET();  // the codes are there
    UNROLL
    for (uint r = 0; r < ROWS; ++r) {
      float along = 0.0f;
      UNROLL
      for (uint p = 0; p < CHANNELS; ++p) {
        const uint c = Channels::channel(lane, p);
        if (Channels::exists(c)) {
          const uint index = codes[(worker + r * WORKERS) * CODE_STRIDE + c] >> 4;
          along = fma(levels[index], rows[r * CHANNELS + p], along);
        }
      }
      scales[r] = stored_scale<D>(norms[r], lane_sum<LANES>(along), KEY ? 1.0f : value_shrink(BITS));
    }
  }
};

// ---- words ----------------------------------------------------------------------------------------

// The word in row `row` of one lane, whose COUNT codes are `step` apart.
template <int BITS, int COUNT>
DEVICE_FN uint packed_word(THREADGROUP const uchar* codes, uint step, uint row) {
  enum { FIELD = Planes<BITS>::FIRST, FIRST_ROWS = WordRows<BITS, COUNT>::FIRST };
  uint word = 0;
  if (BITS == 3 && row >= FIRST_ROWS) {
    // The second plane: the high bits of the codes, in the order of docs/FORMAT.md.
    const uint i = (row - FIRST_ROWS) * 32;
    for (uint f = 0; f < 32 && i + f < COUNT; ++f) {
      word |= ((uint(codes[(i + f) * step]) >> 2) & 1u) << (f % 16 / 2 * 4 + f / 16 * 2 + f % 2);
    }
    return word;
  }
  const uint i = row * (32 / FIELD);
  for (uint f = 0; f < 32 / FIELD && i + f < COUNT; ++f) {
    word |= (uint(codes[(i + f) * step]) & ((1u << FIELD) - 1)) << (f * FIELD);
  }
  return word;
}

// The level at position i of the packed axis of one lane, whose words are `row_stride` apart; COUNT codes in all.
template <int BITS, int COUNT>
DEVICE_FN float level_at(GLOBAL const uint* words, long row_stride, uint i) {
  const uint row = i / Word<BITS>::codes;
  uint before = 0, high = 0;
  if (Stored<BITS>::HAS_TRELLIS && row > 0) before = words[(row - 1) * row_stride];
  if (Planes<BITS>::SECOND > 0) {
    high = words[(WordRows<BITS, COUNT>::FIRST + row / 2) * row_stride] >> (row % 2 * 2);
  }
  const Indices<uint> indices = indices_of<BITS>(words[row * row_stride], before, high);
  return stored_level<BITS>(index_of_field<BITS>(indices, i % Word<BITS>::codes));
}
