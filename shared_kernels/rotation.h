// Rotations, nearest levels, scales and words (docs/FORMAT.md, sections 3 to 6), once for every platform.
// In front of this text stand a vocabulary header and levels.h.
//
// D head_dim. A row is worked on by LANES neighbouring lanes of one simdgroup, 32 or 16; lane l of them has the
// channels l, l + LANES, ... BACK asks for the inverse.

// ---- blocks: what a stage does with the channels of one group, in registers -----------------------

// x -> R x, or R~ x: the one-sided product with a rotor (a, b, c, d). In the cascade all four are +1/2 or -1/2:
// products are then exact, and these are additions with signs, at the price that a GPU takes for additions.
struct Left {
  enum { RADIX = 4, COEFFICIENTS = 4 };
  template <bool BACK>
  static DEVICE_FN void turn(THREAD float* x, GLOBAL const float* rotor) {
    const float a = rotor[0];
    const float b = BACK ? -rotor[1] : rotor[1];
    const float c = BACK ? -rotor[2] : rotor[2];
    const float d = BACK ? -rotor[3] : rotor[3];
    const float x0 = x[0], x1 = x[1], x2 = x[2], x3 = x[3];
    x[0] = fma(a, x0, -fma(b, x1, fma(c, x2, d * x3)));
    x[1] = fma(b, x0, fma(a, x1, fma(d, x2, -c * x3)));
    x[2] = fma(c, x0, fma(a, x2, fma(b, x3, -d * x1)));
    x[3] = fma(d, x0, fma(c, x1, fma(a, x3, -b * x2)));
  }
};

// v -> R v R~, or R~ v R: the sandwich of a rotor as a 3 x 3 rotation.
struct Sandwich {
  enum { RADIX = 3, COEFFICIENTS = 4 };
  template <bool BACK>
  static DEVICE_FN void turn(THREAD float* v, GLOBAL const float* rotor) {
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

// A turn of the plane by the angle with cosine and sine (c, s).
struct Plane {
  enum { RADIX = 2, COEFFICIENTS = 2 };
  template <bool BACK>
  static DEVICE_FN void turn(THREAD float* x, GLOBAL const float* plane) {
    const float c = plane[0];
    const float s = BACK ? -plane[1] : plane[1];
    const float x0 = x[0], x1 = x[1];
    x[0] = fma(c, x0, -s * x1);
    x[1] = fma(s, x0, c * x1);
  }
};

// diag(t) E diag(t) with signs t and the odd block E = SUM J + SELF I; J is all ones.
struct Odd3 {
  enum { RADIX = 3, COEFFICIENTS = 3 };
  template <bool BACK>
  static DEVICE_FN void turn(THREAD float* x, GLOBAL const float* signs) {
    const float sum = 0.666666667f * fma(signs[0], x[0], fma(signs[1], x[1], signs[2] * x[2]));
    for (uint i = 0; i < RADIX; ++i) x[i] = fma(signs[i], sum, -x[i]);
  }
};
struct Odd5 {
  enum { RADIX = 5, COEFFICIENTS = 5 };
  template <bool BACK>
  static DEVICE_FN void turn(THREAD float* x, GLOBAL const float* signs) {
    float sum = 0.0f;
    for (uint i = 0; i < RADIX; ++i) sum = fma(signs[i], x[i], sum);
    for (uint i = 0; i < RADIX; ++i) x[i] = fma(signs[i], -0.4f * sum, x[i]);
  }
};

// The same with the block of two values: Y, and X where (j - i) mod 7 is 1, 2 or 4. The inverse is the transpose.
struct Odd7 {
  enum { RADIX = 7, COEFFICIENTS = 7 };
  template <bool BACK>
  static DEVICE_FN void turn(THREAD float* x, GLOBAL const float* signs) {
    const float y = 0.445902914f;
    const float x_minus_y = -0.707106781f;
    float signed_x[RADIX];
    float sum = 0.0f;
    for (uint i = 0; i < RADIX; ++i) {
      signed_x[i] = signs[i] * x[i];
      sum += signed_x[i];
    }
    for (uint i = 0; i < RADIX; ++i) {
      const uint j = BACK ? i + RADIX - 1 : i + 1;
      const uint k = BACK ? i + RADIX - 2 : i + 2;
      const uint l = BACK ? i + RADIX - 4 : i + 4;
      const float residues = signed_x[j % RADIX] + signed_x[k % RADIX] + signed_x[l % RADIX];
      x[i] = signs[i] * fma(y, sum, x_minus_y * residues);
    }
  }
};

// Walsh-Hadamard blocks, their own inverses, and the signs in front of them.
struct Walsh4 {
  enum { RADIX = 4, COEFFICIENTS = 0 };
  template <bool BACK>
  static DEVICE_FN void turn(THREAD float* x, GLOBAL const float*) {
    const float s = x[0] + x[1], d = x[0] - x[1], t = x[2] + x[3], e = x[2] - x[3];
    x[0] = 0.5f * (s + t);
    x[1] = 0.5f * (d + e);
    x[2] = 0.5f * (s - t);
    x[3] = 0.5f * (d - e);
  }
};
struct Walsh2 {
  enum { RADIX = 2, COEFFICIENTS = 0 };
  template <bool BACK>
  static DEVICE_FN void turn(THREAD float* x, GLOBAL const float*) {
    const float q = 0.707106781f;
    const float sum = x[0] + x[1];
    x[1] = q * (x[0] - x[1]);
    x[0] = q * sum;
  }
};
struct Signs {
  enum { RADIX = 1, COEFFICIENTS = 1 };
  template <bool BACK>
  static DEVICE_FN void turn(THREAD float* x, GLOBAL const float* sign) {
    x[0] *= sign[0];
  }
};

// ---- a row in threadgroup memory ------------------------------------------------------------------

// One stage, in place. A lane takes whole groups, so no two lanes touch the same channel; the barrier hands the
// channels to the groups of the next stage.
template <typename Block, int LANES, int START, int STRIDE, int OUTER, bool BACK>
DEVICE_FN void turn_stage(THREADGROUP float* row, GLOBAL const float* coefficients, uint lane) {
  for (uint g = lane; g < OUTER * STRIDE; g += LANES) {
    THREADGROUP float* first = row + START + g / STRIDE * (Block::RADIX * STRIDE) + g % STRIDE;
    float x[Block::RADIX];
    for (uint r = 0; r < Block::RADIX; ++r) x[r] = first[r * STRIDE];
    Block::template turn<BACK>(x, coefficients + g * Block::COEFFICIENTS);
    for (uint r = 0; r < Block::RADIX; ++r) first[r * STRIDE] = x[r];
  }
  lane_barrier();
}

// The whole rotation as a product, in place: row times `matrix`, [D, D]. A lane writes its own channels, which nobody
// else reads without a barrier of his own.
template <int LANES, int D>
DEVICE_FN void turn_by_matrix(THREADGROUP float* row, GLOBAL const float* matrix, uint lane) {
  float sums[(D + LANES - 1) / LANES];
  for (uint c = lane, p = 0; c < D; c += LANES, ++p) {
    sums[p] = 0.0f;
    for (uint i = 0; i < D; ++i) sums[p] = fma(row[i], matrix[i * D + c], sums[p]);
  }
  lane_barrier();
  for (uint c = lane, p = 0; c < D; c += LANES, ++p) row[c] = sums[p];
}

// The sum over the lanes of a row; the order is the same everywhere, and all lanes get the same number.
template <int LANES>
DEVICE_FN float lane_sum(float x) {
  for (ushort mask = LANES / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// Whether any lane of a row says so.
template <int LANES>
DEVICE_FN bool lane_any(bool x) {
  uint any = x;
  for (ushort mask = LANES / 2; mask > 0; mask /= 2) any |= shuffle_xor(any, mask);
  return any != 0;
}

// ---- codes, levels, scales ------------------------------------------------------------------------

// By its bits, so that no fast mathematics can assume it away.
DEVICE_FN bool is_finite(float x) {
  return (bits_of_float(x) & 0x7f800000u) != 0x7f800000u;
}

// The code of the nearest level. The index of the magnitude counts the boundaries up to |z|, from a table of
// 2^(BITS - 1) - 1: a tie goes to the larger magnitude. Either zero, and a NaN, get code 0.
template <int BITS, typename Table>
DEVICE_FN uint nearest_code(float z, Table boundaries) {
  const float size = fabs(z);
  uint index = 0;
  for (uint step = 1u << (BITS - 2); step > 0; step /= 2) {
    if (size >= boundaries[index + step - 1]) index += step;
  }
  return z < 0.0f ? index | (1u << (BITS - 1)) : index;
}

// What is stored for the least-squares scale <l, w> / <l, l> of a row w with levels l: a NaN where the row is not
// finite or the scale too large for float16. A square sum beyond float32 is such a row: its scale is above 1e17.
DEVICE_FN half stored_scale(float square_sum, float level_row, float level_level) {
  const float scale = level_row / level_level;
  const bool fits = is_finite(square_sum) && fabs(scale) < 65520.0f;
  return fits ? half(scale) : half_of_bits(0x7e00);
}

// Whether the codes of a row count: all are stored as 0 where its scale is zero or a NaN.
DEVICE_FN bool has_codes(half scale) {
  return fabs(float(scale)) > 0.0f;
}

// ---- words ----------------------------------------------------------------------------------------

// The bits of a code in its one or two planes.
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

// The bits SHIFT to SHIFT + FIELD - 1 of `codes[0]`, `codes[step]`, ..., of `count` codes at most, as one word.
template <int FIELD, int SHIFT>
DEVICE_FN uint packed_fields(THREADGROUP const uchar* codes, uint step, uint count) {
  uint word = 0;
  for (uint f = 0; f < 32 / FIELD && f < count; ++f) {
    word |= ((uint(codes[f * step]) >> SHIFT) & ((1u << FIELD) - 1)) << (f * FIELD);
  }
  return word;
}

// Row `row` of the words of one lane, whose COUNT codes lie `step` apart.
template <int BITS, int COUNT>
DEVICE_FN uint packed_word(THREADGROUP const uchar* codes, uint step, uint row) {
  enum { FIRST = Planes<BITS>::FIRST, SECOND = Planes<BITS>::SECOND };
  const uint first_rows = WordRows<BITS, COUNT>::FIRST;
  if (SECOND == 0 || row < first_rows) {
    const uint i = row * (32 / FIRST);
    return packed_fields<FIRST, 0>(codes + i * step, step, COUNT - i);
  }
  // Without a second plane this line is never reached; the field then only has to be valid.
  enum { FIELD = SECOND == 0 ? 1 : SECOND };
  const uint i = (row - first_rows) * (32 / FIELD);
  return packed_fields<FIELD, FIRST>(codes + i * step, step, COUNT - i);
}

// The code at position i of the packed axis of one lane, whose words lie `row_stride` apart; COUNT as above.
template <int BITS, int COUNT>
DEVICE_FN uint code_at(GLOBAL const uint* words, long row_stride, uint i) {
  const uint word = words[i / Word<BITS>::codes * row_stride];
  uint signs = 0;
  if (Planes<BITS>::SECOND > 0) {
    // A word of signs serves the fields of two words of magnitudes.
    const uint row = WordRows<BITS, COUNT>::FIRST + i / 32;
    signs = words[row * row_stride] >> (i & Word<BITS>::codes);
  }
  return code_of_field<BITS>(word, signs, i % Word<BITS>::codes);
}
