// Attention of few queries on packed bytes. A threadgroup handles one part of the sequence for all query rows of a KV
// head; with ALONE defined it handles the whole sequence, from the queries to the output.
//
// A threadgroup walks its part in steps. A thread holds PLACES neighbouring places of the axis that is not summed over:
// tokens for the keys, channels for the values. Keys and values use the same loop, since a word packs along the axis
// that is summed over. So no sum crosses lanes, and every byte is read once for all ROWS query rows. The factors that
// all threads of a loop need (a query, or the softmax weights) are in threadgroup memory; all lanes read the same
// address.

// N neighbouring numbers, as the type of one load.
template <typename T, int N>
struct Neighbours {
  using type = vec<T, N>;
};
template <typename T>
struct Neighbours<T, 1> {
  using type = T;
};
METAL_FUNC float component(float x, int) { return x; }
METAL_FUNC float component(float2 x, int i) { return x[i]; }
METAL_FUNC float component(float4 x, int i) { return x[i]; }
METAL_FUNC uint component(uint x, int) { return x; }
METAL_FUNC uint component(uint2 x, int i) { return x[i]; }
METAL_FUNC uint component(uint4 x, int i) { return x[i]; }

// The numbers in a word of memory: one of 32 bits, or two of 16.
template <typename T>
struct InWord;
template <>
struct InWord<float> {
  enum { COUNT = 1 };
  static METAL_FUNC float at(uint word, int) { return as_type<float>(word); }
};
template <>
struct InWord<half> {
  enum { COUNT = 2 };
  static METAL_FUNC float at(uint word, int i) {
    return float(half_of_bits(ushort(i == 0 ? word & 0xFFFFu : word >> 16)));
  }
};
template <>
struct InWord<bfloat16_t> {
  enum { COUNT = 2 };
  static METAL_FUNC float at(uint word, int i) {
    return as_type<float>(i == 0 ? word << 16 : word & 0xFFFF0000u);
  }
};

// Load `numbers[i] = float(x[at + i])` for COUNT numbers at once; `at` must be a multiple of COUNT.
template <int COUNT, typename T>
METAL_FUNC void load_numbers(const device T* x, uint at, thread float* numbers) {
  constexpr int IN_WORD = InWord<T>::COUNT;
  using Words = typename Neighbours<uint, COUNT / IN_WORD>::type;
  const Words words = *(const device Words*)(x + at);
  UNROLL
  for (int i = 0; i < COUNT; ++i) numbers[i] = InWord<T>::at(component(words, i / IN_WORD), i % IN_WORD);
}

// sums[place][row] += factors[row] * level[place], at one position of the axis that is summed over.
template <int ROWS, int WIDTH, int PLACES, typename Rows>
METAL_FUNC void add_products(
    threadgroup const Rows* factors,  // [ROWS / WIDTH]
    thread const float* level,        // [PLACES]
    thread float* sums) {             // [PLACES][ROWS]
  UNROLL
  for (int v = 0; v < ROWS / WIDTH; ++v) {
    const Rows factor = factors[v];
    UNROLL
    for (int i = 0; i < WIDTH; ++i) {
      const int row = v * WIDTH + i;
      UNROLL
      for (int p = 0; p < PLACES; ++p) {
        sums[p * ROWS + row] = fma(component(factor, i), level[p], sums[p * ROWS + row]);
      }
    }
  }
}

// Add the products of one block's levels and the factors, along the packed axis. The block's words are
// [rows of words][ROW_STRIDE]; this thread starts at word `first`.
template <int BITS, int AXIS, int ROW_STRIDE, int ROWS, int WIDTH, int PLACES, typename Levels, typename Rows>
METAL_FUNC void add_levels(
    const device uint* words, uint first, Levels levels,
    threadgroup const Rows* factors,  // [AXIS][ROWS / WIDTH]
    thread float* sums) {             // [PLACES][ROWS]
  constexpr int CODES = Word<BITS>::codes;
  constexpr int WORD_ROWS = (AXIS + CODES - 1) / CODES;
  using Words = typename Neighbours<uint, PLACES>::type;
  uint before[PLACES], high[PLACES];
  UNROLL
  for (int p = 0; p < PLACES; ++p) before[p] = high[p] = 0;
  for (int row = 0; row < WORD_ROWS; ++row) {
    const Words read = *(const device Words*)(words + (first + row * ROW_STRIDE));
    if (BITS == 3) {
      // One word of the second plane belongs to two words of the first.
      if (row % 2 == 0) {
        const Words plane = *(const device Words*)(words + (first + (WORD_ROWS + row / 2) * ROW_STRIDE));
        UNROLL
        for (int p = 0; p < PLACES; ++p) high[p] = component(plane, p);
      } else {
        UNROLL
        for (int p = 0; p < PLACES; ++p) high[p] >>= 2;
      }
    }
    Indices<uint> indices[PLACES];
    UNROLL
    for (int p = 0; p < PLACES; ++p) {
      const uint word = component(read, p);
      indices[p] = indices_of<BITS>(word, before[p], high[p]);
      before[p] = word;
    }
    UNROLL
    for (int field = 0; field < CODES; ++field) {
      const int i = row * CODES + field;
      // The word's fields past the last position carry no code.
      if (AXIS % CODES == 0 || i < AXIS) {
        float level[PLACES];
        UNROLL
        for (int p = 0; p < PLACES; ++p) level[p] = levels.at(indices[p], uint(field));
        add_products<ROWS, WIDTH, PLACES>(factors + i * (ROWS / WIDTH), level, sums);
      }
    }
  }
}

// Add the scores of PLACES exact keys of [tokens][DIM]; first[p] is the index of the first number of key p.
template <int DIM, int ROWS, int WIDTH, int PLACES, typename T, typename Rows>
METAL_FUNC void add_exact_keys(
    const device T* keys, thread const uint* first,  // [PLACES]
    threadgroup const Rows* factors,                 // [DIM][ROWS / WIDTH]
    thread float* sums) {                            // [PLACES][ROWS]
  constexpr int LOADED = 4 * InWord<T>::COUNT;  // 16 bytes
  static_assert(DIM % LOADED == 0, "keys are whole loads");
  for (int channel = 0; channel < DIM; channel += LOADED) {
    float numbers[PLACES * LOADED];  // [PLACES][LOADED]
    UNROLL
    for (int p = 0; p < PLACES; ++p) load_numbers<LOADED>(keys, first[p] + channel, numbers + p * LOADED);
    UNROLL
    for (int i = 0; i < LOADED; ++i) {
      float level[PLACES];
      UNROLL
      for (int p = 0; p < PLACES; ++p) level[p] = numbers[p * LOADED + i];
      add_products<ROWS, WIDTH, PLACES>(factors + (channel + i) * (ROWS / WIDTH), level, sums);
    }
  }
}

// Add the weighted sum of `tokens` exact values, [tokens][DIM], for the PLACES channels from the number `first` on.
template <int DIM, int ROWS, int WIDTH, int PLACES, typename T, typename Rows>
METAL_FUNC void add_exact_values(
    const device T* values, uint first, int tokens,
    threadgroup const Rows* weights,  // [tokens][ROWS / WIDTH]
    thread float* sums) {             // [PLACES][ROWS]
  for (int i = 0; i < tokens; ++i) {
    float level[PLACES];
    load_numbers<PLACES>(values, first + i * DIM, level);
    add_products<ROWS, WIDTH, PLACES>(weights + i * (ROWS / WIDTH), level, sums);
  }
}

// The sum over the simdgroups of their numbers for a row.
template <int SIMDGROUPS, int ROWS>
METAL_FUNC float total_of(threadgroup const float* by_simdgroup, int row) {  // [SIMDGROUPS][ROWS]
  float total = 0.0f;
  UNROLL
  for (int s = 0; s < SIMDGROUPS; ++s) total += by_simdgroup[s * ROWS + row];
  return total;
}

// kernel body
// Template: KEY_BITS, VALUE_BITS, BLOCK, ROWS = G, WIDTH (rows loaded at once), SIMDGROUPS, PLACES, KEY_WAY and
// VALUE_WAY (see lookup.h), MASK (see scores.h), HAS_KEY_SCALE, KEY_MATRICES (K if each KV head has its own matrix,
// else 1). With ALONE also T (dtype of the output), HAS_VALUE_SCALE, VALUE_MATRICES, HAS_SINK_LOGITS.
// KeyRotation and ValueRotation fix the head dims.
//
// q              [B, H, L, KEY_DIM], any strides; a KV head has G = H / K * L query rows
// key_rotation   float32: coefficients of the stages, or the matrices [KEY_MATRICES, KEY_DIM, KEY_DIM] that queries are
//                multiplied by
// key_channel_scale      float32 [K, KEY_DIM], or one per batch row; read if HAS_KEY_SCALE
// key_*, value_* as in docs/FORMAT.md, section 3; exact_*: [B, K, capacity, D]; contiguous within a KV head
// mask           [B, H, L, S], bool or floating; one element if MASK < 2
// lengths        int32 [B, 2]: packed tokens, all tokens
// plan           int32 [10], see `_plan` of metal_attend.py
// tops, totals   float32 [B, K, G, parts]: largest score, and sum of exponentials
// outputs        float32 [B, K, G, parts, VALUE_DIM], not divided by the total; rotated if the part is packed
// value_rotation, value_channel_scale, sink_logits (any dtype, [H]), output (T [B, H, L, VALUE_DIM]): only with ALONE
constexpr int KEY_DIM = KeyRotation::D, VALUE_DIM = ValueRotation::D;
constexpr int LANES = 32;
constexpr int THREADS = SIMDGROUPS * LANES;
constexpr int BLOCK_LANES = BLOCK / PLACES;         // lanes that share a block of keys
constexpr int BLOCKS = LANES / BLOCK_LANES;         // blocks of a simdgroup in a step
constexpr int STEP_BLOCKS = SIMDGROUPS * BLOCKS;
constexpr int STEP = STEP_BLOCKS * BLOCK;
constexpr int VECTORS = ROWS / WIDTH;
// For the values, GROUPS groups of threads share the blocks of a step. A group is a multiple of four threads; those
// past the last channels repeat the last channels.
constexpr int VALUE_LANES = VALUE_DIM / PLACES;
constexpr int GROUP_THREADS = (VALUE_LANES + 3) / 4 * 4;
constexpr int GROUPS = 4 * GROUP_THREADS <= THREADS && STEP_BLOCKS % 4 == 0 ? 4 : 2 * GROUP_THREADS <= THREADS ? 2 : 1;
constexpr int KEY_WORDS = WordRows<KEY_BITS, KEY_DIM>::ALL * BLOCK;  // words of a block
constexpr int VALUE_WORDS = WordRows<VALUE_BITS, BLOCK>::ALL * VALUE_DIM;
static_assert(BLOCKS * BLOCK_LANES == LANES, "a simdgroup has whole blocks");
static_assert(GROUP_THREADS <= THREADS, "the threads have all channels of the values");
static_assert(STEP_BLOCKS % GROUPS == 0, "the groups share the blocks of a step evenly");
static_assert(GROUPS * VALUE_DIM <= STEP, "the groups' sums must fit where the weights are");
using Rows = typename Neighbours<float, WIDTH>::type;

threadgroup Rows plain[KEY_DIM * VECTORS];    // [KEY_DIM][ROWS], the queries times the scale of the scores
threadgroup Rows rotated[KEY_DIM * VECTORS];  // [KEY_DIM][ROWS], the same times the channel scale, and rotated
threadgroup Rows weights[STEP * VECTORS];     // [STEP][ROWS]
using KeyLookup = Lookup<KEY_BITS, KEY_WAY>;
using ValueLookup = Lookup<VALUE_BITS, VALUE_WAY>;
// Keys and values that find their levels in the same way share one table.
constexpr bool ONE_TABLE = KEY_BITS == VALUE_BITS && KEY_WAY == VALUE_WAY;
threadgroup float2 key_table[(KeyLookup::FLOATS + 1) / 2];
threadgroup float2 value_table[ONE_TABLE ? 1 : (ValueLookup::FLOATS + 1) / 2];
threadgroup float by_simdgroup[SIMDGROUPS * ROWS];  // [SIMDGROUPS][ROWS]

const int thread_index = int(thread_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup);
const int simdgroup = int(simdgroup_index_in_threadgroup);
const int kv_heads = plan[9];
const int head_index = int(threadgroup_position_in_grid.y);  // of [B, K]
const int batch = head_index / kv_heads, kv_head = head_index % kv_heads;
const int packed_tokens = lengths[2 * batch];
const int tokens = lengths[2 * batch + 1];
const int sink = min(plan[0], tokens - packed_tokens);
const int length = plan[4];
const float score_scale = as_type<float>(plan[6]);

#ifdef ALONE
constexpr int RUNS = 2;  // first the packed tokens, then the exact ones
const int part = 0, parts = 1;
const bool any_packed = packed_tokens > 0;
#else
constexpr int RUNS = 1;
const int part = int(threadgroup_position_in_grid.x);
const int parts = int(threadgroups_per_grid.x);
const bool any_packed = part < plan[1];
#endif

threadgroup float* plain_numbers = (threadgroup float*)plain;
threadgroup float* rotated_numbers = (threadgroup float*)rotated;
threadgroup float* weight_numbers = (threadgroup float*)weights;
const auto head_queries = q + batch * q_strides[0];
const auto head_key_scale = key_channel_scale + (batch * plan[7] + kv_head * KEY_DIM);
for (int i = thread_index; i < KEY_DIM * ROWS; i += THREADS) {
  const int channel = i % KEY_DIM, row = i / KEY_DIM;
  const int head = kv_head * (ROWS / length) + row / length;
  const float x = float(head_queries[head * q_strides[1] + row % length * q_strides[2] + channel * q_strides[3]]);
  const float scaled = x * score_scale;
  plain_numbers[channel * ROWS + row] = scaled;
  rotated_numbers[channel * ROWS + row] = HAS_KEY_SCALE ? scaled * head_key_scale[channel] : scaled;
}
threadgroup float* key_memory = (threadgroup float*)key_table;
threadgroup float* value_memory = ONE_TABLE ? key_memory : (threadgroup float*)value_table;
const KeyLookup key_levels = KeyLookup::make(key_memory, uint(thread_index), uint(THREADS));
const ValueLookup value_levels = ValueLookup::make(value_memory, uint(thread_index), uint(THREADS));

// A KV head has fewer than 2^31 numbers, so offsets from here on are 32 bits wide.
const auto head_key_words = key_words + batch * key_words_strides[0] + kv_head * key_words_strides[1];
const auto head_key_scales = key_scales + batch * key_scales_strides[0] + kv_head * key_scales_strides[1];
const auto head_centres = centres + batch * centres_strides[0] + kv_head * centres_strides[1];
const auto head_exact_keys = exact_keys + batch * exact_keys_strides[0] + kv_head * exact_keys_strides[1];
const auto head_value_words = value_words + batch * value_words_strides[0] + kv_head * value_words_strides[1];
const auto head_value_scales = value_scales + batch * value_scales_strides[0] + kv_head * value_scales_strides[1];
const auto head_exact_values = exact_values + batch * exact_values_strides[0] + kv_head * exact_values_strides[1];
#ifdef ALONE
const auto head_value_scale = value_channel_scale + (batch * plan[8] + kv_head * VALUE_DIM);
#endif

const int value_group = thread_index / GROUP_THREADS;
const bool has_channels = value_group < GROUPS && thread_index % GROUP_THREADS < VALUE_LANES;
const int channel = min(thread_index % GROUP_THREADS, VALUE_LANES - 1) * PLACES;  // the first of PLACES channels
const int block_token = lane % BLOCK_LANES * PLACES;                              // the first of PLACES tokens
float tops[ROWS], totals[ROWS], sums[PLACES * ROWS];  // sums: [PLACES][ROWS]
UNROLL
for (int row = 0; row < ROWS; ++row) {
  tops[row] = HIDDEN;
  totals[row] = 0.0f;
#ifdef ALONE
  if (HAS_SINK_LOGITS) {
    tops[row] = float(sink_logits[(kv_head * (ROWS / length) + row / length) * sink_logits_strides[0]]);
    if (thread_index == 0) totals[row] = 1.0f;
  }
#endif
}
UNROLL
for (int i = 0; i < PLACES * ROWS; ++i) sums[i] = 0.0f;
threadgroup_barrier(mem_flags::mem_threadgroup);  // the queries and the levels are there

float noise[ROWS];
UNROLL
for (int row = 0; row < ROWS; ++row) noise[row] = 0.0f;
if (any_packed) {
  rotate_in_place<KeyRotation, false, ROWS, THREADS>(
      rotated_numbers, key_rotation + kv_head % KEY_MATRICES * (KEY_DIM * KEY_DIM), thread_index);
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the rotated queries are there
  for (int i = lane; i < KEY_DIM; i += LANES) {
    UNROLL
    for (int row = 0; row < ROWS; ++row) {
      const float x = rotated_numbers[i * ROWS + row];
      noise[row] = fma(x, x, noise[row]);
    }
  }
  UNROLL
  for (int row = 0; row < ROWS; ++row) noise[row] = score_noise(KEY_BITS) * simd_sum(noise[row]);
}

for (int run = 0; run < RUNS; ++run) {
  // The tokens of a run, counted among the packed tokens or among the exact ones.
  const bool exact = RUNS == 2 ? run == 1 : !any_packed;
  const int run_tokens = exact ? plan[3] : plan[2];
  const int start = RUNS == 2 ? 0 : (exact ? part - plan[1] : part) * run_tokens;
  const int existing_tokens = exact ? tokens - packed_tokens : packed_tokens;
  const int stop = RUNS == 2 ? existing_tokens : min(start + run_tokens, existing_tokens);
  if (RUNS == 2 && !exact && !any_packed) continue;

  for (int step = start; step < stop; step += STEP) {
    const int block = step / BLOCK + simdgroup * BLOCKS + lane / BLOCK_LANES;
    const int first_token = block * BLOCK + block_token;
    float scores[PLACES * ROWS];  // [PLACES][ROWS]
    float value_scale[PLACES];
    UNROLL
    for (int i = 0; i < PLACES * ROWS; ++i) scores[i] = 0.0f;
    UNROLL
    for (int p = 0; p < PLACES; ++p) value_scale[p] = 1.0f;

    // Lanes past the last token read that token, or its block, again; their scores are hidden below.
    const bool any_tokens = step + simdgroup * BLOCKS * BLOCK < stop;
    if (any_tokens && exact) {
      uint first[PLACES];
      UNROLL
      for (int p = 0; p < PLACES; ++p) first[p] = min(first_token + p, stop - 1) * KEY_DIM;
      add_exact_keys<KEY_DIM, ROWS, WIDTH, PLACES>(head_exact_keys, first, plain, scores);
    } else if (any_tokens) {
      const int existing = min(block, (stop - 1) / BLOCK);
      add_levels<KEY_BITS, KEY_DIM, BLOCK, ROWS, WIDTH, PLACES>(
          head_key_words, existing * KEY_WORDS + block_token, key_levels, rotated, scores);
      float about_centre[ROWS];
      UNROLL
      for (int row = 0; row < ROWS; ++row) about_centre[row] = 0.0f;
      for (int i = lane % BLOCK_LANES; i < KEY_DIM; i += BLOCK_LANES) {
        const float centre = float(head_centres[existing * KEY_DIM + i]);
        UNROLL
        for (int row = 0; row < ROWS; ++row) {
          about_centre[row] = fma(plain_numbers[i * ROWS + row], centre, about_centre[row]);
        }
      }
      float key_scale[PLACES];
      load_numbers<PLACES>(head_key_scales, existing * BLOCK + block_token, key_scale);
      load_numbers<PLACES>(head_value_scales, existing * BLOCK + block_token, value_scale);
      UNROLL
      for (int row = 0; row < ROWS; ++row) {
        const float about = lane_sum<BLOCK_LANES>(about_centre[row]);
        UNROLL
        for (int p = 0; p < PLACES; ++p) {
          const float score = fma(-noise[row], key_scale[p], scores[p * ROWS + row]);
          scores[p * ROWS + row] = fma(score, key_scale[p], about);
        }
      }
    }

    UNROLL
    for (int p = 0; p < PLACES; ++p) {
      const int index = first_token + p;
      const int position = !exact ? sink + index : index < sink ? index : packed_tokens + index;
      UNROLL
      for (int row = 0; row < ROWS; ++row) {
        float score = HIDDEN;
        if (index < stop) {
          score = masked<MASK>(
              scores[p * ROWS + row], mask, mask_strides, batch, kv_head, ROWS, row, length, position, tokens);
        }
        scores[p * ROWS + row] = score;
      }
    }

    UNROLL
    for (int row = 0; row < ROWS; ++row) {
      float top = scores[row];
      UNROLL
      for (int p = 1; p < PLACES; ++p) top = max(top, scores[p * ROWS + row]);
      top = simd_max(top);
      if (lane == 0) by_simdgroup[simdgroup * ROWS + row] = top;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // all tops are there, no weights are in use

    UNROLL
    for (int row = 0; row < ROWS; ++row) {
      float top = tops[row];
      UNROLL
      for (int s = 0; s < SIMDGROUPS; ++s) top = max(top, by_simdgroup[s * ROWS + row]);
      const float shrink = exp(tops[row] - top);
      tops[row] = top;
      totals[row] *= shrink;
      UNROLL
      for (int p = 0; p < PLACES; ++p) {
        sums[p * ROWS + row] *= shrink;
        const float weight = share_of(scores[p * ROWS + row], top);
        totals[row] += weight;
        // The scale of a hidden token may hold any bits, even a NaN.
        const float scaled = weight == 0.0f ? 0.0f : weight * value_scale[p];
        weight_numbers[(first_token - step + p) * ROWS + row] = scaled;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // all weights are there, no tops are in use

    if (value_group < GROUPS) {
      for (int b = value_group; b < STEP_BLOCKS && step + b * BLOCK < stop; b += GROUPS) {
        const int first = step + b * BLOCK;
        const threadgroup Rows* block_weights = weights + b * BLOCK * VECTORS;
        if (exact) {
          add_exact_values<VALUE_DIM, ROWS, WIDTH, PLACES>(
              head_exact_values, first * VALUE_DIM + channel, min(BLOCK, stop - first), block_weights, sums);
        } else {
          add_levels<VALUE_BITS, BLOCK, VALUE_DIM, ROWS, WIDTH, PLACES>(
              head_value_words, first / BLOCK * VALUE_WORDS + channel, value_levels, block_weights, sums);
        }
      }
    }
  }

  threadgroup_barrier(mem_flags::mem_threadgroup);  // no weights and no tops are in use
  if (has_channels) {
    // [GROUPS][VALUE_DIM][ROWS]
    UNROLL
    for (int p = 0; p < PLACES; ++p) {
      UNROLL
      for (int row = 0; row < ROWS; ++row) {
        weight_numbers[(value_group * VALUE_DIM + channel + p) * ROWS + row] = sums[p * ROWS + row];
      }
    }
  }
  UNROLL
  for (int row = 0; row < ROWS; ++row) {
    const float total = simd_sum(totals[row]);
    if (lane == 0) by_simdgroup[simdgroup * ROWS + row] = total;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the groups' sums and the totals are there
  for (int i = thread_index; i < VALUE_DIM * ROWS; i += THREADS) {
    const int at = i % VALUE_DIM * ROWS + i / VALUE_DIM;
    for (int g = 1; g < GROUPS; ++g) weight_numbers[at] += weight_numbers[g * VALUE_DIM * ROWS + at];
  }

#ifdef ALONE
  if (!exact) {
    // The packed sum is rotated back; the exact run then adds its values to it.
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the sums are there
    rotate_in_place<ValueRotation, true, ROWS, THREADS>(
        weight_numbers, value_rotation + kv_head % VALUE_MATRICES * (VALUE_DIM * VALUE_DIM), thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);  // the rotated sums are there
    UNROLL
    for (int p = 0; p < PLACES; ++p) {
      const float factor = HAS_VALUE_SCALE ? head_value_scale[channel + p] : 1.0f;
      UNROLL
      for (int row = 0; row < ROWS; ++row) {
        const float sum = weight_numbers[(channel + p) * ROWS + row];
        sums[p * ROWS + row] = value_group == 0 ? factor * sum : 0.0f;
      }
    }
  }
#endif
}

// In this loop each thread reads only sums that it added up itself, so no barrier is needed.
for (int i = thread_index; i < VALUE_DIM * ROWS; i += THREADS) {
  const int channel_index = i % VALUE_DIM, row = i / VALUE_DIM;
  const float sum = weight_numbers[channel_index * ROWS + row];
  const int64_t output_row = int64_t(head_index) * ROWS + row;
#ifdef ALONE
  const float total = total_of<SIMDGROUPS, ROWS>(by_simdgroup, row);
  // A query that sees no token has a total of zero.
  output[output_row * VALUE_DIM + channel_index] = T(total == 0.0f ? 0.0f : sum / total);
#else
  part_outputs[(output_row * parts + part) * VALUE_DIM + channel_index] = sum;
#endif
}
#ifndef ALONE
UNROLL
for (int row = 0; row < ROWS; ++row) {
  if (thread_index == row) {
    const int64_t at = (int64_t(head_index) * ROWS + row) * parts + part;
    part_totals[at] = total_of<SIMDGROUPS, ROWS>(by_simdgroup, row);
    part_tops[at] = tops[row];
  }
}
#endif
