// The calls of the library, and how a call is split into tasks. rotormlx/kernels/cpu_library.py has the same
// structures.
//
// B batch, K KV heads, H query heads, L queries, G = H / K * L query rows of a KV head, N blocks, D head_dim.
#pragma once

#include <cstdint>

namespace rotormlx {

constexpr int64_t BLOCK = 64;
constexpr int64_t MAX_DIM = 1024;

// An array as DLPack describes it (https://dmlc.github.io/dlpack); strides count elements.
struct Array {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  uint8_t kind;  // 0 integer, 1 unsigned, 2 float, 4 bfloat, 6 boolean
  uint8_t bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

enum class Type { none, float32, float16, bfloat16, boolean };

// An array of up to five dimensions, as the kernels use it.
struct Tensor {
  char* data = nullptr;
  Type type = Type::none;
  int64_t strides[5] = {};  // in elements

  template <typename T>
  T* at(int64_t a, int64_t b = 0, int64_t c = 0, int64_t d = 0) const {
    return (T*)data + a * strides[0] + b * strides[1] + c * strides[2] + d * strides[3];
  }
};

// One stage of a rotation: blocks [outer, stride, radix, radix].
struct Stage {
  int64_t start, radix, stride, outer;
  const float* blocks;
};

// The stages of a rotation, or its matrix; the identity has neither.
struct Rotation {
  int64_t head_dim, stage_count;
  const Stage* stages;
  const float* matrix;             // [D, D]: rotated = matrix row
  const float* inverse_transpose;  // [D, D]: for queries
  int64_t matrix_stride;           // from one KV head's matrices to the next; 0 if all heads share them
};

// ---- what the caller passes ---------------------------------------------------------------------------

// Every member has 8 bytes, so the caller can write them one after another.

struct Packed {
  Array *words, *scales, *centres, *channel_scale;  // centres and channel_scale: or null
};

struct Coding {
  const Rotation* rotation;
  int64_t bits, is_key;
};

// Rows to packed blocks, or back. `given_centres` says that encode reads the centres; otherwise it writes them.
struct CodecCall {
  Array* rows;  // [B, K, N * 64, D]
  Packed packed;
  Coding coding;
  Array* state;  // encode: of the paths of values before `start` [B, K, N, D], uint32; or null
  int64_t start, given_centres, threads, variant;
};

// Keys or values.
struct Source {
  Array* exact;   // [B, K, capacity, D]
  Packed packed;  // words null: nothing is packed
  Coding coding;
};

struct AttendCall {
  Array *queries, *output;    // [B, H, L, D], [B, H, L, Dv] of the same dtype
  Array *mask, *sink_logits;  // or null
  int64_t sink, causal, threads, variant;
  double scale;
  Source keys, values;

  // [B, 2], behind the call: packed tokens, all tokens.
  const int64_t* lengths() const { return (const int64_t*)(this + 1); }
};

// ---- what the kernels use -----------------------------------------------------------------------------

struct Blocks {
  Tensor words, scales, centres, channel_scale;
  const Rotation* rotation;
  int64_t bits, head_dim;
  bool is_key;
};

struct Codec {
  Tensor rows, state;
  Blocks blocks;
  int64_t kv_heads, block_count, start;
  bool given_centres;
};

// The rows of a KV head are divided into chunks, the sequence into parts: packed parts, then exact ones. A task does
// one part for one chunk. The division depends only on shapes, so results do not depend on the number of threads.
struct Attend {
  Tensor queries, output, key_exact, value_exact, mask, sink_logits;
  Blocks keys, values;
  const int64_t* lengths;
  int64_t kv_heads, repeats, length, rows, sink;
  bool causal;
  float scale;
  int64_t chunks, chunk_rows;
  int64_t packed_parts, packed_part_blocks, exact_parts, exact_part_blocks;
  int64_t key_pitch, value_pitch;  // floats stored per row: D, rounded up to whole words and vectors
  float *plain, *by_word, *by_four;  // queries [B K G, key_pitch]: as they are; rotated and as they are, for add()
  float* noise;                      // [B K G]: half the variance of a row's packed scores, for a scale of 1
  float *tops, *totals, *sums;       // [tasks, chunk_rows], and [tasks, chunk_rows, value_pitch]

  int64_t parts() const { return packed_parts + exact_parts; }
  // Query rows of chunk c.
  int64_t rows_of(int64_t c) const {
    return c + 1 < chunks ? chunk_rows : rows - c * chunk_rows;
  }
};

// ---- one variant of the kernels ---------------------------------------------------------------------

// Tasks are independent of each other. `scratch` is memory of the calling thread; the first function returns its size
// in floats. Heads are counted over B and K.
struct CodecKernels {
  int64_t (*scratch)(const Codec&);
  void (*encode)(const Codec&, int64_t head, int64_t block, float* scratch);
  void (*decode)(const Codec&, int64_t head, int64_t block, float* scratch);
};
struct AttendKernels {
  int64_t (*scratch)(const Attend&);
  void (*prepare)(const Attend&, int64_t head, int64_t chunk, float* scratch);
  void (*part)(const Attend&, int64_t head, int64_t chunk, int64_t part, float* scratch);
  void (*merge)(const Attend&, int64_t head, int64_t chunk, float* scratch);
};

// A source that is compiled for several processors names its definitions after the variant that is compiled.
#define JOIN(a, b) a##b
#define NAME_OF(name, variant) JOIN(name, variant)
#define VARIANT_NAME(name) NAME_OF(name##_, VARIANT)

}  // namespace rotormlx
