// What the attention kernels have in common. Scores and their maxima are multiplied by log2(e), so that softmax takes
// powers of two.
#pragma once

#include "launch.h"

// What one call works on: how the sequence is cut into parts, and where the kernels leave their results to each other.
// A part is a run of packed tokens or of exact ones; packed parts come first. G = H / K * L query rows of a KV head.
struct AttendParts {
  rotormlx_attend_arguments call;
  int32_t packed_parts, packed_part_tokens;
  int32_t exact_parts, exact_part_tokens;
  float* rotated;  // [B, K, G, KEY_DIM]: the queries, times the channel scale, rotated
  float* tops;     // [B, K, G, parts]: the largest score, or what stood in for it
  float* totals;   // [B, K, G, parts]: sum of 2^(score - top)
  float* outputs;  // [B, K, G, parts, VALUE_DIM]: sum of 2^(score - top) value; rotated in packed parts
};

// The score of a hidden token. Finite, so that the difference of two is a number.
constexpr float HIDDEN = -3.402823466e38f;
constexpr float LOG2_E = 1.44269504f;

// 2^(x - top), or 0 for what is hidden.
DEVICE_FN float share_of(float x, float top) { return x <= HIDDEN ? 0.0f : power_of_two(x - top); }

// Any dtype of the call, one number.
DEVICE_FN float loaded(const void* x, int64_t at, int dtype) {
  if (dtype == ROTORMLX_FLOAT16) return __half2float(static_cast<const __half*>(x)[at]);
  if (dtype == ROTORMLX_BFLOAT16) return __bfloat162float(static_cast<const __nv_bfloat16*>(x)[at]);
  return static_cast<const float*>(x)[at];
}

// Eight numbers in a row, of which the first lies on a multiple of 16 bytes.
DEVICE_FN void load_eight(const void* x, int64_t at, int dtype, float* numbers) {
  uint words[8];
  if (dtype == ROTORMLX_FLOAT32) {
    *reinterpret_cast<uint4*>(words) = *reinterpret_cast<const uint4*>(static_cast<const float*>(x) + at);
    *reinterpret_cast<uint4*>(words + 4) =
        *reinterpret_cast<const uint4*>(static_cast<const float*>(x) + at + 4);
#pragma unroll
    for (int i = 0; i < 8; ++i) numbers[i] = float_of_bits(words[i]);
    return;
  }
  *reinterpret_cast<uint4*>(words) = *reinterpret_cast<const uint4*>(static_cast<const ushort*>(x) + at);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const ushort bits = ushort(words[i / 2] >> (16 * (i % 2)));
    // A bfloat16 is the upper half of a float.
    numbers[i] = dtype == ROTORMLX_FLOAT16 ? __half2float(half_of_bits(bits)) : float_of_bits(uint(bits) << 16);
  }
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

// One part of the sequence for a run of query rows of one KV head, and what follows from that.
struct Part {
  int batch, kv_head, head_index;  // head_index: of [B, K]
  int first_row, group_rows;       // query rows: the first of this thread block, and G
  int part, parts;
  bool exact;
  int packed_tokens, tokens, sink;  // of this row of the batch
  int start, stop;                  // tokens, counted among the packed or the exact ones
};

// Row `row` of the G of a KV head is query `row % L` of its query head `row / L`.
DEVICE_FN Part part_of_block(const AttendParts& all, int rows) {
  const rotormlx_attend_arguments& call = all.call;
  Part p;
  p.head_index = int(blockIdx.z);
  p.batch = p.head_index / call.kv_heads;
  p.kv_head = p.head_index % call.kv_heads;
  p.group_rows = call.heads / call.kv_heads * call.length;
  p.first_row = int(blockIdx.x) * rows;
  p.part = int(blockIdx.y);
  p.parts = all.packed_parts + all.exact_parts;
  p.exact = p.part >= all.packed_parts;
  p.packed_tokens = call.lengths[2 * p.batch];
  p.tokens = call.lengths[2 * p.batch + 1];
  p.sink = min(call.sink, p.tokens - p.packed_tokens);
  const int part_tokens = p.exact ? all.exact_part_tokens : all.packed_part_tokens;
  p.start = (p.exact ? p.part - all.packed_parts : p.part) * part_tokens;
  p.stop = min(p.start + part_tokens, p.exact ? p.tokens - p.packed_tokens : p.packed_tokens);
  if (call.mask_kind == ROTORMLX_MASK_CAUSAL) {
    // What the last query of these rows does not see, none does.
    const int last_row = min(p.first_row + rows, p.group_rows) - 1;
    const bool wraps = last_row / call.length > p.first_row / call.length;
    const int last_place = wraps ? call.length - 1 : last_row % call.length;
    const int seen = p.tokens - call.length + last_place + 1;
    p.stop = min(p.stop, p.exact ? max(p.sink, seen - p.packed_tokens) : seen - p.sink);
  }
  return p;
}

// Where a token of the part stands in the sequence.
DEVICE_FN int position_of(const Part& p, int index) {
  if (!p.exact) return p.sink + index;
  return index < p.sink ? index : p.packed_tokens + index;
}

// The score of a token that exists, under the mask.
DEVICE_FN float masked(const rotormlx_attend_arguments& call, const Part& p, int row, int position, float score) {
  const int place = row % call.length;
  if (call.mask_kind == ROTORMLX_MASK_CAUSAL) {
    return position <= p.tokens - call.length + place ? score : HIDDEN;
  }
  if (call.mask_kind >= ROTORMLX_MASK_BOOLEAN) {
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

// Where query row `row` of a KV head lies in q.
DEVICE_FN int64_t query_at(const rotormlx_attend_arguments& call, int batch, int kv_head, int row) {
  const int head = kv_head * (call.heads / call.kv_heads) + row / call.length;
  return batch * call.q_strides[0] + head * call.q_strides[1] + row % call.length * call.q_strides[2];
}

// x[r] = row r of ROWS rows of D numbers times column `column` of a matrix [D, D].
template <int D, int ROWS>
DEVICE_FN void multiply_rows(const float* rows, const float* matrix, int column, float* x) {
  for (int r = 0; r < ROWS; ++r) x[r] = 0.0f;
#pragma unroll 16
  for (int i = 0; i < D; ++i) {
    const float entry = matrix[i * D + column];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) x[r] = fmaf(rows[r * D + i], entry, x[r]);
  }
}
