// The functions that the host calls, in plain C. nvcc compiles launch.cu, or launch_attend.cu, launch_codec.cu and
// launch_store.cu in parallel, for one configuration. The functions check only the plan; the caller must have checked
// shapes, dtypes, strides and alignment.
//
//   nvcc -std=c++17 -O3 -arch=sm_90a -DROTORMLX_KEY_DIM=128 -DROTORMLX_VALUE_DIM=128 -DROTORMLX_KEY_BITS=4
//        -DROTORMLX_VALUE_BITS=4 -I<folder of the generated headers> -c launch.cu
//
// dtypes, masks, lengths, and numbers of heads and queries are chosen at run time. Two generated headers are included,
// key_rotation.h and value_rotation.h. cuda_header of rotormlx/kernels/source.py makes their text; it depends only on
// the codec's role and bits, and on the name and head_dim of its rotation.
//
// All functions launch on `stream` (a cudaStream_t), do not wait, and return a cudaError_t, 0 for success.
// They run on the current device, sm_80 or newer.
//
// B batch, K KV heads, H query heads, L queries, N blocks of 64 tokens, D head_dim, R rows of words. Strides are in
// elements. Axes without a stride are contiguous. Words, centres, raw and exact vectors and their strides, and matrices
// must be multiples of 16 bytes, scales and their strides of 8, and strides of N below 2^29; a null pointer stands for
// an array that does not exist.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum rotormlx_dtype { ROTORMLX_FLOAT16 = 0, ROTORMLX_BFLOAT16 = 1, ROTORMLX_FLOAT32 = 2 };
enum rotormlx_role { ROTORMLX_KEY = 0, ROTORMLX_VALUE = 1 };
enum rotormlx_mask {
  ROTORMLX_MASK_NONE = 0,
  ROTORMLX_MASK_CAUSAL = 1,   // the last query sees every token of its row
  ROTORMLX_MASK_BOOLEAN = 2,  // a byte each; not zero: visible
  ROTORMLX_MASK_ADDITIVE = 3  // float32, added to the score
};

// Packed blocks, as docs/FORMAT.md, section 3 lays them out.
typedef struct {
  uint32_t* words;              // [B, K, N, R, 64] for keys, [B, K, N, R, D] for values
  void* scales;                 // float16 [B, K, N, 64]
  void* centres;                // float16 [B, K, N, D] for keys, null for values
  int64_t words_strides[3];     // of B, K, N
  int64_t scales_strides[3];    // of B, K, N
  int64_t centres_strides[3];   // of B, K, N
} rotormlx_packed;

// Encode raw keys or values to packed blocks.
typedef struct {
  int32_t role;                 // rotormlx_role: chooses head_dim, bits and rotation
  int32_t dtype;                // rotormlx_dtype of x
  int32_t batch, kv_heads, blocks;
  int32_t given_centres;        // not 0: `packed.centres` is read; 0: the means are written there (keys)
  const void* x;                // dtype [B, K, 64 N, D]
  int64_t x_strides[3];         // of B, K and tokens
  const float* coefficients;    // of the rotation, see coefficients of rotormlx/kernels/source.py
  const float* channel_scale;   // [K, D] or [B, K, D], or null
  rotormlx_packed packed;       // written
  int64_t coefficients_stride;  // of K, where every KV head has a matrix of its own, [K, D, D]; else 0
  int32_t start;                // values of 2 and 3 bits: tokens before it have codes already, 0 where none has
  const uint32_t* state;        // of the trellis behind those, [B, K, N, D], or null for 0; where start is not 0
  int64_t channel_scale_stride; // of B, where the rows of the batch have channel scales of their own; else 0
} rotormlx_encode_arguments;

int rotormlx_encode(const rotormlx_encode_arguments* arguments, void* stream);

// Decode packed blocks to the vectors they stand for.
typedef struct {
  int32_t role, dtype;          // dtype of out
  int32_t batch, kv_heads, blocks;
  rotormlx_packed packed;       // read
  const float* coefficients;    // of the rotation back: coefficients(..., back=True)
  const float* channel_scale;   // [K, D] or [B, K, D], or null
  void* out;                    // dtype [B, K, 64 N, D], contiguous
  int64_t coefficients_stride;  // as for encoding
  int64_t channel_scale_stride; // likewise
} rotormlx_decode_arguments;

int rotormlx_decode(const rotormlx_decode_arguments* arguments, void* stream);

// Store new tokens in a cache whose lengths are on the device. For each batch row, in this order: (1) if its tail is
// full (all - packed tokens - sink >= window + 64) and there is room for a packed block, the oldest 64 tokens of the
// tail become the packed block packed / 64, the rest of the tail moves down by 64 places, and packed grows by 64; (2)
// the new tokens are written behind its exact ones, and all grow by `length`, or by what there is room for.
typedef struct {
  int32_t dtype;                // of new and exact keys and values
  int32_t batch, kv_heads;
  int32_t length;               // new tokens of each row, 1 to 64
  int32_t sink, window;
  int32_t blocks;               // room for packed blocks of a row; a row whose blocks are full packs no more
  int32_t capacity;             // room for exact tokens of a row; tokens beyond it are dropped and not counted
  int32_t own_scale;            // not 0: before a row's first block is packed, its channel scale becomes that block's
  int32_t* lengths;             // [B, 2]: packed tokens and all tokens of each row; changed
  int32_t* counter;             // [B], 0 before and after: the last thread block of a row advances its lengths
  const void* new_keys;         // dtype [B, K, L, KEY_DIM]
  const void* new_values;       // dtype [B, K, L, VALUE_DIM]
  void* exact_keys;             // dtype [B, K, capacity, KEY_DIM], the sink first
  void* exact_values;           // dtype [B, K, capacity, VALUE_DIM]
  int64_t new_keys_strides[3];  // of B, K and tokens
  int64_t new_values_strides[3];
  int64_t exact_keys_strides[3];
  int64_t exact_values_strides[3];
  rotormlx_packed keys, values; // written
  float* key_channel_scale;     // [K, KEY_DIM] or [B, K, KEY_DIM], the latter where own_scale writes it; or null
  float* value_channel_scale;   // likewise
  int64_t key_channel_scale_stride;  // of B, or 0
  int64_t value_channel_scale_stride;
  const float* key_coefficients;     // as for encoding
  const float* value_coefficients;
  int64_t key_coefficients_stride;
  int64_t value_coefficients_stride;
} rotormlx_store_arguments;

int rotormlx_store(const rotormlx_store_arguments* arguments, void* stream);

// The published method, where the values' rotation is rotor3: rows of ROTORMLX_VALUE_DIM numbers rotated by one stage
// of rotors, rounded to levels of ROTORMLX_VALUE_BITS bits, and rotated back.
typedef struct {
  int32_t dtype;                // of x and out
  int64_t rows;
  const void* x;                // dtype [rows, D]
  int64_t x_stride;             // of rows
  const float* coefficients;    // of the values' rotation
  void* out;                    // dtype [rows, D], contiguous
} rotormlx_rotor3_arguments;

int rotormlx_rotor3(const rotormlx_rotor3_arguments* arguments, void* stream);

// Attention over a partly packed cache; any number of queries. A sequence is `sink` exact tokens, packed ones, and
// exact ones again; sink and tail lie in one buffer, the sink first.
typedef struct {
  int32_t dtype;                // of q, exact keys and values, and out
  int32_t batch, heads, kv_heads, length;  // B, H, K, L
  int32_t sink;
  int32_t packed_tokens;        // the largest of the rows, at most what the buffers hold
  int32_t exact_tokens;         // likewise: all tokens - packed ones
  const int32_t* lengths;       // [B, 2], on the device: packed tokens and all tokens of each row; larger ones are cut
  float scale;                  // of the scores
  const void* q;                // dtype [B, H, L, KEY_DIM]
  int64_t q_strides[3];         // of B, H, L
  rotormlx_packed keys, values; // read; all null while packed_tokens is 0
  const void* exact_keys;       // dtype [B, K, capacity, KEY_DIM]
  const void* exact_values;     // dtype [B, K, capacity, VALUE_DIM]
  int64_t exact_keys_strides[3];    // of B, K and tokens
  int64_t exact_values_strides[3];
  const float* key_matrix;      // [KEY_DIM, KEY_DIM]: a query (a row) times it is rotated; inverse(C)
  const float* key_channel_scale;    // [K, KEY_DIM], or null
  const float* value_matrix;    // [VALUE_DIM, VALUE_DIM]: a row times it is rotated back; inverse(C) transposed
  const float* value_channel_scale;  // [K, VALUE_DIM], or null
  int32_t mask_kind;            // rotormlx_mask
  int32_t mask_columns;         // S of the mask; tokens behind its last column are hidden
  const void* mask;             // [B, H, L, S], S all tokens of the longest row; null for the first two kinds
  int64_t mask_strides[4];      // 0 along an axis that is broadcast
  const float* sink_logits;           // [H]: attention-sink logits, or null
  void* out;                    // dtype [B, H, L, VALUE_DIM], contiguous
  void* workspace;              // rotormlx_attend_workspace() bytes, 16-byte aligned
  // Of B, where the rows of the batch have channel scales of their own, [B, K, D]; else 0.
  int64_t key_channel_scale_stride;
  int64_t value_channel_scale_stride;
  // Of K, where every KV head has a matrix of its own, [K, D, D]; else 0.
  int64_t key_matrix_stride;
  int64_t value_matrix_stride;
  // For one kernel in place of three, where the plan says so and `counters` is not null.
  const float* key_coefficients;      // as for encoding
  const float* value_coefficients;
  int32_t* counters;                  // [B, K, tiles of the plan], 0 before and after; for one call at a time
} rotormlx_attend_arguments;

// How a call is spread over thread blocks. rotormlx/kernels/cuda_plan.py computes it and says what each number means;
// the launcher refuses one that does not fit the call or the kernels.
typedef struct {
  int32_t operands, tiles, matrix_rows, one_kernel;
  int32_t exact_parts, exact_part_tokens;
  int32_t packed_parts, packed_part_tokens;
  int32_t query_bytes, part_bytes, merge_bytes;
} rotormlx_attend_plan;

// Bytes of device memory that a call needs between its kernels; pointers need not be set.
size_t rotormlx_attend_workspace(const rotormlx_attend_arguments* arguments, const rotormlx_attend_plan* plan);
int rotormlx_attend(const rotormlx_attend_arguments* arguments, const rotormlx_attend_plan* plan, void* stream);

#ifdef __cplusplus
}
#endif
