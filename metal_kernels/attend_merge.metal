// Attention on packed bytes, last pass: merge the parts of each query row into its output. The sums of packed parts are
// in the rotated space of the values; their merged sum is rotated back once.

// sums[i] += share * number, over every `step`-th part from `first` on, for four neighbouring channels.
METAL_FUNC void add_parts(
    const device float* outputs, int dim,  // [parts][dim], from the first of the four channels on
    threadgroup const float* shares,       // [parts]
    int first, int stop, int step, thread float* sums) {  // [4]
  for (int part = first; part < stop; part += step) {
    const float share = shares[part];
    const float4 numbers = *(const device float4*)(outputs + part * dim);
    UNROLL
    for (int i = 0; i < 4; ++i) sums[i] = fma(share, numbers[i], sums[i]);
  }
}

// kernel body
// Template: T (dtype of the output), ROWS, THREADS, MOST_PARTS, VALUE_MATRICES, HAS_VALUE_SCALE, HAS_SINK_LOGITS, as in
// attend.metal. ValueRotation fixes the head dim.
//
// tops, totals   float32 [B, K, rows, parts], rows >= G; outputs: float32 [B, K, rows, parts, VALUE_DIM]
// value_rotation, value_channel_scale, sink_logits, plan, output: as in attend.metal
constexpr int VALUE_DIM = ValueRotation::D;
constexpr int SIMDGROUPS = THREADS / 32;
constexpr int CHANNEL_LANES = VALUE_DIM / 4;          // threads that together hold all channels of a part
constexpr int SHARERS = THREADS / CHANNEL_LANES;      // groups of threads that take the parts in turn
static_assert(CHANNEL_LANES <= THREADS, "the threads have all channels");

threadgroup float shares[ROWS * MOST_PARTS];          // [ROWS][MOST_PARTS]
threadgroup float totals_of_rows[ROWS];
threadgroup float sums_of_sharers[2 * SHARERS * VALUE_DIM];  // [2][SHARERS][VALUE_DIM]
threadgroup float packed_sums[VALUE_DIM * ROWS];      // [VALUE_DIM][ROWS]
threadgroup float exact_sums[VALUE_DIM * ROWS];

const int thread_index = int(thread_index_in_threadgroup);
const int lane = int(thread_index_in_simdgroup);
const int kv_heads = tops_shape[1];
const int parts = tops_shape[3];
const int length = plan[4];
const int group_rows = plan[5];
const int head_index = int(threadgroup_position_in_grid.z);  // of [B, K]
const int batch = head_index / kv_heads, kv_head = head_index % kv_heads;
const int packed_parts = plan[1];
const int first_row = int(threadgroup_position_in_grid.y) * ROWS;

// Shares of the parts and totals of the rows: one row per simdgroup, its lanes over the parts.
for (int r = int(simdgroup_index_in_threadgroup); r < ROWS; r += SIMDGROUPS) {
  const int row = min(first_row + r, group_rows - 1);
  const int64_t first_part = (int64_t(head_index) * tops_shape[2] + row) * parts;
  const auto row_tops = tops + first_part;
  const auto row_totals = totals + first_part;
  float top = HIDDEN, total = 0.0f;
  for (int part = lane; part < parts; part += 32) top = max(top, row_tops[part]);
  top = simd_max(top);
  if (HAS_SINK_LOGITS) {
    const int head = kv_head * (group_rows / length) + row / length;
    const float sink = float(sink_logits[head * sink_logits_strides[0]]);
    top = max(top, sink);
    if (lane == 0) total = exp(sink - top);
  }
  for (int part = lane; part < parts; part += 32) {
    const float share = share_of(row_tops[part], top);
    shares[r * MOST_PARTS + part] = share;
    total = fma(share, row_totals[part], total);
  }
  total = simd_sum(total);
  if (lane == 0) totals_of_rows[r] = total;
}

const int sharer = thread_index / CHANNEL_LANES;
const int channel = thread_index % CHANNEL_LANES * 4;  // the first of 4 channels
for (int r = 0; r < ROWS; ++r) {
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the shares are there, no sums are in use
  if (sharer < SHARERS) {
    const int row = min(first_row + r, group_rows - 1);
    const auto row_outputs = outputs + (int64_t(head_index) * tops_shape[2] + row) * parts * VALUE_DIM + channel;
    float packed[4], exact[4];
    UNROLL
    for (int i = 0; i < 4; ++i) packed[i] = exact[i] = 0.0f;
    add_parts(row_outputs, VALUE_DIM, shares + r * MOST_PARTS, sharer, packed_parts, SHARERS, packed);
    add_parts(row_outputs, VALUE_DIM, shares + r * MOST_PARTS, packed_parts + sharer, parts, SHARERS, exact);
    UNROLL
    for (int i = 0; i < 4; ++i) {
      sums_of_sharers[sharer * VALUE_DIM + channel + i] = packed[i];
      sums_of_sharers[(SHARERS + sharer) * VALUE_DIM + channel + i] = exact[i];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);  // the sums of the sharers are there
  for (int c = thread_index; c < VALUE_DIM; c += THREADS) {
    float packed = 0.0f, exact = 0.0f;
    for (int s = 0; s < SHARERS; ++s) {
      packed += sums_of_sharers[s * VALUE_DIM + c];
      exact += sums_of_sharers[(SHARERS + s) * VALUE_DIM + c];
    }
    packed_sums[c * ROWS + r] = packed;
    exact_sums[c * ROWS + r] = exact;
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);  // the packed sums are there
if (packed_parts > 0) {
  rotate_in_place<ValueRotation, true, ROWS, THREADS>(
      packed_sums, value_rotation + kv_head % VALUE_MATRICES * (VALUE_DIM * VALUE_DIM), thread_index);
}
threadgroup_barrier(mem_flags::mem_threadgroup);  // the rotated sums are there

const auto head_scale = value_channel_scale + (batch * plan[8] + kv_head * VALUE_DIM);
for (int i = thread_index; i < VALUE_DIM * ROWS; i += THREADS) {
  const int c = i % VALUE_DIM, r = i / VALUE_DIM;
  if (first_row + r < group_rows) {
    const float total = totals_of_rows[r];
    const float packed = HAS_VALUE_SCALE ? packed_sums[c * ROWS + r] * head_scale[c] : packed_sums[c * ROWS + r];
    const int64_t row = int64_t(head_index) * group_rows + first_row + r;
    // A query that sees no token has a total of zero.
    output[row * VALUE_DIM + c] = T(total == 0.0f ? 0.0f : (packed + exact_sums[c * ROWS + r]) / total);
  }
}
