// Parts, masks, loads and stores, shared by the attention kernels. Scores and their maxima are multiplied by log2(e),
// so that softmax uses powers of two.
#pragma once

#include "launch.h"

// The largest number of parts of a sequence.
constexpr int MAX_PARTS = 512;

// What one call works on: how the sequence is divided into parts, and the buffers that pass results between kernels. A
// part is a run of exact tokens or of packed tokens; exact parts come first. A KV head has G = H / K * L query rows.
struct AttendParts {
  rotormlx_attend_arguments call;
  int32_t exact_parts, exact_part_tokens;
  int32_t packed_parts, packed_part_tokens;
  float* rotated;  // [B, K, G, KEY_DIM]: the queries, times the channel scale, rotated
  float* tops;     // [B, K, G, parts]: the largest score, or the base used in its place
  float* totals;   // [B, K, G, parts]: sum of 2^(score - top)
  float* outputs;  // [B, K, G, parts, VALUE_DIM]: sum of 2^(score - top) value; rotated in packed parts
};

// The score of a hidden token. It is finite, so that the difference of two such scores is a number.
constexpr float HIDDEN = -3.402823466e38f;
constexpr float LOG2_E = 1.44269504f;

// 2^(x - top), or 0 for a hidden score.
DEVICE_FN float share_of(float x, float top) { return x <= HIDDEN ? 0.0f : power_of_two(x - top); }

// ---- loads: a thread starts several before it uses one, so that their latencies overlap

// Call use(x) with x as a pointer to its dtype, so that the dtype is tested once and not for every number.
template <typename Use>
DEVICE_FN void with_dtype(const void* x, int dtype, const Use& use) {
  if (dtype == ROTORMLX_FLOAT16) use(static_cast<const __half*>(x));
  else if (dtype == ROTORMLX_BFLOAT16) use(static_cast<const __nv_bfloat16*>(x));
  else use(static_cast<const float*>(x));
}

// The largest divisor of `count` that is at most `most`.
__host__ __device__ constexpr int divisor(int count, int most) {
  while (count % most != 0) --most;
  return most;
}

// N neighbouring numbers of 4, 8 or a multiple of 16 bytes in all. In memory they start at a multiple of that size, or
// of 16 bytes.
template <typename T, int N>
struct Numbers {
  alignas(16) T all[N];
};

template <int N, typename T>
DEVICE_FN Numbers<T, N> load_numbers(const T* x) {
  constexpr int BYTES = N * sizeof(T);
  Numbers<T, N> made;
  if (BYTES == 4) *reinterpret_cast<uint*>(made.all) = *reinterpret_cast<const uint*>(x);
  if (BYTES == 8) *reinterpret_cast<uint2*>(made.all) = *reinterpret_cast<const uint2*>(x);
#pragma unroll
  for (int i = 0; i < BYTES / 16; ++i) {
    reinterpret_cast<uint4*>(made.all)[i] = reinterpret_cast<const uint4*>(x)[i];
  }
  return made;
}

// Call use(row, channel, number_at(row, channel)) for ROWS rows of D numbers, which are divided among THREADS threads.
// number_at is also called past the last row.
template <int D, int ROWS, int THREADS, typename NumberAt, typename Use>
DEVICE_FN void for_rows(int thread, const NumberAt& number_at, const Use& use) {
  constexpr int HELD = (ROWS * D + THREADS - 1) / THREADS;
  float numbers[HELD];
#pragma unroll
  for (int n = 0; n < HELD; ++n) {
    const int i = thread + n * THREADS;
    numbers[n] = number_at(i / D, i % D);
  }
#pragma unroll
  for (int n = 0; n < HELD; ++n) {
    const int i = thread + n * THREADS;
    if (i < ROWS * D) use(i / D, i % D, numbers[n]);
  }
}

// Multiply ROWS rows of D numbers by a matrix [D, D]. The rows may be written until the barrier inside. Each warp
// computes its share of the sums, with four columns per lane. products: shared, [WARPS][ROWS][D]. A barrier must
// follow; after it, product() returns a number of the result.
template <int D, int ROWS, int WARPS>
DEVICE_FN void multiply_rows(const float* rows, const float* matrix, int warp, int lane, float* products) {
  constexpr int SHARE = D / WARPS, BATCH = divisor(SHARE, ROWS == 1 ? 32 : 4), BATCHES = SHARE / BATCH;
  float4 entries[BATCH];
  const auto load = [&](int column, int start) {
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      // Past the last column, read the last again.
      entries[i] = *reinterpret_cast<const float4*>(matrix + (warp * SHARE + start + i) * D + min(column, D - 4));
    }
  };
  load(4 * lane, 0);
  __syncthreads();  // the rows are there
  for (int column = 4 * lane; column < D; column += 4 * 32) {
    float x[ROWS][4];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) x[r][0] = x[r][1] = x[r][2] = x[r][3] = 0.0f;
    for (int n = 0; n < BATCHES; ++n) {
      if (n > 0 || column >= 4 * 32) load(column, n * BATCH);
#pragma unroll
      for (int i = 0; i < BATCH; ++i) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const float number = rows[r * D + warp * SHARE + n * BATCH + i];
          x[r][0] = fmaf(number, entries[i].x, x[r][0]);
          x[r][1] = fmaf(number, entries[i].y, x[r][1]);
          x[r][2] = fmaf(number, entries[i].z, x[r][2]);
          x[r][3] = fmaf(number, entries[i].w, x[r][3]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      for (int i = 0; i < 4; ++i) products[(warp * ROWS + r) * D + column + i] = x[r][i];
    }
  }
}

template <int D, int ROWS, int WARPS>
DEVICE_FN float product(const float* products, int row, int column) {
  float sum = 0.0f;
  for (int w = 0; w < WARPS; ++w) sum += products[(w * ROWS + row) * D + column];
  return sum;
}

DEVICE_FN void store(void* x, int64_t at, int dtype, float number) {
  if (dtype == ROTORMLX_FLOAT16) {
    static_cast<__half*>(x)[at] = from_float<__half>(number);
  } else if (dtype == ROTORMLX_BFLOAT16) {
    static_cast<__nv_bfloat16*>(x)[at] = from_float<__nv_bfloat16>(number);
  } else {
    static_cast<float*>(x)[at] = number;
  }
}

// One part of the sequence for a run of query rows of one KV head, and the values derived from it.
struct Part {
  int batch, kv_head, head_index;  // head_index: of [B, K]
  int first_row, group_rows;       // query rows: the first of this thread block, and G
  int part, parts;
  bool exact;
  int packed_tokens, tokens, sink;  // of this batch row
  int start, stop;                  // tokens, counted among the packed tokens or among the exact ones
};

// Row `row` of the G rows of a KV head is query `row % L` of its query head `row / L`.
DEVICE_FN Part part_of_block(const AttendParts& all, int rows) {
  const rotormlx_attend_arguments& call = all.call;
  Part p;
  p.head_index = int(blockIdx.y);
  p.batch = p.head_index / call.kv_heads;
  p.kv_head = p.head_index % call.kv_heads;
  p.group_rows = call.heads / call.kv_heads * call.length;
  p.first_row = int(blockIdx.x) * rows;
  p.part = int(blockIdx.z);
  p.parts = all.exact_parts + all.packed_parts;
  p.exact = p.part < all.exact_parts;
  // The lengths are on the device, so the host cannot check them; lengths beyond the buffers are clamped to the
  // buffers.
  p.packed_tokens = min(max(call.lengths[2 * p.batch], 0), call.packed_tokens);
  const int exact_tokens = min(max(call.lengths[2 * p.batch + 1] - p.packed_tokens, 0), call.exact_tokens);
  p.tokens = p.packed_tokens + exact_tokens;
  p.sink = min(call.sink, exact_tokens);
  const int part_tokens = p.exact ? all.exact_part_tokens : all.packed_part_tokens;
  p.start = (p.exact ? p.part : p.part - all.exact_parts) * part_tokens;
  p.stop = min(p.start + part_tokens, p.exact ? exact_tokens : p.packed_tokens);
  if (call.mask_kind == ROTORMLX_MASK_CAUSAL) {
    // No row of these sees a token that the last query does not see.
    const int last_row = min(p.first_row + rows, p.group_rows) - 1;
    const bool wraps = last_row / call.length > p.first_row / call.length;
    const int last_place = wraps ? call.length - 1 : last_row % call.length;
    const int seen = p.tokens - call.length + last_place + 1;
    p.stop = min(p.stop, p.exact ? max(p.sink, seen - p.packed_tokens) : seen - p.sink);
  }
  return p;
}

// The position in the sequence of a token of the part.
DEVICE_FN int position_of(const Part& p, int index) {
  if (!p.exact) return p.sink + index;
  return index < p.sink ? index : p.packed_tokens + index;
}

// The score of an existing token under the mask.
DEVICE_FN float masked(const rotormlx_attend_arguments& call, const Part& p, int row, int position, float score) {
  const int place = row % call.length;
  if (call.mask_kind == ROTORMLX_MASK_CAUSAL) {
    return position <= p.tokens - call.length + place ? score : HIDDEN;
  }
  if (call.mask_kind >= ROTORMLX_MASK_BOOLEAN) {
    if (position >= call.mask_columns) return HIDDEN;
    const int head = p.kv_head * (p.group_rows / call.length) + row / call.length;
    const int64_t at = p.batch * call.mask_strides[0] + head * call.mask_strides[1] +
                       place * call.mask_strides[2] + position * call.mask_strides[3];
    if (call.mask_kind == ROTORMLX_MASK_BOOLEAN) {
      return static_cast<const uchar*>(call.mask)[at] != 0 ? score : HIDDEN;
    }
    return fmaf(static_cast<const float*>(call.mask)[at], LOG2_E, score);
  }
  return score;
}

// The offset in q of query row `row` of a KV head.
DEVICE_FN int64_t query_at(const rotormlx_attend_arguments& call, int batch, int kv_head, int row) {
  const int head = kv_head * (call.heads / call.kv_heads) + row / call.length;
  return batch * call.q_strides[0] + head * call.q_strides[1] + row % call.length * call.q_strides[2];
}
