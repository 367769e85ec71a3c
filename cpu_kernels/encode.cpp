// Rows to packed blocks and back (docs/FORMAT.md, sections 5 and 6), one block a task.
//
// A block is transposed so that a lane is a token: every row is then computed in the same way whatever the width of a
// vector, and sums go over channels. Compiled without contraction to fused multiply-adds, so that all variants, and
// the operations of mlx_ops.py, come to the same bits.

#include "rows.h"

namespace {

using rotormlx::Blocks;
using rotormlx::Codec;

enum { GROUPS = BLOCK / LANES };  // vectors of the tokens of a block

template <int BITS>
constexpr int PLANE_BITS = BITS == 3 ? 2 : BITS;

INLINE bool is_finite(float x) { return (bits_of_float(x) & 0x7f800000u) != 0x7f800000u; }

// Sums over channels of x [dim][64], in place: halves are added until channel 0 is the sum.
void fold(float* x, int64_t dim) {
  for (int64_t n = dim; n > 1;) {
    const int64_t half = n / 2;
    for (int64_t i = 0; i < half * BLOCK; i += LANES) {
      store(x + i, load(x + i) + load(x + half * BLOCK + i));
    }
    if (n % 2) __builtin_memcpy(x + half * BLOCK, x + 2 * half * BLOCK, sizeof(float) * BLOCK);
    n = half + n % 2;
  }
}

// The mean over the finite rows of rows [64][pitch], of every channel, rounded to float16.
void block_means(const float* rows, int64_t pitch, int64_t dim, uint16_t* centres) {
  float weight[BLOCK];
  bool all_finite = true;
  for (int64_t t = 0; t < BLOCK; ++t) {
    Words special = {};
    int64_t c = 0;
    for (; c + LANES <= dim; c += LANES) {
      special |= (Words)((bits_of(load(rows + t * pitch + c)) & 0x7f800000u) == 0x7f800000u);
    }
    bool finite = true;
    for (int i = 0; i < LANES; ++i) finite &= special[i] == 0;
    for (; c < dim; ++c) finite &= is_finite(rows[t * pitch + c]);
    weight[t] = finite;
    all_finite &= finite;
  }
  // Halves of the tokens are added until one is left. Divided first: a power of two, and the sum cannot overflow.
  // Room behind the last channel is read, never used.
  for (int64_t c = 0; c < dim; c += LANES) {
    Floats sums[BLOCK / 2];
    const auto number = [&](int64_t t) {
      const Floats x = load(rows + t * pitch + c) / (float)BLOCK;
      return all_finite || weight[t] != 0.0f ? x : Floats{};
    };
    for (int64_t t = 0; t < BLOCK / 2; ++t) sums[t] = number(t) + number(t + BLOCK / 2);
    for (int64_t n = BLOCK / 4; n > 0; n /= 2) {
      for (int64_t t = 0; t < n; ++t) sums[t] = sums[t] + sums[t + n];
    }
    for (int64_t i = 0; i < LANES && c + i < dim; ++i) {
      const float x = sums[0][i];
      centres[c + i] = half_of_float(x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x);
    }
  }
}

// Codes of the nearest levels; a tie goes to the larger magnitude, either zero and a NaN to code 0.
template <int BITS>
INLINE Words nearest_codes(Floats z, const float* boundaries) {
  const Floats size = floats_of(bits_of(z) & 0x7fffffffu);
  Words index = {};
  if (BITS < 8) {
    UNROLL
    for (int i = 0; i < (1 << (BITS - 1)) - 1; ++i) index -= (Words)(size >= boundaries[i]);
  } else {
    // Over every 16th boundary, then by halves among the 15 that are left.
    UNROLL
    for (int i = 15; i < 127; i += 16) index -= (Words)(size >= boundaries[i]) << 4;
    UNROLL
    for (unsigned half = 8; half > 0; half /= 2) {
      index += (Words)(size >= of_128(boundaries, index + (half - 1u))) & half;
    }
  }
  return index | ((Words)(z < 0.0f) & (1u << (BITS - 1)));
}

template <int BITS>
INLINE Floats level_of(const Levels<BITS>& levels, Words code) {
  if (BITS == 3) return levels.level(code & 3u, code >> 2, 0);
  return levels.level(code, Words{}, 0);
}

// The fields `shift` to `shift + FIELD - 1` of codes [axis][64] of 64 lanes as words [rows][64].
template <int FIELD>
void pack_keys(const uint32_t* codes, int64_t axis, unsigned shift, uint32_t* words) {
  enum { A_WORD = 32 / FIELD };
  const uint32_t ones = (1u << FIELD) - 1u;
  for (int64_t first = 0; first < axis; first += A_WORD, words += BLOCK) {
    const int64_t count = axis - first < A_WORD ? axis - first : (int64_t)A_WORD;
    for (int64_t t = 0; t < BLOCK; t += LANES) {
      Words word = {};
      for (int64_t f = 0; f < count; ++f) {
        word |= (load(codes + (first + f) * BLOCK + t) >> shift & ones) << (unsigned)(FIELD * f);
      }
      store(words + t, word);
    }
  }
}

// The same of codes [dim][64], whose tokens are packed, as words [rows][dim].
template <int FIELD>
void pack_values(const uint32_t* codes, int64_t dim, unsigned shift, uint32_t* words) {
  enum { A_WORD = 32 / FIELD };
  const uint32_t ones = (1u << FIELD) - 1u;
  for (int64_t c = 0; c < dim; ++c) {
    for (int64_t row = 0; row < BLOCK / A_WORD; ++row) {
      const uint32_t* first = codes + c * BLOCK + row * A_WORD;
      uint32_t word = 0;
      UNROLL
      for (int f = 0; f < A_WORD; ++f) word |= (first[f] >> shift & ones) << (FIELD * f);
      words[row * dim + c] = word;
    }
  }
}

template <int FIELD>
void pack(const uint32_t* codes, const Blocks& blocks, unsigned shift, uint32_t* words) {
  if (blocks.is_key) {
    pack_keys<FIELD>(codes, blocks.head_dim, shift, words);
  } else {
    pack_values<FIELD>(codes, blocks.head_dim, shift, words);
  }
}

// Rows of words of the first plane.
template <int BITS>
int64_t first_rows(const Blocks& blocks) {
  const int64_t axis = blocks.is_key ? blocks.head_dim : BLOCK;
  return (axis * PLANE_BITS<BITS> + 31) / 32;
}

// w [dim][64] to words and scales; `spare` and `codes` have its size.
template <int BITS>
void quantize(const Blocks& blocks, float* w, float* spare, uint32_t* codes, uint32_t* words, uint16_t* scales) {
  const Levels<BITS> levels;
  const int64_t dim = blocks.head_dim, size = dim * BLOCK;
  float boundaries[BITS == 8 ? 128 : 8] = {};
  for (int i = 0; i < (1 << (BITS - 1)) - 1; ++i) {
    // The sum of two magnitudes is exact in float64, so this rounds once.
    boundaries[i] = (float)(((double)level_of_code<BITS>(i) + level_of_code<BITS>(i + 1)) / 2);
  }

  for (int64_t i = 0; i < size; i += LANES) store(spare + i, load(w + i) * load(w + i));
  fold(spare, dim);
  float norm[BLOCK], factor[BLOCK];
  const float root = (float)__builtin_sqrt((double)dim);
  for (int64_t t = 0; t < BLOCK; ++t) {
    norm[t] = __builtin_sqrtf(spare[t]);
    factor[t] = root / norm[t];
  }

  for (int64_t g = 0; g < GROUPS; ++g) {
    const Floats to_unit_variance = load(factor + g * LANES);
    for (int64_t i = g * LANES; i < size; i += BLOCK) {
      const Words code = nearest_codes<BITS>(load(w + i) * to_unit_variance, boundaries);
      const Floats level = level_of<BITS>(levels, code);
      store(codes + i, code);
      store(spare + i, level * level);
    }
  }
  fold(spare, dim);
  uint32_t counts[BLOCK];  // all bits where the codes of a token count
  bool all_count = true;
  for (int64_t t = 0; t < BLOCK; ++t) {
    uint16_t scale = half_of_float(norm[t] / __builtin_sqrtf(spare[t]));
    if ((scale & 0x7c00u) == 0x7c00u) scale = 0x7e00u;
    scales[t] = scale;
    counts[t] = (scale & 0x7fffu) == 0u || scale == 0x7e00u ? 0u : ~0u;
    all_count &= counts[t] != 0u;
  }
  if (!all_count) {
    for (int64_t i = 0; i < size; i += LANES) {
      store(codes + i, load(codes + i) & load(counts + i % BLOCK));
    }
  }
  pack<PLANE_BITS<BITS>>(codes, blocks, 0, words);
  if (BITS == 3) {
    const int64_t lanes = blocks.is_key ? BLOCK : dim;
    pack<1>(codes, blocks, 2, words + first_rows<BITS>(blocks) * lanes);
  }
}

void encode(const Codec& codec, int64_t head, int64_t n, float* scratch) {
  const Blocks& blocks = codec.blocks;
  const int64_t dim = blocks.head_dim, pitch = rounded_up(dim, LANES);
  const int64_t b = head / codec.kv_heads, k = head % codec.kv_heads;
  float* x = scratch;                         // [dim][64]
  float* spare = x + dim * BLOCK;             // [dim][64]
  uint32_t* codes = (uint32_t*)(spare + dim * BLOCK);
  float* rows = (float*)codes;                // [64][pitch], until there are codes
  float* centre = rows + pitch * BLOCK;       // [pitch]
  float* divisor = centre + pitch;            // [pitch]

  for (int64_t t = 0; t < BLOCK; ++t) {
    const char* row = row_of(codec.rows, b, k, n * BLOCK + t);
    read_row(row, codec.rows.type, codec.rows.strides[3], dim, rows + t * pitch);
  }
  for (int64_t c = 0; c < dim; ++c) {
    centre[c] = 0.0f;
    divisor[c] = channel_factor(blocks, b, k, c);
  }
  if (blocks.is_key) {
    uint16_t* centres = blocks.centres.at<uint16_t>(b, k, n);
    const int64_t stride = blocks.centres.strides[3];
    if (!codec.given_centres) block_means(rows, pitch, dim, centres);
    for (int64_t c = 0; c < dim; ++c) centre[c] = float_of_half(centres[c * stride]);
  }
  if (blocks.is_key || blocks.channel_scale.data) {
    for (int64_t t = 0; t < BLOCK; ++t) {
      float* row = rows + t * pitch;
      for (int64_t c = 0; c < pitch; c += LANES) {
        store(row + c, (load(row + c) - load(centre + c)) / load(divisor + c));
      }
    }
  }
  // What it writes behind the last channel lies in `spare`.
  for (int64_t t = 0; t < BLOCK; t += LANES) transpose(rows + t * pitch, pitch, dim, x + t, BLOCK);
  rotate(*blocks.rotation, k, Direction::row, x, spare, BLOCK, GROUPS);

  uint32_t* words = blocks.words.at<uint32_t>(b, k, n);
  uint16_t* scales = blocks.scales.at<uint16_t>(b, k, n);
  switch (blocks.bits) {
    case 2: return quantize<2>(blocks, x, spare, codes, words, scales);
    case 3: return quantize<3>(blocks, x, spare, codes, words, scales);
    case 4: return quantize<4>(blocks, x, spare, codes, words, scales);
    case 8: return quantize<8>(blocks, x, spare, codes, words, scales);
  }
}

// Levels times scales of one block, x [dim][64].
template <int BITS>
void scaled_levels(const Blocks& blocks, int64_t b, int64_t k, int64_t n, float* x) {
  enum { A_WORD = 32 / PLANE_BITS<BITS> };
  const int64_t dim = blocks.head_dim, row_stride = blocks.words.strides[3], stride = blocks.words.strides[4];
  const uint32_t* words = blocks.words.at<uint32_t>(b, k, n);
  const uint16_t* scales = blocks.scales.at<uint16_t>(b, k, n);
  const int64_t sign_rows = first_rows<BITS>(blocks);
  for (int64_t c = 0; c < dim; ++c) {
    for (int64_t t = 0; t < BLOCK; ++t) {
      const int64_t i = blocks.is_key ? c : t, lane = (blocks.is_key ? t : c) * stride;
      const uint32_t word = words[i / A_WORD * row_stride + lane];
      const uint32_t signs = BITS == 3 ? words[(sign_rows + i / 32) * row_stride + lane] >> (i & 16) : 0u;
      const uint32_t code = code_of_field<BITS>(word, signs, (uint)(i % A_WORD));
      x[c * BLOCK + t] = level_of_code<BITS>(code) * float_of_half(scales[t * blocks.scales.strides[3]]);
    }
  }
}

void decode(const Codec& codec, int64_t head, int64_t n, float* scratch) {
  const Blocks& blocks = codec.blocks;
  const int64_t dim = blocks.head_dim;
  const int64_t b = head / codec.kv_heads, k = head % codec.kv_heads;
  float* x = scratch;
  switch (blocks.bits) {
    case 2: scaled_levels<2>(blocks, b, k, n, x); break;
    case 3: scaled_levels<3>(blocks, b, k, n, x); break;
    case 4: scaled_levels<4>(blocks, b, k, n, x); break;
    case 8: scaled_levels<8>(blocks, b, k, n, x); break;
  }
  rotate(*blocks.rotation, k, Direction::back, x, x + dim * BLOCK, BLOCK, GROUPS);
  for (int64_t t = 0; t < BLOCK; ++t) {
    char* row = (char*)row_of(codec.rows, b, k, n * BLOCK + t);
    for (int64_t c = 0; c < dim; ++c) {
      float number = x[c * BLOCK + t] * channel_factor(blocks, b, k, c);
      if (blocks.is_key) {
        number = number + float_of_half(blocks.centres.at<uint16_t>(b, k, n)[c * blocks.centres.strides[3]]);
      }
      write(row, codec.rows.type, c * codec.rows.strides[3], number);
    }
  }
}

int64_t codec_scratch(const Codec& codec) {
  const int64_t dim = codec.blocks.head_dim, pitch = rounded_up(dim, LANES);
  return 2 * dim * BLOCK + pitch * (BLOCK + 2);
}

}  // namespace

namespace rotormlx {

extern const CodecKernels VARIANT_NAME(codec);
const CodecKernels VARIANT_NAME(codec) = {codec_scratch, encode, decode};

}  // namespace rotormlx
