// Decode attention, before the first pass: multiply the queries by the channel scale of the keys and rotate them, once,
// so that they match the levels of the packed keys.

// Shared memory of a thread block of ROWS query rows, in floats.
template <int KEY_DIM, int ROWS, int THREADS>
struct QueryShape {
  enum { PRODUCTS = ROWS * KEY_DIM, ALL = PRODUCTS + THREADS / 32 * ROWS * KEY_DIM };  // see multiply_rows
};

// Rotate ROWS query rows of a KV head with a thread block of THREADS threads; the grid is tiles of rows x [B, K].
template <int KEY_DIM, int ROWS, int THREADS>
DEVICE_FN void rotate_queries(const AttendParts& all, float* rows) {  // shared, [ROWS][KEY_DIM], and see QueryShape
  const rotormlx_attend_arguments& call = all.call;
  const int thread = int(threadIdx.x);
  const int head_index = int(blockIdx.y);
  const int batch = head_index / call.kv_heads, kv_head = head_index % call.kv_heads;
  const int group_rows = call.heads / call.kv_heads * call.length;
  const int first_row = int(blockIdx.x) * ROWS;
  const float* scale = call.key_channel_scale;
  const int64_t scale_at = batch * call.key_channel_scale_stride + kv_head * KEY_DIM;
  with_dtype(call.q, call.dtype, [&](const auto* q) {
    for_rows<KEY_DIM, ROWS, THREADS>(
        thread,
        [&](int r, int channel) {
          const int row = min(first_row + r, group_rows - 1);
          const float x = to_float(q[query_at(call, batch, kv_head, row) + channel]);
          return scale == nullptr ? x : x * scale[scale_at + channel];
        },
        [&](int r, int channel, float x) { rows[r * KEY_DIM + channel] = x; });
  });
  float* products = rows + QueryShape<KEY_DIM, ROWS, THREADS>::PRODUCTS;
  const float* matrix = call.key_matrix + kv_head * call.key_matrix_stride;
  multiply_rows<KEY_DIM, ROWS, THREADS / 32>(rows, matrix, thread / 32, thread % 32, products);
  __syncthreads();  // the products of the rows are there
  for (int i = thread; i < ROWS * KEY_DIM; i += THREADS) {
    const int row = first_row + i / KEY_DIM, channel = i % KEY_DIM;
    if (row < group_rows) {
      all.rotated[(int64_t(head_index) * group_rows + row) * KEY_DIM + channel] =
          product<KEY_DIM, ROWS, THREADS / 32>(products, i / KEY_DIM, channel);
    }
  }
}
