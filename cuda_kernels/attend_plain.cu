// Decode attention, first pass, without tensor cores, in float32: one part of the exact tokens, of any dtype, or of the
// packed tokens if queries are float32.
//
// The part is walked in steps. In a step each warp has one run: a block of packed tokens, or 32 exact tokens. Keys: a
// lane holds two packed tokens or one exact token, and sums over channels. Values: a thread holds two channels, and
// sums over tokens. The factors that all lanes of a loop need (a query, or the softmax weights) are in shared memory;
// all lanes read the same address.

template <int KEY_BITS, int VALUE_BITS, int KEY_DIM, int VALUE_DIM, int ROWS>
struct AttendPlain {
  enum {
    WARPS = 4,
    LANES = 32,
    THREADS = WARPS * LANES,
    // For the values, GROUPS groups of VALUE_LANES threads share the tokens of a step.
    VALUE_LANES = VALUE_DIM / 2,
    GROUPS = 4 * VALUE_LANES <= THREADS ? 4 : 2 * VALUE_LANES <= THREADS ? 2 : 1,
    EXACT_VALUES = 16,  // exact tokens that a group handles at once
    // Offsets in shared memory, in floats.
    QUERY = 0,                               // [KEY_DIM][ROWS]
    WEIGHTS = KEY_DIM * ROWS,                // [WARPS * BLOCK][ROWS]
    BY_WARP = WEIGHTS + WARPS * BLOCK * ROWS,  // [WARPS][ROWS]
    KEY_LEVELS = BY_WARP + WARPS * ROWS,     // [Stored<KEY_BITS>::LEVELS]
    VALUE_LEVELS = KEY_LEVELS + Stored<KEY_BITS>::LEVELS,
    SHARED_BYTES = 4 * (VALUE_LEVELS + Stored<VALUE_BITS>::LEVELS)
  };
  static_assert(VALUE_LANES <= THREADS, "a thread has two channels of the values");
  static_assert((GROUPS - 1) * VALUE_DIM <= WARPS * BLOCK, "the groups' sums must fit where the weights are");
  static_assert(ROWS % 4 == 0, "four rows are read at once");

  // sums[i][row] += factors[row] * numbers[i].
  template <int N>
  static DEVICE_FN void add_products(const float* factors, const float (&numbers)[N], float* sums) {
#pragma unroll
    for (int v = 0; v < ROWS; v += 4) {
      const float4 four = *reinterpret_cast<const float4*>(factors + v);
      const float factor[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[n * ROWS + v + i] = fmaf(factor[i], numbers[n], sums[n * ROWS + v + i]);
      }
    }
  }

  // Add the products of one block's levels and factors [AXIS][ROWS] to sums [2][ROWS], along the packed axis. `words`
  // is the first word of a lane of the words; this thread handles that lane and the next.
  template <int BITS, int AXIS>
  static DEVICE_FN void add_levels(
      const uint* words, int row_stride, const float* levels, const float* factors, float* sums) {
    constexpr int CODES = Word<BITS>::codes;
    constexpr int WORD_ROWS = (AXIS + CODES - 1) / CODES;
    uint2 before = {0, 0}, high = {0, 0};
    for (int row = 0; row < WORD_ROWS; ++row) {
      const uint2 word = *reinterpret_cast<const uint2*>(words + row * row_stride);
      if (BITS == 3) {
        // One word of the second plane belongs to two words of the first.
        if (row % 2 == 0) high = *reinterpret_cast<const uint2*>(words + (WORD_ROWS + row / 2) * row_stride);
        else high.x >>= 2, high.y >>= 2;
      }
      const Indices<uint> first = indices_of<BITS>(word.x, before.x, high.x);
      const Indices<uint> second = indices_of<BITS>(word.y, before.y, high.y);
      before = word;
#pragma unroll
      for (int field = 0; field < CODES; ++field) {
        const int i = row * CODES + field;
        // The word's fields past the last position carry no code.
        if (AXIS % CODES == 0 || i < AXIS) {
          const float two[2] = {
              levels[index_of_field<BITS>(first, field)], levels[index_of_field<BITS>(second, field)]};
          add_products(factors + i * ROWS, two, sums);
        }
      }
    }
  }

  static DEVICE_FN void run(const AttendParts& all, float* shared) {
    if (int(blockIdx.z) < all.exact_parts) run_part<true>(all, shared);
    else run_part<false>(all, shared);
  }

  template <bool EXACT>
  static DEVICE_FN void run_part(const AttendParts& all, float* shared) {
    // Tokens of a lane, of a warp and of all warps, and tokens that a group of the values handles at once.
    enum { HELD = EXACT ? 1 : 2, RUN = HELD * LANES, STEP = WARPS * RUN, UNIT = EXACT ? int(EXACT_VALUES) : BLOCK };
    const rotormlx_attend_arguments& call = all.call;
    const int thread = int(threadIdx.x);
    const int lane = thread % LANES, warp = thread / LANES;
    const Part p = part_of_block(all, ROWS);
    float* query = shared + QUERY;
    float* weights = shared + WEIGHTS;
    float* by_warp = shared + BY_WARP;
    const float* key_levels = shared + KEY_LEVELS;
    const float* value_levels = shared + VALUE_LEVELS;

    with_dtype(call.q, call.dtype, [&](const auto* q) {
      for_rows<KEY_DIM, ROWS, THREADS>(
          thread,
          [&](int r, int channel) {
            const int row = min(p.first_row + r, p.group_rows - 1);
            return EXACT ? to_float(q[query_at(call, p.batch, p.kv_head, row) + channel])
                         : all.rotated[(int64_t(p.head_index) * p.group_rows + row) * KEY_DIM + channel];
          },
          [&](int r, int channel, float x) { query[channel * ROWS + r] = x * (call.scale * LOG2_E); });
    });
    if (!EXACT) {
      fill_levels<KEY_BITS>(shared + KEY_LEVELS, uint(thread), uint(THREADS));
      fill_levels<VALUE_BITS>(shared + VALUE_LEVELS, uint(thread), uint(THREADS));
    }

    const int value_group = thread / VALUE_LANES;
    const int channel = 2 * (thread % VALUE_LANES);  // this thread has this channel and the next
    float tops[ROWS], totals[ROWS], sums[2 * ROWS];  // sums: [2][ROWS]
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      tops[row] = HIDDEN;
      totals[row] = sums[row] = sums[ROWS + row] = 0.0f;
    }
    __syncthreads();  // the query and the levels are there
    float noise[ROWS];
    if (!EXACT) measure_noise(query, lane, noise);

    for (int step = p.start; step < p.stop; step += STEP) {
      float scores[HELD * ROWS];  // [HELD][ROWS]
      float value_scale[2] = {1.0f, 1.0f};
#pragma unroll
      for (int i = 0; i < HELD * ROWS; ++i) scores[i] = 0.0f;
      const int run_start = step + warp * RUN;
      if (run_start < p.stop) {
        if (EXACT) add_exact_keys(call, p, run_start + lane, query, scores);
        else add_packed_keys(call, p, run_start / BLOCK, lane, key_levels, query, noise, scores, value_scale);
      }

#pragma unroll
      for (int i = 0; i < HELD * ROWS; ++i) {
        const int index = run_start + HELD * lane + i / ROWS;
        const int query_row = min(p.first_row + i % ROWS, p.group_rows - 1);
        scores[i] =
            index < p.stop ? masked(call, p, query_row, position_of(p, index), scores[i]) : HIDDEN;
      }
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        float top = scores[row];
        if (HELD == 2) top = fmaxf(top, scores[(HELD - 1) * ROWS + row]);
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
        for (int t = 0; t < HELD; ++t) {
          const float weight = share_of(scores[t * ROWS + row], top);
          totals[row] += weight;
          // The scale of a hidden token may hold any bits, even a NaN.
          weights[(warp * RUN + HELD * lane + t) * ROWS + row] =
              weight == 0.0f ? 0.0f : weight * value_scale[t];
        }
      }
      __syncthreads();  // all weights are there, no tops are in use

      if (value_group < GROUPS) {
        const int stop = min(step + STEP, p.stop);
        for (int token = step + value_group * UNIT; token < stop; token += GROUPS * UNIT) {
          const float* unit_weights = weights + (token - step) * ROWS;
          if (EXACT) add_exact_values(call, p, token, channel, unit_weights, sums);
          else add_packed_values(call, p, token / BLOCK, channel, value_levels, unit_weights, sums);
        }
      }
    }

    __syncthreads();  // no weights and no tops are in use
    float* group_sums = weights;  // [GROUPS - 1][VALUE_DIM][ROWS]
    if (value_group > 0 && value_group < GROUPS) {
      for (int c = 0; c < 2; ++c) {
        const int at = (value_group - 1) * VALUE_DIM + channel + c;
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
            sum += group_sums[(g * VALUE_DIM + channel + c) * ROWS + row];
          }
          all.outputs[at * VALUE_DIM + channel + c] = sum;
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

  // Half the variance that coding the keys adds to the scores of each row, for a scale of 1. The query is already
  // multiplied by log2(e), as the scores are, so its square has that factor once too often; the division removes it.
  static DEVICE_FN void measure_noise(const float* query, int lane, float* noise) {
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      noise[row] = 0.0f;
      for (int i = lane; i < KEY_DIM; i += LANES) {
        noise[row] = fmaf(query[i * ROWS + row], query[i * ROWS + row], noise[row]);
      }
      for (int mask = 16; mask > 0; mask /= 2) noise[row] += shuffle_xor(noise[row], mask);
      noise[row] *= score_noise(KEY_BITS) / LOG2_E;
    }
  }

  // scores += <q, k> for token `index`; lanes past the last token read that token again.
  static DEVICE_FN void add_exact_keys(
      const rotormlx_attend_arguments& call, const Part& p, int index, const float* query, float* scores) {
    const int64_t at = p.batch * call.exact_keys_strides[0] + p.kv_head * call.exact_keys_strides[1] +
                       min(index, p.stop - 1) * call.exact_keys_strides[2];
    with_dtype(call.exact_keys, call.dtype, [&](const auto* keys) {
      constexpr int EIGHTS = KEY_DIM / 8, BATCH = divisor(EIGHTS, 16 / sizeof(*keys));
      for (int start = 0; start < EIGHTS; start += BATCH) {
        decltype(load_numbers<8>(keys)) eights[BATCH];
#pragma unroll
        for (int n = 0; n < BATCH; ++n) eights[n] = load_numbers<8>(keys + at + 8 * (start + n));
#pragma unroll
        for (int n = 0; n < BATCH; ++n) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const float one[1] = {to_float(eights[n].all[i])};
            add_products(query + (8 * (start + n) + i) * ROWS, one, scores);
          }
        }
      }
    });
  }

  // The same for tokens 2 lane and 2 lane + 1 of a packed block, with its scales and centre. Also loads the scales of
  // the values of these tokens.
  static DEVICE_FN void add_packed_keys(
      const rotormlx_attend_arguments& call, const Part& p, int block, int lane, const float* levels,
      const float* query, const float* noise, float* scores, float* value_scale) {
    const rotormlx_packed& keys = call.keys;
    const rotormlx_packed& values = call.values;
    const uint* words = keys.words + p.batch * keys.words_strides[0] +
                        p.kv_head * keys.words_strides[1] + block * keys.words_strides[2];
    add_levels<KEY_BITS, KEY_DIM>(words + 2 * lane, BLOCK, levels, query, scores);

    const __half* centre = static_cast<const __half*>(keys.centres) + p.batch * keys.centres_strides[0] +
                           p.kv_head * keys.centres_strides[1] + block * keys.centres_strides[2];
    float about_centre[ROWS];
#pragma unroll
    for (int row = 0; row < ROWS; ++row) about_centre[row] = 0.0f;
    with_dtype(call.q, call.dtype, [&](const auto* q) {
      for (int i = lane; i < KEY_DIM; i += LANES) {
        const float x = __half2float(centre[i]) * call.scale * LOG2_E;
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
          const int query_row = min(p.first_row + row, p.group_rows - 1);
          const float number = to_float(q[query_at(call, p.batch, p.kv_head, query_row) + i]);
          about_centre[row] = fmaf(x, number, about_centre[row]);
        }
      }
    });
    const __half* key_scales = static_cast<const __half*>(keys.scales) + p.batch * keys.scales_strides[0] +
                               p.kv_head * keys.scales_strides[1] + block * keys.scales_strides[2];
    const __half* value_scales = static_cast<const __half*>(values.scales) +
                                 p.batch * values.scales_strides[0] +
                                 p.kv_head * values.scales_strides[1] + block * values.scales_strides[2];
    float key_scale[2];
    for (int t = 0; t < 2; ++t) {
      key_scale[t] = __half2float(key_scales[2 * lane + t]);
      value_scale[t] = __half2float(value_scales[2 * lane + t]);
    }
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      for (int mask = 16; mask > 0; mask /= 2) about_centre[row] += shuffle_xor(about_centre[row], mask);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const float score = fmaf(-noise[row], key_scale[t], scores[t * ROWS + row]);
        scores[t * ROWS + row] = fmaf(score, key_scale[t], about_centre[row]);
      }
    }
  }

  // sums[c] += weights times values, for channels `channel` and `channel` + 1 of EXACT_VALUES tokens. Past the last
  // token, which is read again, the weights are zero.
  static DEVICE_FN void add_exact_values(
      const rotormlx_attend_arguments& call, const Part& p, int first_token, int channel,
      const float* weights, float* sums) {
    const int64_t at = p.batch * call.exact_values_strides[0] + p.kv_head * call.exact_values_strides[1] + channel;
    with_dtype(call.exact_values, call.dtype, [&](const auto* values) {
      decltype(load_numbers<2>(values)) pairs[EXACT_VALUES];
#pragma unroll
      for (int i = 0; i < EXACT_VALUES; ++i) {
        pairs[i] = load_numbers<2>(values + at + min(first_token + i, p.stop - 1) * call.exact_values_strides[2]);
      }
#pragma unroll
      for (int i = 0; i < EXACT_VALUES; ++i) {
        const float two[2] = {to_float(pairs[i].all[0]), to_float(pairs[i].all[1])};
        add_products(weights + i * ROWS, two, sums);
      }
    });
  }

  // The same for the tokens of a packed block.
  static DEVICE_FN void add_packed_values(
      const rotormlx_attend_arguments& call, const Part& p, int block, int channel, const float* levels,
      const float* weights, float* sums) {
    const rotormlx_packed& values = call.values;
    const uint* words = values.words + p.batch * values.words_strides[0] +
                        p.kv_head * values.words_strides[1] + block * values.words_strides[2];
    add_levels<VALUE_BITS, BLOCK>(words + channel, VALUE_DIM, levels, weights, sums);
  }
};
