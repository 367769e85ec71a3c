// Decode attention, first pass, without tensor cores: one part of the exact tokens, whatever their dtype, or of the packed ones
// where queries are float32. All in float32.
//
// The part is walked in steps of WARPS blocks; warp w has block w of a step. Keys: a lane has two tokens and adds up over
// channels. Values: a thread has two channels and adds up over tokens. What the lanes of a loop have in common (a query,
// or the softmax weights) lies in shared memory, and all lanes read the same address.

template <int KEY_BITS, int VALUE_BITS, int KEY_DIM, int VALUE_DIM, int ROWS>
struct AttendPlain {
  enum {
    WARPS = 4,
    LANES = 32,
    THREADS = WARPS * LANES,
    STEP = WARPS * BLOCK,
    // Values: GROUPS groups of VALUE_LANES threads share the blocks of a step.
    VALUE_LANES = VALUE_DIM / 2,
    GROUPS = 4 * VALUE_LANES <= THREADS ? 4 : 2 * VALUE_LANES <= THREADS ? 2 : 1,
    // Places in shared memory, in floats.
    QUERY = 0,                              // [KEY_DIM][ROWS]
    WEIGHTS = KEY_DIM * ROWS,               // [STEP][ROWS]
    BY_WARP = WEIGHTS + STEP * ROWS,        // [WARPS][ROWS]
    KEY_LEVELS = BY_WARP + WARPS * ROWS,    // [2^KEY_BITS]
    VALUE_LEVELS = KEY_LEVELS + (1 << KEY_BITS),
    SHARED_BYTES = 4 * (VALUE_LEVELS + (1 << VALUE_BITS))
  };
  static_assert(VALUE_LANES <= THREADS, "a thread has two channels of the values");
  static_assert((GROUPS - 1) * VALUE_DIM <= STEP, "the groups' sums must fit where the weights are");
  static_assert(ROWS % 4 == 0, "four rows are read at once");

  // sums[lane][row] += factors[row] * level[lane], for the two lanes' coordinates at one place.
  static DEVICE_FN void add_products(const float* factors, float first, float second, float* sums) {
#pragma unroll
    for (int v = 0; v < ROWS; v += 4) {
      const float4 four = *reinterpret_cast<const float4*>(factors + v);
      const float factor[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[v + i] = fmaf(factor[i], first, sums[v + i]);
        sums[ROWS + v + i] = fmaf(factor[i], second, sums[ROWS + v + i]);
      }
    }
  }

  // Adds up along the packed axis of one block, for two lanes of its words.
  template <int BITS, int AXIS>
  static DEVICE_FN void add_levels(
      const uint* words, int row_stride, int first_lane, int second_lane, const float* levels,
      const float* factors, float* sums) {
    constexpr int CODES = Word<BITS>::codes;
    constexpr int WORD_ROWS = (AXIS + CODES - 1) / CODES;
    uint first_signs = 0, second_signs = 0;
    for (int row = 0; row < WORD_ROWS; ++row) {
      const uint* word = words + row * row_stride;
      const uint first = word[first_lane], second = word[second_lane];
      if (BITS == 3) {
        // A word of the plane of signs serves two words of magnitudes.
        const uint* signs = words + (WORD_ROWS + row / 2) * row_stride;
        first_signs = row % 2 == 0 ? signs[first_lane] : first_signs >> CODES;
        second_signs = row % 2 == 0 ? signs[second_lane] : second_signs >> CODES;
      }
#pragma unroll
      for (int field = 0; field < CODES; ++field) {
        const int i = row * CODES + field;
        // Fields behind the last position mean nothing.
        if (AXIS % CODES == 0 || i < AXIS) {
          add_products(
              factors + i * ROWS, levels[code_of_field<BITS>(first, first_signs, field)],
              levels[code_of_field<BITS>(second, second_signs, field)], sums);
        }
      }
    }
  }

  static DEVICE_FN void run(const AttendParts& all, float* shared) {
    const rotormlx_attend_arguments& call = all.call;
    const int thread = int(threadIdx.x);
    const int lane = thread % LANES, warp = thread / LANES;
    const Part p = part_of_block(all, ROWS);
    float* query = shared + QUERY;
    float* weights = shared + WEIGHTS;
    float* by_warp = shared + BY_WARP;
    const float* key_levels = shared + KEY_LEVELS;
    const float* value_levels = shared + VALUE_LEVELS;
    const float to_log2 = call.scale * LOG2_E;

    for (int i = thread; i < KEY_DIM * ROWS; i += THREADS) {
      const int row = p.first_row + i % ROWS, channel = i / ROWS;
      float x = 0.0f;
      if (row < p.group_rows) {
        x = p.exact ? loaded(call.q, query_at(call, p.batch, p.kv_head, row) + channel, call.dtype)
                    : all.rotated[(int64_t(p.head_index) * p.group_rows + row) * KEY_DIM + channel];
      }
      query[i] = x * to_log2;
    }
    fill_levels<KEY_BITS>(shared + KEY_LEVELS, uint(thread), uint(THREADS));
    fill_levels<VALUE_BITS>(shared + VALUE_LEVELS, uint(thread), uint(THREADS));

    const int value_group = thread / VALUE_LANES;
    const int channel = thread % VALUE_LANES;
    float tops[ROWS], totals[ROWS], sums[2 * ROWS];  // sums: [2][ROWS]
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      tops[row] = HIDDEN;
      totals[row] = sums[row] = sums[ROWS + row] = 0.0f;
    }
    __syncthreads();  // the query and the levels are there

    for (int step = p.start; step < p.stop; step += STEP) {
      float scores[2 * ROWS];  // [2][ROWS]
      float value_scale[2] = {1.0f, 1.0f};
#pragma unroll
      for (int i = 0; i < 2 * ROWS; ++i) scores[i] = 0.0f;
      const int block_start = step + warp * BLOCK;
      if (block_start < p.stop && p.exact) {
        add_exact_keys(call, p, block_start + lane, query, scores);
      } else if (block_start < p.stop) {
        add_packed_keys(call, p, block_start / BLOCK, lane, key_levels, query, scores, value_scale);
      }

#pragma unroll
      for (int i = 0; i < 2 * ROWS; ++i) {
        const int index = block_start + i / ROWS * LANES + lane;
        const int query_row = min(p.first_row + i % ROWS, p.group_rows - 1);
        scores[i] =
            index < p.stop ? masked(call, p, query_row, position_of(p, index), scores[i]) : HIDDEN;
      }
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        float top = fmaxf(scores[row], scores[ROWS + row]);
        for (int mask = 16; mask > 0; mask /= 2) top = fmaxf(top, shuffle_xor(top, mask));
        if (lane == 0) by_warp[warp * ROWS + row] = top;
      }
      __syncthreads();  // all tops are there, no weights are in use

#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        float top = tops[row];
        for (int w = 0; w < WARPS; ++w) top = fmaxf(top, by_warp[w * ROWS + row]);
        const float shrink = power_of_two(tops[row] - top);
        tops[row] = top;
        totals[row] *= shrink;
        sums[row] *= shrink;
        sums[ROWS + row] *= shrink;
        for (int t = 0; t < 2; ++t) {
          const float weight = share_of(scores[t * ROWS + row], top);
          totals[row] += weight;
          // The scale of a hidden token may be anything, NaN among them.
          weights[(warp * BLOCK + t * LANES + lane) * ROWS + row] =
              weight == 0.0f ? 0.0f : weight * value_scale[t];
        }
      }
      __syncthreads();  // all weights are there, no tops are in use

      if (value_group < GROUPS) {
        for (int b = value_group; b < WARPS && step + b * BLOCK < p.stop; b += GROUPS) {
          add_values(call, p, step + b * BLOCK, channel, value_levels, weights + b * BLOCK * ROWS, sums);
        }
      }
    }

    __syncthreads();  // no weights and no tops are in use
    float* group_sums = weights;  // [GROUPS - 1][VALUE_DIM][ROWS]
    if (value_group > 0 && value_group < GROUPS) {
      for (int c = 0; c < 2; ++c) {
        const int at = (value_group - 1) * VALUE_DIM + channel + c * VALUE_LANES;
#pragma unroll
        for (int row = 0; row < ROWS; ++row) group_sums[at * ROWS + row] = sums[c * ROWS + row];
      }
    }
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      float total = totals[row];
      for (int mask = 16; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
      if (lane == 0) by_warp[warp * ROWS + row] = total;
    }
    __syncthreads();  // the groups' sums and the totals are there

#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      if (p.first_row + row >= p.group_rows) break;
      const int64_t at =
          (int64_t(p.head_index) * p.group_rows + p.first_row + row) * p.parts + p.part;
      if (value_group == 0) {
        for (int c = 0; c < 2; ++c) {
          float sum = sums[c * ROWS + row];
          for (int g = 0; g < GROUPS - 1; ++g) {
            sum += group_sums[(g * VALUE_DIM + channel + c * VALUE_LANES) * ROWS + row];
          }
          all.outputs[at * VALUE_DIM + channel + c * VALUE_LANES] = sum;
        }
      }
      if (thread == row) {
        float total = 0.0f;
        for (int w = 0; w < WARPS; ++w) total += by_warp[w * ROWS + row];
        all.totals[at] = total;
        all.tops[at] = tops[row];
      }
    }
  }

  // scores[t] += <q, k> of tokens `index` and `index` + LANES; lanes behind the last token read it again.
  static DEVICE_FN void add_exact_keys(
      const rotormlx_attend_arguments& call, const Part& p, int index, const float* query, float* scores) {
    const int64_t head = p.batch * call.exact_keys_strides[0] + p.kv_head * call.exact_keys_strides[1];
    const int64_t first = head + min(index, p.stop - 1) * call.exact_keys_strides[2];
    const int64_t second = head + min(index + int(LANES), p.stop - 1) * call.exact_keys_strides[2];
    for (int i = 0; i < KEY_DIM; i += 8) {
      float x[8], y[8];
      load_eight(call.exact_keys, first + i, call.dtype, x);
      load_eight(call.exact_keys, second + i, call.dtype, y);
#pragma unroll
      for (int j = 0; j < 8; ++j) add_products(query + (i + j) * ROWS, x[j], y[j], scores);
    }
  }

  // The same for a packed block, with its scales and centre; also the scales of the tokens' values.
  static DEVICE_FN void add_packed_keys(
      const rotormlx_attend_arguments& call, const Part& p, int block, int lane, const float* levels,
      const float* query, float* scores, float* value_scale) {
    const rotormlx_packed& keys = call.keys;
    const rotormlx_packed& values = call.values;
    const uint* words = keys.words + p.batch * keys.words_strides[0] +
                        p.kv_head * keys.words_strides[1] + block * keys.words_strides[2];
    add_levels<KEY_BITS, KEY_DIM>(words, BLOCK, lane, lane + LANES, levels, query, scores);

    const __half* centre = static_cast<const __half*>(keys.centres) + p.batch * keys.centres_strides[0] +
                           p.kv_head * keys.centres_strides[1] + block * keys.centres_strides[2];
    float about_centre[ROWS];
#pragma unroll
    for (int row = 0; row < ROWS; ++row) about_centre[row] = 0.0f;
    for (int i = lane; i < KEY_DIM; i += LANES) {
      const float x = __half2float(centre[i]) * call.scale * LOG2_E;
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        const int query_row = min(p.first_row + row, p.group_rows - 1);
        const float number = loaded(call.q, query_at(call, p.batch, p.kv_head, query_row) + i, call.dtype);
        about_centre[row] = fmaf(x, number, about_centre[row]);
      }
    }
    const __half* key_scales = static_cast<const __half*>(keys.scales) + p.batch * keys.scales_strides[0] +
                               p.kv_head * keys.scales_strides[1] + block * keys.scales_strides[2];
    const __half* value_scales = static_cast<const __half*>(values.scales) +
                                 p.batch * values.scales_strides[0] +
                                 p.kv_head * values.scales_strides[1] + block * values.scales_strides[2];
    const float first_scale = __half2float(key_scales[lane]);
    const float second_scale = __half2float(key_scales[lane + LANES]);
    value_scale[0] = __half2float(value_scales[lane]);
    value_scale[1] = __half2float(value_scales[lane + LANES]);
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      for (int mask = 16; mask > 0; mask /= 2) about_centre[row] += shuffle_xor(about_centre[row], mask);
      scores[row] = fmaf(scores[row], first_scale, about_centre[row]);
      scores[ROWS + row] = fmaf(scores[ROWS + row], second_scale, about_centre[row]);
    }
  }

  // sums[c] += weights times values, for channels `channel` and `channel` + VALUE_LANES of the tokens of a block.
  static DEVICE_FN void add_values(
      const rotormlx_attend_arguments& call, const Part& p, int first_token, int channel,
      const float* levels, const float* weights, float* sums) {
    if (!p.exact) {
      const rotormlx_packed& values = call.values;
      const uint* words = values.words + p.batch * values.words_strides[0] +
                          p.kv_head * values.words_strides[1] + first_token / BLOCK * values.words_strides[2];
      add_levels<VALUE_BITS, BLOCK>(
          words, VALUE_DIM, channel, channel + VALUE_LANES, levels, weights, sums);
      return;
    }
    int64_t at = p.batch * call.exact_values_strides[0] + p.kv_head * call.exact_values_strides[1] +
                 first_token * call.exact_values_strides[2] + channel;
    const int count = min(int(BLOCK), p.stop - first_token);
    for (int i = 0; i < count; ++i, at += call.exact_values_strides[2]) {
      add_products(
          weights + i * ROWS, loaded(call.exact_values, at, call.dtype),
          loaded(call.exact_values, at + VALUE_LANES, call.dtype), sums);
    }
  }
};
