// Attention of few queries on packed bytes, first pass: one part of the sequence for all query rows of a KV head.
//
// A threadgroup walks its part in steps of SIMDGROUPS blocks; simdgroup s has block s of a step. Keys: a
// lane has two tokens and adds up over channels. Values: it has two channels and adds up over tokens.
// Both are the same loop, since a word packs along the axis that is summed over, so no sum crosses
// lanes and every byte is read once for all ROWS query rows. What the lanes of a loop have in common
// (a query, or the softmax weights) lies in threadgroup memory, and all lanes read the same address.

// Query rows that are loaded from threadgroup memory at once.
template <int WIDTH>
struct RowVector {
  using type = vec<float, WIDTH>;
};
template <>
struct RowVector<1> {
  using type = float;
};
METAL_FUNC float component(float x, int i) { return x; }
METAL_FUNC float component(float2 x, int i) { return x[i]; }
METAL_FUNC float component(float4 x, int i) { return x[i]; }

// sums[lane][row] += factors[row] * level[lane], for the two lanes' coordinates at one place.
template <int ROWS, int WIDTH, typename Rows>
METAL_FUNC void add_products(
    threadgroup const Rows* factors,  // [ROWS / WIDTH]
    float first, float second,
    thread float* sums) {  // [2][ROWS]
  for (int v = 0; v < ROWS / WIDTH; ++v) {
    const Rows factor = factors[v];
    for (int i = 0; i < WIDTH; ++i) {
      const int row = v * WIDTH + i;
      sums[row] = fma(component(factor, i), first, sums[row]);
      sums[ROWS + row] = fma(component(factor, i), second, sums[ROWS + row]);
    }
  }
}

// Adds up along the packed axis of one block, for two lanes of its words.
template <int BITS, int AXIS, int ROWS, int WIDTH, typename Rows>
METAL_FUNC void add_levels(
    const device uint* words,  // [rows of words, lanes]
    int64_t row_stride, int64_t first_lane, int64_t second_lane,
    threadgroup const float* levels,  // all of Stored<BITS>
    threadgroup const Rows* factors,  // [AXIS][ROWS / WIDTH]
    thread float* sums) {             // [2][ROWS]
  constexpr int CODES = Word<BITS>::codes;
  constexpr int WORD_ROWS = (AXIS + CODES - 1) / CODES;
  uint first_before = 0, second_before = 0, first_high = 0, second_high = 0;
  for (int row = 0; row < WORD_ROWS; ++row) {
    const device uint* word = words + row * row_stride;
    const uint first_word = word[first_lane], second_word = word[second_lane];
    if (BITS == 3) {
      // A word of the second plane serves two words of the first.
      const device uint* high = words + (WORD_ROWS + row / 2) * row_stride;
      first_high = row % 2 == 0 ? high[first_lane] : first_high >> 2;
      second_high = row % 2 == 0 ? high[second_lane] : second_high >> 2;
    }
    const Indices<uint> first = indices_of<BITS>(first_word, first_before, first_high);
    const Indices<uint> second = indices_of<BITS>(second_word, second_before, second_high);
    first_before = first_word;
    second_before = second_word;
    for (int field = 0; field < CODES; ++field) {
      const int i = row * CODES + field;
      // Fields behind the last position mean nothing.
      if (AXIS % CODES == 0 || i < AXIS) {
        add_products<ROWS, WIDTH>(
            factors + i * (ROWS / WIDTH),
            levels[index_of_field<BITS>(first, uint(field))],
            levels[index_of_field<BITS>(second, uint(field))], sums);
      }
    }
  }
}

// The same for exact keys or values.
template <int ROWS, int WIDTH, typename T, typename Rows>
METAL_FUNC void add_exact(
    const device T* x,  // [axis, lanes]
    int size, int64_t stride, int64_t first_lane, int64_t second_lane,
    threadgroup const Rows* factors,  // [size][ROWS / WIDTH]
    thread float* sums) {             // [2][ROWS]
  for (int i = 0; i < size; ++i) {
    const device T* at = x + i * stride;
    add_products<ROWS, WIDTH>(
        factors + i * (ROWS / WIDTH), float(at[first_lane]), float(at[second_lane]), sums);
  }
}

// kernel body
// Template: KEY_BITS, VALUE_BITS, KEY_DIM, VALUE_DIM, BLOCK, ROWS = G, WIDTH (rows loaded at once),
// SIMDGROUPS, MASK (see scores.h).
//
// q, rotated     float32 [B, K, G, KEY_DIM], G = H / K * L query rows, multiplied by the scale of the
//                scores; rotated also by the channel scale and the rotation of the keys
// key_*, value_* as in docs/FORMAT.md, section 3; exact_*: [B, K, capacity, D]
// mask           [B, H, L, S], bool or floating; one element if MASK < 2
// lengths        int32 [B, 2]: packed tokens, all tokens
// plan           int32 [6]: sink, packed parts, tokens of a packed part, tokens of an exact part, L, G
// tops, totals   float32 [B, K, G, parts]: largest score and sum of exponentials
// outputs        float32 [B, K, G, parts, VALUE_DIM], not divided by the total; rotated if packed
constexpr int LANES = BLOCK / 2;
constexpr int STEP = SIMDGROUPS * BLOCK;
constexpr int THREADS = SIMDGROUPS * LANES;
constexpr int VECTORS = ROWS / WIDTH;
// Values: GROUPS groups of VALUE_LANES threads share the blocks of a step.
constexpr int VALUE_LANES = VALUE_DIM / 2;
constexpr int GROUPS = 4 * VALUE_LANES <= THREADS ? 4 : 2 * VALUE_LANES <= THREADS ? 2 : 1;
static_assert(LANES == 32, "a lane has two tokens of a block");
static_assert(VALUE_LANES <= THREADS, "a thread has two channels of the values");
static_assert(SIMDGROUPS % GROUPS == 0, "the groups share the blocks of a step evenly");
static_assert((GROUPS - 1) * VALUE_DIM <= STEP, "the groups' sums must fit where the weights are");
using Rows = typename RowVector<WIDTH>::type;

threadgroup Rows query[KEY_DIM * VECTORS];  // [KEY_DIM][ROWS]
threadgroup Rows weights[STEP * VECTORS];   // [STEP][ROWS]
threadgroup float key_levels[Stored<KEY_BITS>::LEVELS];
threadgroup float value_levels[Stored<VALUE_BITS>::LEVELS];
threadgroup float by_simdgroup[SIMDGROUPS * ROWS];  // [SIMDGROUPS][ROWS]

const int thread_index = int(thread_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup);
const int simdgroup = int(simdgroup_index_in_threadgroup);
const int part = int(threadgroup_position_in_grid.x);
const int parts = int(threadgroups_per_grid.x);
const int kv_heads = q_shape[1];
const int batch = int(threadgroup_position_in_grid.y) / kv_heads;
const int kv_head = int(threadgroup_position_in_grid.y) % kv_heads;

const int packed_tokens = lengths[2 * batch];
const int tokens = lengths[2 * batch + 1];
const int sink = min(plan[0], tokens - packed_tokens);
const int length = plan[4];

// This part's tokens, counted among the packed or among the exact ones.
const bool exact = part >= plan[1];
const int part_tokens = exact ? plan[3] : plan[2];
const int start = (exact ? part - plan[1] : part) * part_tokens;
const int stop = min(start + part_tokens, exact ? tokens - packed_tokens : packed_tokens);

threadgroup float* query_numbers = (threadgroup float*)query;
for (int i = thread_index; i < KEY_DIM * ROWS; i += THREADS) {
  const int row = i % ROWS, channel = i / ROWS;
  query_numbers[i] = exact ? q[batch * q_strides[0] + kv_head * q_strides[1] +
                               row * q_strides[2] + channel * q_strides[3]]
                           : rotated[batch * rotated_strides[0] + kv_head * rotated_strides[1] +
                                     row * rotated_strides[2] + channel * rotated_strides[3]];
}
fill_levels<KEY_BITS>(key_levels, uint(thread_index), uint(THREADS));
fill_levels<VALUE_BITS>(value_levels, uint(thread_index), uint(THREADS));

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

const int value_group = thread_index / VALUE_LANES;
const int channel = thread_index % VALUE_LANES;
float tops[ROWS], totals[ROWS], sums[2 * ROWS];  // sums: [2][ROWS]
for (int row = 0; row < ROWS; ++row) {
  tops[row] = HIDDEN;
  totals[row] = sums[row] = sums[ROWS + row] = 0.0f;
}
threadgroup_barrier(mem_flags::mem_threadgroup);  // the query and the levels are there

float noise[ROWS];
for (int row = 0; row < ROWS; ++row) {
  float square_sum = 0.0f;
  for (int i = lane; i < KEY_DIM; i += LANES) {
    const float x = query_numbers[i * ROWS + row];
    square_sum = fma(x, x, square_sum);
  }
  noise[row] = score_noise(KEY_BITS) * simd_sum(square_sum);
}

for (int step = start; step < stop; step += STEP) {
  const int block_start = step + simdgroup * BLOCK;
  const int block = block_start / BLOCK;
  float scores[2 * ROWS];  // [2][ROWS]
  float value_scale[2];
  for (int i = 0; i < 2 * ROWS; ++i) scores[i] = 0.0f;
  value_scale[0] = value_scale[1] = 1.0f;

  if (block_start < stop && exact) {
    // Lanes behind the last token read it again; their scores do not count.
    const int first = min(block_start + lane, stop - 1);
    const int second = min(block_start + lane + LANES, stop - 1);
    add_exact<ROWS, WIDTH>(
        head_exact_keys, KEY_DIM, exact_keys_strides[3], first * exact_keys_strides[2],
        second * exact_keys_strides[2], query, scores);
  } else if (block_start < stop) {
    add_levels<KEY_BITS, KEY_DIM, ROWS, WIDTH>(
        head_key_words + block * key_words_strides[2], key_words_strides[3],
        lane * key_words_strides[4], (lane + LANES) * key_words_strides[4], key_levels, query,
        scores);
    float about_centre[ROWS];
    for (int row = 0; row < ROWS; ++row) about_centre[row] = 0.0f;
    for (int i = lane; i < KEY_DIM; i += LANES) {
      const float centre = float(head_centres[block * centres_strides[2] + i * centres_strides[3]]);
      for (int row = 0; row < ROWS; ++row) {
        const float x = q[batch * q_strides[0] + kv_head * q_strides[1] + row * q_strides[2] +
                          i * q_strides[3]];
        about_centre[row] = fma(x, centre, about_centre[row]);
      }
    }
    for (int row = 0; row < ROWS; ++row) about_centre[row] = simd_sum(about_centre[row]);
    for (int t = 0; t < 2; ++t) {
      const int token = lane + t * LANES;
      const float key_scale = float(
          head_key_scales[block * key_scales_strides[2] + token * key_scales_strides[3]]);
      value_scale[t] = float(
          head_value_scales[block * value_scales_strides[2] + token * value_scales_strides[3]]);
      for (int row = 0; row < ROWS; ++row) {
        const float score = fma(-noise[row], key_scale, scores[t * ROWS + row]);
        scores[t * ROWS + row] = fma(score, key_scale, about_centre[row]);
      }
    }
  }

  for (int t = 0; t < 2; ++t) {
    const int index = block_start + t * LANES + lane;
    const int position = !exact ? sink + index : index < sink ? index : packed_tokens + index;
    for (int row = 0; row < ROWS; ++row) {
      float score = HIDDEN;
      if (index < stop) {
        score = masked<MASK>(
            scores[t * ROWS + row], mask, mask_strides, batch, kv_head, ROWS, row, length, position,
            tokens);
      }
      scores[t * ROWS + row] = score;
    }
  }

  for (int row = 0; row < ROWS; ++row) {
    const float top = simd_max(max(scores[row], scores[ROWS + row]));
    if (lane == 0) by_simdgroup[simdgroup * ROWS + row] = top;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // all tops are there, no weights are in use

  threadgroup float* weight_numbers = (threadgroup float*)weights;
  for (int row = 0; row < ROWS; ++row) {
    float top = tops[row];
    for (int s = 0; s < SIMDGROUPS; ++s) top = max(top, by_simdgroup[s * ROWS + row]);
    const float shrink = exp(tops[row] - top);
    tops[row] = top;
    totals[row] *= shrink;
    sums[row] *= shrink;
    sums[ROWS + row] *= shrink;
    for (int t = 0; t < 2; ++t) {
      const float weight = share_of(scores[t * ROWS + row], top);
      totals[row] += weight;
      // The scale of a hidden token may be anything, NaN among them.
      const float scaled = weight == 0.0f ? 0.0f : weight * value_scale[t];
      weight_numbers[(simdgroup * BLOCK + t * LANES + lane) * ROWS + row] = scaled;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // all weights are there, no tops are in use

  if (value_group < GROUPS) {
    for (int b = value_group; b < SIMDGROUPS && step + b * BLOCK < stop; b += GROUPS) {
      const int first_token = step + b * BLOCK;
      const threadgroup Rows* block_weights = weights + b * BLOCK * VECTORS;
      if (exact) {
        add_exact<ROWS, WIDTH>(
            head_exact_values + first_token * exact_values_strides[2],
            min(BLOCK, stop - first_token), exact_values_strides[2],
            channel * exact_values_strides[3], (channel + VALUE_LANES) * exact_values_strides[3],
            block_weights, sums);
      } else {
        add_levels<VALUE_BITS, BLOCK, ROWS, WIDTH>(
            head_value_words + first_token / BLOCK * value_words_strides[2],
            value_words_strides[3], channel * value_words_strides[4],
            (channel + VALUE_LANES) * value_words_strides[4], value_levels, block_weights, sums);
      }
    }
  }
}

threadgroup_barrier(mem_flags::mem_threadgroup);  // no weights and no tops are in use
threadgroup float* group_sums = (threadgroup float*)weights;  // [GROUPS - 1][VALUE_DIM][ROWS]
if (value_group > 0 && value_group < GROUPS) {
  for (int c = 0; c < 2; ++c) {
    const int at = (value_group - 1) * VALUE_DIM + channel + c * VALUE_LANES;
    for (int row = 0; row < ROWS; ++row) group_sums[at * ROWS + row] = sums[c * ROWS + row];
  }
}
for (int row = 0; row < ROWS; ++row) {
  const float total = simd_sum(totals[row]);
  if (lane == 0) by_simdgroup[simdgroup * ROWS + row] = total;
}
threadgroup_barrier(mem_flags::mem_threadgroup);  // the groups' sums and the totals are there

for (int row = 0; row < ROWS; ++row) {
  const int64_t at = (int64_t(threadgroup_position_in_grid.y) * ROWS + row) * parts + part;
  if (value_group == 0) {
    for (int c = 0; c < 2; ++c) {
      float sum = sums[c * ROWS + row];
      for (int g = 0; g < GROUPS - 1; ++g) {
        sum += group_sums[(g * VALUE_DIM + channel + c * VALUE_LANES) * ROWS + row];
      }
      part_outputs[at * VALUE_DIM + channel + c * VALUE_LANES] = sum;
    }
  }
  if (thread_index == row) {
    float total = 0.0f;
    for (int s = 0; s < SIMDGROUPS; ++s) total += by_simdgroup[s * ROWS + row];
    part_totals[at] = total;
    part_tops[at] = tops[row];
  }
}
