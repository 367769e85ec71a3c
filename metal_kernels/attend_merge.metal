// Attention on packed bytes, last pass: the parts of a query row become its output. The packed parts are
// in the rotated space of the values; their sum is rotated back once.

// kernel body
// Template: T (dtype of the output), VALUE_DIM, MATRICES, ROWS, THREADS, HAS_SCALE, HAS_SINK_LOGITS.
//
// tops, totals   float32 [B, K, rows, parts], rows >= G; outputs: float32 [B, K, rows, parts, VALUE_DIM]
// unrotation     float32 [MATRICES, VALUE_DIM, VALUE_DIM], K matrices or 1: rows times it are rotated back
// channel_scale  float32 [B, K, VALUE_DIM], if HAS_SCALE
// sink_logits          float32 [H], if HAS_SINK_LOGITS: attention-sink logits
// plan           int32 [6], as in the first pass
// output         T [B, H, L, VALUE_DIM]
constexpr int CHANNELS = (VALUE_DIM + THREADS - 1) / THREADS;
threadgroup float packed_sums[ROWS * VALUE_DIM];

const int thread_index = int(thread_index_in_threadgroup);
const int kv_heads = tops_shape[1];
const int parts = tops_shape[3];
const int length = plan[4];
const int group_rows = plan[5];
const int head_index = int(threadgroup_position_in_grid.z);  // of [B, K]
const int kv_head = head_index % kv_heads;
const int packed_parts = plan[1];
const int first_row = int(threadgroup_position_in_grid.y) * ROWS;

float totals_of_rows[ROWS];
float exact_sums[ROWS * CHANNELS];  // [ROWS][CHANNELS]
for (int r = 0; r < ROWS; ++r) {
  const int row = min(first_row + r, group_rows - 1);
  const int64_t first_part = (int64_t(head_index) * tops_shape[2] + row) * parts;
  float top = HIDDEN, total = 0.0f;
  for (int part = 0; part < parts; ++part) top = max(top, tops[first_part + part]);
  if (HAS_SINK_LOGITS) {
    const float sink = sink_logits[kv_head * (group_rows / length) + row / length];
    top = max(top, sink);
    total = exp(sink - top);
  }
  for (int part = 0; part < parts; ++part) {
    total += share_of(tops[first_part + part], top) * totals[first_part + part];
  }
  totals_of_rows[r] = total;

  for (int c = 0; c < CHANNELS; ++c) {
    const int channel = c * THREADS + thread_index;
    float packed_sum = 0.0f, exact_sum = 0.0f;
    if (channel < VALUE_DIM) {
      for (int part = 0; part < parts; ++part) {
        const float x = share_of(tops[first_part + part], top) *
                        outputs[(first_part + part) * VALUE_DIM + channel];
        if (part < packed_parts) packed_sum += x;
        else exact_sum += x;
      }
      packed_sums[r * VALUE_DIM + channel] = packed_sum;
    }
    exact_sums[r * CHANNELS + c] = exact_sum;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);  // the packed sums are there

for (int c = 0; c < CHANNELS; ++c) {
  const int channel = c * THREADS + thread_index;
  if (channel < VALUE_DIM) {
    float x[ROWS];
    for (int r = 0; r < ROWS; ++r) x[r] = 0.0f;
    if (packed_parts > 0) {
      for (int i = 0; i < VALUE_DIM; ++i) {
        const float entry = unrotation[(kv_head % MATRICES * VALUE_DIM + i) * VALUE_DIM + channel];
        for (int r = 0; r < ROWS; ++r) x[r] = fma(packed_sums[r * VALUE_DIM + i], entry, x[r]);
      }
      if (HAS_SCALE) {
        for (int r = 0; r < ROWS; ++r) x[r] *= channel_scale[head_index * VALUE_DIM + channel];
      }
    }
    for (int r = 0; r < ROWS && first_row + r < group_rows; ++r) {
      const float total = totals_of_rows[r];
      const int64_t row = int64_t(head_index) * group_rows + first_row + r;
      // A query that sees nothing has a total of zero.
      output[row * VALUE_DIM + channel] =
          T(total == 0.0f ? 0.0f : (x[r] + exact_sums[r * CHANNELS + c]) / total);
    }
  }
}
