// Decode attention, last pass: merge the parts of each query row into its output. The sums of packed parts are in the
// rotated space of the values; their merged sum is rotated back once.

// Shared memory, in floats, of a thread block of ROWS query rows: sums of packed and of exact parts,
// [SHARERS][ROWS][VALUE_DIM] each; then the shares of the parts in a row, [MAX_PARTS] per warp, which the products of
// multiply_rows later replace.
template <int VALUE_DIM, int ROWS, int THREADS>
struct MergeShape {
  enum {
    WARPS = THREADS / 32,
    SHARERS = ROWS < WARPS ? WARPS / ROWS : 1,  // warps that take the parts of a row in turn
    SUMS = SHARERS * ROWS * VALUE_DIM,
    REST = 2 * SUMS,
    PRODUCTS = WARPS * ROWS * VALUE_DIM,
    ALL = REST + (PRODUCTS > WARPS * MAX_PARTS ? PRODUCTS : WARPS * MAX_PARTS)
  };
};

// The share of each part in a query row, and zero past the last part. A warp computes them for itself. A barrier of the
// warp must follow.
DEVICE_FN void find_shares(
    const AttendParts& all, int kv_head, int row, int64_t first_part, int parts, int lane, float* shares) {
  const rotormlx_attend_arguments& call = all.call;
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
  // A query that sees no token has a total of zero.
  const float factor = total == 0.0f ? 0.0f : __fdividef(1.0f, total);
#pragma unroll
  for (int i = 0; i < MAX_PARTS / 32; ++i) shares[32 * i + lane] = tops[i] * factor;
}

// Sum every `sharers`-th part of a query row, from `sharer` on, into packed_sums and exact_sums, [VALUE_DIM] each. One
// warp does this. The first BATCH outputs are loaded while the shares are computed, so that only memory latency
// remains. shares: shared memory of this warp, [MAX_PARTS].
template <int VALUE_DIM, int BATCH>
DEVICE_FN void add_parts(const AttendParts& all, int row, int sharer, int sharers, float* shares, float* packed_sums,
                         float* exact_sums) {
  const rotormlx_attend_arguments& call = all.call;
  const int lane = int(threadIdx.x) % 32, head_index = int(blockIdx.y);
  const int group_rows = call.heads / call.kv_heads * call.length;
  const int parts = all.exact_parts + all.packed_parts;
  const int64_t first_part = (int64_t(head_index) * group_rows + row) * parts;
  const float* outputs = all.outputs + first_part * VALUE_DIM;
  float4 x[BATCH];  // four channels of this lane, of parts `start` + i sharers
  const auto load = [&](int start, int column) {
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      // Past the last part, or the last column, read the last again.
      const int part = min(start + i * sharers, parts - 1);
      x[i] = *reinterpret_cast<const float4*>(outputs + part * VALUE_DIM + min(column, VALUE_DIM - 4));
    }
  };
  if (parts > 0) load(sharer, 4 * lane);
  __syncwarp();  // no shares are in use
  find_shares(all, head_index % call.kv_heads, row, first_part, parts, lane, shares);
  __syncwarp();  // the shares are there
  for (int column = 4 * lane; column < VALUE_DIM; column += 4 * 32) {
    float packed[4] = {0.0f, 0.0f, 0.0f, 0.0f}, exact[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int start = sharer; start < parts; start += BATCH * sharers) {
      if (start > sharer || column >= 4 * 32) load(start, column);
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
        const int part = start + i * sharers;
        const float share = part < parts ? shares[part] : 0.0f;
        const float four[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (part < all.exact_parts) exact[c] = fmaf(share, four[c], exact[c]);
          else packed[c] = fmaf(share, four[c], packed[c]);
        }
      }
    }
    for (int c = 0; c < 4; ++c) {
      packed_sums[column + c] = packed[c];
      exact_sums[column + c] = exact[c];
    }
  }
}

// Store one number of the output, for a query row of KV head `head_index` of [B, K]. `packed` is rotated back, but not
// yet multiplied by its channel scale.
template <int VALUE_DIM>
DEVICE_FN void store_output(const AttendParts& all, int head_index, int row, int channel, float packed, float exact) {
  const rotormlx_attend_arguments& call = all.call;
  const int batch = head_index / call.kv_heads, kv_head = head_index % call.kv_heads;
  const float* scale = call.value_channel_scale;
  const int64_t scale_at = batch * call.value_channel_scale_stride + kv_head * VALUE_DIM + channel;
  const float factor = all.packed_parts == 0 || scale == nullptr ? 1.0f : scale[scale_at];
  const int head = kv_head * (call.heads / call.kv_heads) + row / call.length;
  const int64_t at =
      ((int64_t(batch) * call.heads + head) * call.length + row % call.length) * VALUE_DIM + channel;
  store(call.out, at, call.dtype, fmaf(packed, factor, exact));
}

// Merge ROWS query rows of a KV head with a thread block of THREADS threads; the grid is tiles of rows x [B, K]. With
// one row, a warp has a quarter of the parts.
template <int VALUE_DIM, int ROWS, int THREADS>
DEVICE_FN void merge_parts(const AttendParts& all, float* packed_sums) {  // shared, see MergeShape
  using Shape = MergeShape<VALUE_DIM, ROWS, THREADS>;
  constexpr int CHANNELS = (VALUE_DIM + THREADS - 1) / THREADS, SHARERS = Shape::SHARERS;
  constexpr int BATCH = ROWS == 1 ? 16 : 4;  // loads in flight; with several rows, other warps have loads in flight too
  const rotormlx_attend_arguments& call = all.call;
  const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int head_index = int(blockIdx.y);
  const int kv_head = head_index % call.kv_heads;
  const int group_rows = call.heads / call.kv_heads * call.length;
  const int first_row = int(blockIdx.x) * ROWS;
  float* exact_sums = packed_sums + Shape::SUMS;
  float* shares = packed_sums + Shape::REST;

  const int sharer = warp % SHARERS;
  for (int r = warp / SHARERS; r < ROWS; r += Shape::WARPS / SHARERS) {
    const int at = (sharer * ROWS + r) * VALUE_DIM;
    add_parts<VALUE_DIM, BATCH>(all, min(first_row + r, group_rows - 1), sharer, SHARERS, shares + warp * MAX_PARTS,
                                packed_sums + at, exact_sums + at);
  }
  __syncthreads();  // the sums of all warps are there
  const auto of_sharers = [&](const float* sums, int i) {
    float sum = 0.0f;
    for (int s = 0; s < SHARERS; ++s) sum += sums[s * ROWS * VALUE_DIM + i];
    return sum;
  };
  for (int i = thread; i < ROWS * VALUE_DIM; i += THREADS) packed_sums[i] = of_sharers(packed_sums, i);
  float* products = shares;  // no longer in use
  if (all.packed_parts > 0) {
    const float* matrix = call.value_matrix + kv_head * call.value_matrix_stride;
    multiply_rows<VALUE_DIM, ROWS, THREADS / 32>(packed_sums, matrix, warp, lane, products);
    __syncthreads();  // the products of the sums are there
  }

#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) {
    const int channel = c * THREADS + thread;
    if (channel < VALUE_DIM) {
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        if (first_row + r >= group_rows) break;
        const float x = all.packed_parts == 0 ? 0.0f : product<VALUE_DIM, ROWS, THREADS / 32>(products, r, channel);
        store_output<VALUE_DIM>(all, head_index, first_row + r, channel, x,
                                of_sharers(exact_sums, r * VALUE_DIM + channel));
      }
    }
  }
}
