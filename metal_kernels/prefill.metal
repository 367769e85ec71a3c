// Attention of many queries on packed bytes, first pass: one part of the sequence for a tile of query rows.
//
// Tiles of TILE tokens are decoded to levels in threadgroup memory, first the keys, then the values in the same place.
// Scores and outputs are products of 8 x 8 matrices. Each simdgroup owns 8 query rows. Their scores are in threadgroup
// memory, where 4 lanes share a row, so that nothing here depends on which lane holds which element of a matrix.

// Decode `rows` rows of words to `tile[position][LANES]`, with all threads of a threadgroup.
template <int BITS, int AXIS, int LANES, int THREADS>
METAL_FUNC void decode_tile(
    const device uint* words,  // [rows of words, lanes] of one block
    int64_t row_stride, int64_t lane_stride, int first_row, int rows, int first_lane,
    threadgroup const float* levels,  // [Stored<BITS>::LEVELS]
    threadgroup float* tile,          // [positions][LANES]; positions: rows * codes of a word, at most AXIS
    int thread_index) {
  constexpr int CODES = Word<BITS>::codes;
  constexpr int WORD_ROWS = (AXIS + CODES - 1) / CODES;
  for (int i = thread_index; i < rows * LANES; i += THREADS) {
    const int row = first_row + i / LANES, lane = i % LANES;
    const device uint* at = words + (first_lane + lane) * lane_stride;
    uint before = 0, high = 0;
    if (Stored<BITS>::HAS_TRELLIS && row > 0) before = at[(row - 1) * row_stride];
    // One word of the second plane belongs to two words of the first.
    if (BITS == 3) high = at[(WORD_ROWS + row / 2) * row_stride] >> (row % 2 * 2);
    const Indices<uint> indices = indices_of<BITS>(at[row * row_stride], before, high);
    UNROLL
    for (int field = 0; field < CODES; ++field) {
      const int position = i / LANES * CODES + field;
      // The word's fields past the last position carry no code.
      if (AXIS % CODES == 0 || position < AXIS) {
        tile[position * LANES + lane] = levels[index_of_field<BITS>(indices, uint(field))];
      }
    }
  }
}

// Load exact keys or values to `tile[token][DIM]`; tokens past the last are zero.
template <int DIM, int TILE, int THREADS, typename T>
METAL_FUNC void load_tile(
    const device T* x,  // [tokens, DIM]
    int64_t token_stride, int64_t channel_stride, int tokens,
    threadgroup float* tile,  // [TILE][DIM]
    int thread_index) {
  for (int i = thread_index; i < TILE * DIM; i += THREADS) {
    const int token = i / DIM, channel = i % DIM;
    tile[i] = token < tokens ? float(x[token * token_stride + channel * channel_stride]) : 0.0f;
  }
}

// kernel body
// Template: KEY_BITS, VALUE_BITS, KEY_DIM, VALUE_DIM, BLOCK, TILE, SIMDGROUPS, MASK (see scores.h).
// Inputs and outputs as in attend.metal, with two differences: q and rotated are row-contiguous, and they and the
// outputs are padded beyond G to a multiple of 8 * SIMDGROUPS rows.
constexpr int LANES = 32;
constexpr int THREADS = SIMDGROUPS * LANES;
constexpr int TILES = TILE / 8;
constexpr int LARGER_DIM = KEY_DIM > VALUE_DIM ? KEY_DIM : VALUE_DIM;
constexpr int ROW_LANES = LANES / 8;  // lanes that share a row of scores
constexpr int ROW_TOKENS = TILE / ROW_LANES;
static_assert(BLOCK % TILE == 0 && TILE % 16 == 0, "a tile is whole words of one block");

threadgroup float tile[TILE * LARGER_DIM];
threadgroup float scores[SIMDGROUPS * 8 * TILE];  // [SIMDGROUPS][8][TILE], then the softmax weights
threadgroup float shrinks[SIMDGROUPS * 64];       // [SIMDGROUPS][8][8], a diagonal matrix per simdgroup
threadgroup float key_levels[Stored<KEY_BITS>::LEVELS];
threadgroup float value_levels[Stored<VALUE_BITS>::LEVELS];

const int thread_index = int(thread_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup);
const int simdgroup = int(simdgroup_index_in_threadgroup);
const int part = int(threadgroup_position_in_grid.x);
const int parts = int(threadgroups_per_grid.x);
const int kv_heads = q_shape[1];
const int batch = int(threadgroup_position_in_grid.y) / kv_heads;
const int kv_head = int(threadgroup_position_in_grid.y) % kv_heads;
const int tile_row = int(threadgroup_position_in_grid.z) * 8 * SIMDGROUPS;
const int first_row = tile_row + 8 * simdgroup;

const int packed_tokens = lengths[2 * batch];
const int tokens = lengths[2 * batch + 1];
const int sink = min(plan[0], tokens - packed_tokens);
const int length = plan[4];
const int group_rows = plan[5];

// The tokens of this part, counted among the packed tokens or among the exact ones.
const bool exact = part >= plan[1];
const int part_tokens = exact ? plan[3] : plan[2];
const int start = (exact ? part - plan[1] : part) * part_tokens;
int stop = min(start + part_tokens, exact ? tokens - packed_tokens : packed_tokens);
if (MASK == 1) {
  // No query of the tile sees a token that its last query does not see.
  const int last_row = min(tile_row + 8 * SIMDGROUPS, group_rows) - 1;
  const int last_place = last_row / length > tile_row / length ? length - 1 : last_row % length;
  const int seen = tokens - length + last_place + 1;
  stop = min(stop, exact ? max(sink, seen - packed_tokens) : seen - sink);
}

const int64_t head_rows = int64_t(threadgroup_position_in_grid.y) * q_shape[2];
const device float* plain_rows = q + (head_rows + first_row) * KEY_DIM;
const device float* query_rows = exact ? plain_rows : rotated + (head_rows + first_row) * KEY_DIM;
const auto head_key_words =
    key_words + batch * key_words_strides[0] + kv_head * key_words_strides[1];
const auto head_key_scales =
    key_scales + batch * key_scales_strides[0] + kv_head * key_scales_strides[1];
const auto head_centres = centres + batch * centres_strides[0] + kv_head * centres_strides[1];
const auto head_exact_keys =
    exact_keys + batch * exact_keys_strides[0] + kv_head * exact_keys_strides[1];
const auto head_value_words =
    value_words + batch * value_words_strides[0] + kv_head * value_words_strides[1];
const auto head_value_scales =
    value_scales + batch * value_scales_strides[0] + kv_head * value_scales_strides[1];
const auto head_exact_values =
    exact_values + batch * exact_values_strides[0] + kv_head * exact_values_strides[1];

fill_levels<KEY_BITS>(key_levels, uint(thread_index), uint(THREADS));
fill_levels<VALUE_BITS>(value_levels, uint(thread_index), uint(THREADS));
threadgroup float* my_scores = scores + simdgroup * 8 * TILE;
threadgroup float* my_shrinks = shrinks + simdgroup * 64;
for (int i = lane; i < 64; i += LANES) my_shrinks[i] = 0.0f;
const int my_row = lane / ROW_LANES;
const int query_row = min(first_row + my_row, group_rows - 1);
float top = HIDDEN, total = 0.0f, about_centre = 0.0f, noise = 0.0f;
simdgroup_matrix<float, 8, 8> sums[VALUE_DIM / 8];
UNROLL
for (int c = 0; c < VALUE_DIM / 8; ++c) sums[c] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
for (int i = lane % ROW_LANES; i < KEY_DIM; i += ROW_LANES) {
  const float x = query_rows[my_row * KEY_DIM + i];
  noise = fma(x, x, noise);
}
for (ushort m = 1; m < ROW_LANES; m *= 2) noise += simd_shuffle_xor(noise, m);
noise *= score_noise(KEY_BITS);
threadgroup_barrier(mem_flags::mem_threadgroup);  // the levels are there

for (int first = start; first < stop; first += TILE) {
  const int block = first / BLOCK, in_block = first % BLOCK;
  if (exact) {
    load_tile<KEY_DIM, TILE, THREADS>(
        head_exact_keys + first * exact_keys_strides[2], exact_keys_strides[2],
        exact_keys_strides[3], stop - first, tile, thread_index);
  } else {
    decode_tile<KEY_BITS, KEY_DIM, TILE, THREADS>(
        head_key_words + block * key_words_strides[2], key_words_strides[3], key_words_strides[4],
        0, (KEY_DIM + Word<KEY_BITS>::codes - 1) / Word<KEY_BITS>::codes, in_block, key_levels,
        tile, thread_index);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the keys are there

  simdgroup_matrix<float, 8, 8> products[TILES], left, right;
  UNROLL
  for (int t = 0; t < TILES; ++t) products[t] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  for (int channel = 0; channel < KEY_DIM; channel += 8) {
    simdgroup_load(left, query_rows + channel, KEY_DIM);
    UNROLL
    for (int t = 0; t < TILES; ++t) {
      if (exact) simdgroup_load(right, tile + t * 8 * KEY_DIM + channel, KEY_DIM, ulong2(0, 0), true);
      else simdgroup_load(right, tile + channel * TILE + t * 8, TILE);
      simdgroup_multiply_accumulate(products[t], left, right, products[t]);
    }
  }
  UNROLL
  for (int t = 0; t < TILES; ++t) simdgroup_store(products[t], my_scores + t * 8, TILE);

  if (!exact && in_block == 0) {
    about_centre = 0.0f;
    for (int i = lane % ROW_LANES; i < KEY_DIM; i += ROW_LANES) {
      const float centre = float(head_centres[block * centres_strides[2] + i * centres_strides[3]]);
      about_centre = fma(plain_rows[my_row * KEY_DIM + i], centre, about_centre);
    }
    for (ushort m = 1; m < ROW_LANES; m *= 2) about_centre += simd_shuffle_xor(about_centre, m);
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);  // the simdgroup's scores are there

  float row_scores[ROW_TOKENS], value_scale[ROW_TOKENS];
  float new_top = top;
  UNROLL
  for (int i = 0; i < ROW_TOKENS; ++i) {
    const int token = i * ROW_LANES + lane % ROW_LANES;
    const int index = first + token;
    const int position = !exact ? sink + index : index < sink ? index : packed_tokens + index;
    float score = HIDDEN;
    value_scale[i] = 1.0f;
    if (index < stop) {
      score = my_scores[my_row * TILE + token];
      if (!exact) {
        const float key_scale = float(head_key_scales[block * key_scales_strides[2] +
                                                      (in_block + token) * key_scales_strides[3]]);
        value_scale[i] = float(head_value_scales[block * value_scales_strides[2] +
                                                 (in_block + token) * value_scales_strides[3]]);
        score = fma(fma(-noise, key_scale, score), key_scale, about_centre);
      }
      score = masked<MASK>(
          score, mask, mask_strides, batch, kv_head, group_rows, query_row, length, position,
          tokens);
    }
    row_scores[i] = score;
    new_top = max(new_top, score);
  }
  for (ushort m = 1; m < ROW_LANES; m *= 2) new_top = max(new_top, simd_shuffle_xor(new_top, m));
  const float shrink = exp(top - new_top);
  top = new_top;
  total *= shrink;
  UNROLL
  for (int i = 0; i < ROW_TOKENS; ++i) {
    const float weight = share_of(row_scores[i], top);
    total += weight;
    // The scale of a hidden token may hold any bits, even a NaN.
    float scaled = weight == 0.0f ? 0.0f : weight * value_scale[i];
    if (is_nan(scaled)) {
      // The total keeps a NaN in its own row. The sums of 8 rows shrink by one matrix product, which would spread it.
      total = scaled;
      scaled = 0.0f;
    }
    my_scores[my_row * TILE + i * ROW_LANES + lane % ROW_LANES] = scaled;
  }
  if (lane % ROW_LANES == 0) my_shrinks[my_row * 9] = shrink;
  const bool any_shrinks = simd_any(shrink != 1.0f);
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the weights are there, no keys are in use

  if (exact) {
    load_tile<VALUE_DIM, TILE, THREADS>(
        head_exact_values + first * exact_values_strides[2], exact_values_strides[2],
        exact_values_strides[3], stop - first, tile, thread_index);
  } else {
    constexpr int CODES = Word<VALUE_BITS>::codes;
    decode_tile<VALUE_BITS, BLOCK, VALUE_DIM, THREADS>(
        head_value_words + block * value_words_strides[2], value_words_strides[3],
        value_words_strides[4], in_block / CODES, TILE / CODES, 0, value_levels, tile,
        thread_index);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the values are there

  if (any_shrinks) {
    simdgroup_load(left, my_shrinks, 8);
    UNROLL
    for (int c = 0; c < VALUE_DIM / 8; ++c) {
      simdgroup_multiply(right, left, sums[c]);
      sums[c] = right;
    }
  }
  for (int t = 0; t < TILES; ++t) {
    simdgroup_load(left, my_scores + t * 8, TILE);
    UNROLL
    for (int c = 0; c < VALUE_DIM / 8; ++c) {
      simdgroup_load(right, tile + t * 8 * VALUE_DIM + c * 8, VALUE_DIM);
      simdgroup_multiply_accumulate(sums[c], left, right, sums[c]);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // no values, weights and shrinks are in use
}

for (ushort m = 1; m < ROW_LANES; m *= 2) total += simd_shuffle_xor(total, m);
const int64_t at = (head_rows + first_row) * parts + part;
UNROLL
for (int c = 0; c < VALUE_DIM / 8; ++c) {
  simdgroup_store(sums[c], part_outputs + at * VALUE_DIM + c * 8, parts * VALUE_DIM);
}
if (lane % ROW_LANES == 0) {
  part_tops[at + my_row * parts] = top;
  part_totals[at + my_row * parts] = total;
}
