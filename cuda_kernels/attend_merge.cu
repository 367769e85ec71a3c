// Decode attention, last pass: the parts of a query row become its output. The packed parts are in the rotated space
// of the values; their sum is rotated back once.

// Shared memory of a thread block of ROWS query rows, in floats: packed sums [ROWS][VALUE_DIM], and behind them first
// the shares of the parts, [ROWS][MAX_PARTS], then the products of multiply_rows.
template <int VALUE_DIM, int ROWS, int THREADS>
struct MergeShape {
  enum {
    REST = ROWS * VALUE_DIM,
    PRODUCTS = THREADS / 32 * ROWS * VALUE_DIM,
    ALL = REST + (PRODUCTS > ROWS * MAX_PARTS ? PRODUCTS : ROWS * MAX_PARTS)
  };
};

// ROWS query rows of a KV head in a thread block of THREADS; the grid is tiles of rows x [B, K].
template <int VALUE_DIM, int ROWS, int THREADS>
DEVICE_FN void merge_parts(const AttendParts& all, float* packed_sums) {  // shared, see MergeShape
  constexpr int CHANNELS = (VALUE_DIM + THREADS - 1) / THREADS;
  const rotormlx_attend_arguments& call = all.call;
  const int thread = int(threadIdx.x);
  const int head_index = int(blockIdx.y);
  const int kv_head = head_index % call.kv_heads;
  const int group_rows = call.heads / call.kv_heads * call.length;
  const int parts = all.exact_parts + all.packed_parts;
  const int first_row = int(blockIdx.x) * ROWS;
  float* shares = packed_sums + MergeShape<VALUE_DIM, ROWS, THREADS>::REST;

  // What each part counts for, and nothing behind the last: a warp takes a row.
  for (int r = thread / 32; r < ROWS; r += THREADS / 32) {
    const int lane = thread % 32;
    const int row = min(first_row + r, group_rows - 1);
    const int64_t first_part = (int64_t(head_index) * group_rows + row) * parts;
    float tops[MAX_PARTS / 32], totals[MAX_PARTS / 32];
    float top = HIDDEN, total = 0.0f;
#pragma unroll
    for (int i = 0; i < MAX_PARTS / 32; ++i) {
      const int part = 32 * i + lane;
      const bool exists = part < parts;
      tops[i] = exists ? all.tops[first_part + part] : HIDDEN;
      totals[i] = exists ? all.totals[first_part + part] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < MAX_PARTS / 32; ++i) top = fmaxf(top, tops[i]);
    for (int mask = 16; mask > 0; mask /= 2) top = fmaxf(top, shuffle_xor(top, mask));
    float sink = HIDDEN;
    if (call.sink_logits != nullptr) {
      sink = call.sink_logits[kv_head * (call.heads / call.kv_heads) + row / call.length] * LOG2_E;
      top = fmaxf(top, sink);
    }
#pragma unroll
    for (int i = 0; i < MAX_PARTS / 32; ++i) {
      tops[i] = share_of(tops[i], top);
      total = fmaf(tops[i], totals[i], total);
    }
    for (int mask = 16; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
    total += share_of(sink, top);
    // A query that sees nothing has a total of zero.
    const float factor = total == 0.0f ? 0.0f : __fdividef(1.0f, total);
#pragma unroll
    for (int i = 0; i < MAX_PARTS / 32; ++i) shares[r * MAX_PARTS + 32 * i + lane] = tops[i] * factor;
  }
  __syncthreads();  // the shares are there

  float exact_sums[ROWS][CHANNELS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int row = min(first_row + r, group_rows - 1);
    const float* outputs = all.outputs + (int64_t(head_index) * group_rows + row) * parts * VALUE_DIM;
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const int channel = c * THREADS + thread;
      float packed_sum = 0.0f;
      exact_sums[r][c] = 0.0f;
      if (channel < VALUE_DIM) {
        constexpr int BATCH = 16;
        for (int start = 0; start < parts; start += BATCH) {
          float x[BATCH];
#pragma unroll
          for (int i = 0; i < BATCH; ++i) x[i] = outputs[min(start + i, parts - 1) * VALUE_DIM + channel];
#pragma unroll
          for (int i = 0; i < BATCH; ++i) {
            const float share = shares[r * MAX_PARTS + start + i];
            if (start + i < all.exact_parts) exact_sums[r][c] = fmaf(share, x[i], exact_sums[r][c]);
            else packed_sum = fmaf(share, x[i], packed_sum);
          }
        }
        packed_sums[r * VALUE_DIM + channel] = packed_sum;
      }
    }
  }
  float* products = shares;  // no longer in use behind the barrier in multiply_rows
  if (all.packed_parts > 0) {
    const float* matrix = call.value_matrix + kv_head * call.value_matrix_stride;
    multiply_rows<VALUE_DIM, ROWS, THREADS / 32>(packed_sums, matrix, thread / 32, thread % 32, products);
    __syncthreads();  // the products of the sums are there
  }

#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    const int channel = c * THREADS + thread;
    if (channel < VALUE_DIM) {
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
        const float x = all.packed_parts == 0 ? 0.0f : product<VALUE_DIM, ROWS, THREADS / 32>(products, r, channel);
        store(call.out, at, call.dtype, fmaf(x, factor, exact_sums[r][c]));
      }
    }
  }
}
