// Decode attention, before the first pass: queries are multiplied by the channel scale of the keys and rotated, once, as the
// levels of the keys will meet them.

// ROWS query rows of a KV head in a thread block of THREADS; the grid is tiles of rows x [B, K].
template <int KEY_DIM, int ROWS, int THREADS>
DEVICE_FN void rotate_queries(const AttendParts& all, float* rows) {  // rows: shared, [ROWS][KEY_DIM]
  const rotormlx_attend_arguments& call = all.call;
  const int head_index = int(blockIdx.y);
  const int batch = head_index / call.kv_heads, kv_head = head_index % call.kv_heads;
  const int group_rows = call.heads / call.kv_heads * call.length;
  const int first_row = int(blockIdx.x) * ROWS;
  for (int i = int(threadIdx.x); i < ROWS * KEY_DIM; i += THREADS) {
    const int row = min(first_row + i / KEY_DIM, group_rows - 1), channel = i % KEY_DIM;
    const float x = loaded(call.q, query_at(call, batch, kv_head, row) + channel, call.dtype);
    const float* scale = call.key_channel_scale;
    const int64_t scale_at = batch * call.key_channel_scale_stride + kv_head * KEY_DIM + channel;
    rows[i] = scale == nullptr ? x : x * scale[scale_at];
  }
  __syncthreads();  // the rows are there
  for (int channel = int(threadIdx.x); channel < KEY_DIM; channel += THREADS) {
    float x[ROWS];
    multiply_rows<KEY_DIM, ROWS>(rows, call.key_matrix, channel, x);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (first_row + r < group_rows) {
        all.rotated[(int64_t(head_index) * group_rows + first_row + r) * KEY_DIM + channel] = x[r];
      }
    }
  }
}
