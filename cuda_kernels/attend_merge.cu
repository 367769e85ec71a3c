// Decode attention, last pass: the parts of a query row become its output. The packed parts are in the rotated space of the
// values; their sum is rotated back once.

// ROWS query rows of a KV head in a thread block of THREADS; the grid is tiles of rows x [B, K].
template <int VALUE_DIM, int ROWS, int THREADS>
DEVICE_FN void merge_parts(const AttendParts& all, float* packed_sums) {  // shared, [ROWS][VALUE_DIM]
  constexpr int CHANNELS = (VALUE_DIM + THREADS - 1) / THREADS;
  const rotormlx_attend_arguments& call = all.call;
  const int thread = int(threadIdx.x);
  const int head_index = int(blockIdx.y);
  const int kv_head = head_index % call.kv_heads;
  const int group_rows = call.heads / call.kv_heads * call.length;
  const int parts = all.packed_parts + all.exact_parts;
  const int first_row = int(blockIdx.x) * ROWS;

  float totals[ROWS], exact_sums[ROWS][CHANNELS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int row = min(first_row + r, group_rows - 1);
    const int64_t first_part = (int64_t(head_index) * group_rows + row) * parts;
    float top = HIDDEN, total = 0.0f;
    for (int part = 0; part < parts; ++part) top = fmaxf(top, all.tops[first_part + part]);
    if (call.sinks != nullptr) {
      const int head = kv_head * (call.heads / call.kv_heads) + row / call.length;
      const float sink = call.sinks[head] * LOG2_E;
      top = fmaxf(top, sink);
      total = power_of_two(sink - top);
    }
    for (int part = 0; part < parts; ++part) {
      total = fmaf(share_of(all.tops[first_part + part], top), all.totals[first_part + part], total);
    }
    totals[r] = total;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const int channel = c * THREADS + thread;
      float packed_sum = 0.0f, exact_sum = 0.0f;
      if (channel < VALUE_DIM) {
        for (int part = 0; part < parts; ++part) {
          const float share = share_of(all.tops[first_part + part], top);
          const float x = all.outputs[(first_part + part) * VALUE_DIM + channel];
          if (part < all.packed_parts) packed_sum = fmaf(share, x, packed_sum);
          else exact_sum = fmaf(share, x, exact_sum);
        }
        packed_sums[r * VALUE_DIM + channel] = packed_sum;
      }
      exact_sums[r][c] = exact_sum;
    }
  }
  __syncthreads();  // the packed sums are there

#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    const int channel = c * THREADS + thread;
    if (channel < VALUE_DIM) {
      float x[ROWS];
      if (all.packed_parts > 0) {
        multiply_rows<VALUE_DIM, ROWS>(packed_sums, call.value_matrix, channel, x);
      } else {
        for (int r = 0; r < ROWS; ++r) x[r] = 0.0f;
      }
      const float* scale = call.value_channel_scale;
      const int64_t scale_at = head_index / call.kv_heads * call.value_channel_scale_stride +
                               kv_head * VALUE_DIM + channel;
      const float factor = all.packed_parts == 0 || scale == nullptr ? 1.0f : scale[scale_at];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        if (first_row + r >= group_rows) break;
        const int row = first_row + r;
        const int head = kv_head * (call.heads / call.kv_heads) + row / call.length;
        const int64_t at =
            ((int64_t(head_index / call.kv_heads) * call.heads + head) * call.length + row % call.length) *
                VALUE_DIM + channel;
        // A query that sees nothing has a total of zero.
        store(
            call.out, at, call.dtype,
            totals[r] == 0.0f ? 0.0f : fmaf(x[r], factor, exact_sums[r][c]) / totals[r]);
      }
    }
  }
}
