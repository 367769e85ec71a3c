// Encode rows to packed blocks, and decode them (docs/FORMAT.md, sections 5 and 6), one block per task.
//
// A block is transposed so that a lane is a token. Every row is then computed in the same way, whatever the width of a
// vector, and sums run over channels. This file is compiled without contraction to fused multiply-adds, so that all
// variants, and the operations of mlx_ops.py, give the same bits.

#include "rows.h"
#include "paths.h"

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

// Codes of the nearest levels. A tie goes to the larger magnitude; zero of either sign and NaN get code 0.
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

// Where field `i` of a word of fields of FIELD bits begins. Fields of one bit are those of two words of the plane
// before (docs/FORMAT.md, section 3).
template <int FIELD>
constexpr unsigned place_of(int i) {
  return FIELD == 1 ? i % 16 / 2 * 4 + i / 16 * 2 + i % 2 : FIELD * i;
}

// The fields `shift` to `shift + FIELD - 1` of codes [axis][pitch] as words [rows][lanes].
template <int FIELD>
void pack(const uint32_t* codes, int64_t axis, int64_t pitch, int64_t lanes, unsigned shift, uint32_t* words) {
  enum { A_WORD = 32 / FIELD };
  const uint32_t ones = (1u << FIELD) - 1u;
  for (int64_t first = 0; first < axis; first += A_WORD, words += lanes) {
    const int64_t count = axis - first < A_WORD ? axis - first : (int64_t)A_WORD;
    for (int64_t lane = 0; lane < lanes; lane += LANES) {
      Words word = {};
      UNROLL
      for (int f = 0; f < A_WORD; ++f) {
        if (f < count) word |= (load(codes + (first + f) * pitch + lane) >> shift & ones) << place_of<FIELD>(f);
      }
      const int64_t left = lanes - lane;
      if (left >= LANES) {
        store(words + lane, word);
      } else {
        __builtin_memcpy(words + lane, &word, sizeof(uint32_t) * left);
      }
    }
  }
}

// Rows of words of the first plane.
template <int BITS>
int64_t first_rows(const Blocks& blocks) {
  const int64_t axis = blocks.is_key ? blocks.head_dim : BLOCK;
  return (axis * PLANE_BITS<BITS> + 31) / 32;
}

// Nearest levels of z [dim][64]: codes, and z times what they stand for.
template <int BITS>
void nearest(const float* z, int64_t size, uint32_t* codes, float* products) {
  const Levels<BITS> levels;
  float boundaries[BITS == 8 ? 128 : 8] = {};
  for (int i = 0; i < (1 << (BITS - 1)) - 1; ++i) {
    // The sum of two magnitudes is exact in float64, so this rounds once.
    boundaries[i] = (float)(((double)level_of_code<BITS>(i) + level_of_code<BITS>(i + 1)) / 2);
  }
  for (int64_t i = 0; i < size; i += LANES) {
    const Words code = nearest_codes<BITS>(load(z + i), boundaries);
    store(codes + i, code);
    store(products + i, load(z + i) * levels.level(code, 0));
  }
}

// rows [64][pitch] to columns [dim][64], or back; both have room for whole vectors.
void to_columns(const float* rows, int64_t pitch, int64_t dim, float* columns) {
  for (int64_t t = 0; t < BLOCK; t += LANES) transpose(rows + t * pitch, pitch, dim, columns + t, BLOCK);
}
void to_rows(const float* columns, int64_t pitch, int64_t dim, float* rows) {
  // Past the last channel the numbers are arbitrary; the paths there are not used.
  for (int64_t c = 0; c < dim; c += LANES) transpose(columns + c * BLOCK, BLOCK, BLOCK, rows + c, pitch);
}

// The cheapest paths of z [dim][64]: codes [axis][its pitch], and z times what they stand for, [dim][64]. That comes
// instead of z for values, where `spare` [64][pitch] is used up, and into `spare` for keys. `taken` has room for the
// decisions of the longest path.
template <int BITS>
void paths(const Codec& codec, const uint32_t* state, int64_t pitch, float* z, float* spare, uint32_t* codes,
           uint32_t* taken) {
  const int64_t dim = codec.blocks.head_dim;
  if (codec.blocks.is_key) {
    for (int64_t t = 0; t < BLOCK; t += LANES) {
      cheapest_path<BITS>(z + t, BLOCK, 0, dim, Words{}, codes + t, spare + t, taken);
    }
    return;
  }
  to_rows(z, pitch, dim, spare);
  for (int64_t c = 0; c < dim; c += LANES) {
    uint32_t from[LANES] = {};
    for (int64_t i = 0; state && i < LANES && c + i < dim; ++i) from[i] = state[(c + i) * codec.state.strides[3]];
    cheapest_path<BITS>(spare + c, pitch, codec.start, BLOCK, load(from), codes + c, spare + c, taken);
  }
  to_columns(spare, pitch, dim, z);
}

// w [dim][64] to words and scales; `spare` and `codes` have room for [64][pitch] and [pitch][64].
template <int BITS>
void quantize(const Codec& codec, const uint32_t* state, int64_t pitch, float* w, float* spare, uint32_t* codes,
              uint32_t* taken, uint32_t* words, uint16_t* scales) {
  const Blocks& blocks = codec.blocks;
  const int64_t dim = blocks.head_dim, size = dim * BLOCK;
  for (int64_t i = 0; i < size; i += LANES) store(spare + i, load(w + i) * load(w + i));
  fold(spare, dim);
  float norm[BLOCK], factor[BLOCK];
  uint16_t sizes[BLOCK];
  const float root = (float)__builtin_sqrt((double)dim);
  for (int64_t t = 0; t < BLOCK; ++t) {
    norm[t] = __builtin_sqrtf(spare[t]);
    sizes[t] = half_of_float(norm[t] / root);
    const bool special = sizes[t] == 0u || (sizes[t] & 0x7c00u) == 0x7c00u;
    factor[t] = special ? 0.0f : root / norm[t];
  }
  for (int64_t i = 0; i < size; i += LANES) {
    const Floats to_unit_variance = load(factor + i % BLOCK);
    store(w + i, choose(to_unit_variance != 0.0f, load(w + i) * to_unit_variance, Floats{}));
  }

  const bool along_rows = BITS < 4 && !blocks.is_key;  // how codes lie
  if constexpr (BITS < 4) {
    paths<BITS>(codec, state, pitch, w, spare, codes, taken);
  } else {
    nearest<BITS>(w, size, codes, spare);
  }
  float* products = along_rows ? w : spare;
  fold(products, dim);
  const float least = 0.5f * (float)dim;
  const double shrink = blocks.is_key ? 1.0 : value_shrink(BITS);
  const float stretch = (float)(shrink * __builtin_sqrt((double)dim));
  for (int64_t t = 0; t < BLOCK; ++t) {
    const float along = products[t] > least ? products[t] : least;
    uint16_t scale = sizes[t] == 0u ? 0u : half_of_float(norm[t] * stretch / along);
    if ((sizes[t] & 0x7c00u) == 0x7c00u || (scale & 0x7c00u) == 0x7c00u) scale = 0x7e00u;
    scales[t] = scale;
  }
  if (!blocks.is_key && !along_rows) {
    // A word packs tokens, so the codes of neighbouring tokens must be adjacent.
    to_rows((const float*)codes, pitch, dim, w);
    codes = (uint32_t*)w;
  }
  const int64_t axis = blocks.is_key ? dim : BLOCK, lanes = blocks.is_key ? BLOCK : dim;
  const int64_t codes_pitch = blocks.is_key ? BLOCK : pitch;
  pack<PLANE_BITS<BITS>>(codes, axis, codes_pitch, lanes, 0, words);
  if (BITS == 3) pack<1>(codes, axis, codes_pitch, lanes, 2, words + first_rows<BITS>(blocks) * lanes);
}

void encode(const Codec& codec, int64_t head, int64_t n, float* scratch) {
  const Blocks& blocks = codec.blocks;
  const int64_t dim = blocks.head_dim, pitch = rounded_up(dim, LANES);
  const int64_t b = head / codec.kv_heads, k = head % codec.kv_heads;
  float* x = scratch;                         // [pitch][64]
  float* spare = x + pitch * BLOCK;           // [pitch][64]
  uint32_t* codes = (uint32_t*)(spare + pitch * BLOCK);
  float* rows = (float*)codes;                // [64][pitch], until there are codes
  float* centre = rows + pitch * BLOCK;       // [pitch]
  float* divisor = centre + pitch;            // [pitch]
  uint32_t* taken = (uint32_t*)(divisor + pitch);  // [larger of pitch and 64][LANES]

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
  to_columns(rows, pitch, dim, x);
  rotate(*blocks.rotation, k, Direction::row, x, spare, BLOCK, GROUPS);

  uint32_t* words = blocks.words.at<uint32_t>(b, k, n);
  uint16_t* scales = blocks.scales.at<uint16_t>(b, k, n);
  const uint32_t* state = codec.state.data ? codec.state.at<uint32_t>(b, k, n) : nullptr;
  switch (blocks.bits) {
    case 2: return quantize<2>(codec, state, pitch, x, spare, codes, taken, words, scales);
    case 3: return quantize<3>(codec, state, pitch, x, spare, codes, taken, words, scales);
    case 4: return quantize<4>(codec, state, pitch, x, spare, codes, taken, words, scales);
    case 8: return quantize<8>(codec, state, pitch, x, spare, codes, taken, words, scales);
  }
}

// Levels times scales of one block, x [dim][64].
template <int BITS>
void scaled_levels(const Blocks& blocks, int64_t b, int64_t k, int64_t n, float* x) {
  enum { A_WORD = 32 / PLANE_BITS<BITS> };
  const int64_t dim = blocks.head_dim, row_stride = blocks.words.strides[3], stride = blocks.words.strides[4];
  const uint32_t* words = blocks.words.at<uint32_t>(b, k, n);
  const uint16_t* scales = blocks.scales.at<uint16_t>(b, k, n);
  const uint32_t* high_words = words + first_rows<BITS>(blocks) * row_stride;
  const int64_t axis = blocks.is_key ? dim : BLOCK, lanes = blocks.is_key ? BLOCK : dim;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    uint32_t before = 0;
    for (int64_t first = 0, row = 0; first < axis; first += A_WORD, ++row) {
      const uint32_t word = words[row * row_stride + lane * stride];
      const uint32_t high = BITS == 3 ? high_words[row / 2 * row_stride + lane * stride] >> row % 2 * 2 : 0u;
      const Indices<uint32_t> indices = indices_of<BITS>(word, before, high);
      before = word;
      for (int64_t i = first; i < first + A_WORD && i < axis; ++i) {
        const int64_t c = blocks.is_key ? i : lane, t = blocks.is_key ? lane : i;
        const float level = stored_level<BITS>(index_of_field<BITS>(indices, (uint)(i - first)));
        x[c * BLOCK + t] = level * float_of_half(scales[t * blocks.scales.strides[3]]);
      }
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
  const int64_t pitch = rounded_up(codec.blocks.head_dim, LANES);
  return pitch * (3 * BLOCK + 2) + (pitch > BLOCK ? pitch : BLOCK) * LANES;
}

}  // namespace

namespace rotormlx {

extern const CodecKernels VARIANT_NAME(codec);
const CodecKernels VARIANT_NAME(codec) = {codec_scratch, encode, decode};

}  // namespace rotormlx
