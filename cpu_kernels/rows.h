// Rows under a rotation: channel c of up to `pitch` rows is at x[c * pitch], one row per lane.
#pragma once

#include "problem.h"
#include "vectors.h"

namespace {

using rotormlx::BLOCK;
using rotormlx::MAX_DIM;
using rotormlx::Rotation;
using rotormlx::Stage;
using rotormlx::Tensor;
using rotormlx::Type;

// `groups` vectors of rows; products are added in the order of the channels, as mlx_ops.py does.
template <int RADIX, bool BACK>
void rotate_stage(const Stage& stage, float* x, int64_t pitch, int64_t groups) {
  const float* block = stage.blocks;
  const int64_t step = stage.stride * pitch;
  for (int64_t outer = 0; outer < stage.outer; ++outer) {
    float* run = x + (stage.start + outer * RADIX * stage.stride) * pitch;
    for (int64_t i = 0; i < stage.stride; ++i, block += RADIX * RADIX) {
      float* first = run + i * pitch;
      for (int64_t g = 0; g < groups; ++g) {
        Floats in[RADIX];
        UNROLL
        for (int r = 0; r < RADIX; ++r) in[r] = load(first + r * step + g * LANES);
        UNROLL
        for (int r = 0; r < RADIX; ++r) {
          Floats out = block[BACK ? r : r * RADIX] * in[0];
          UNROLL
          for (int s = 1; s < RADIX; ++s) {
            out = out + block[BACK ? s * RADIX + r : r * RADIX + s] * in[s];
          }
          store(first + r * step + g * LANES, out);
        }
      }
    }
  }
}

template <bool BACK>
void rotate_stage(const Stage& stage, float* x, int64_t pitch, int64_t groups) {
  switch (stage.radix) {
    case 1: return rotate_stage<1, BACK>(stage, x, pitch, groups);
    case 2: return rotate_stage<2, BACK>(stage, x, pitch, groups);
    case 3: return rotate_stage<3, BACK>(stage, x, pitch, groups);
    case 4: return rotate_stage<4, BACK>(stage, x, pitch, groups);
    case 5: return rotate_stage<5, BACK>(stage, x, pitch, groups);
    case 7: return rotate_stage<7, BACK>(stage, x, pitch, groups);
  }
}

// x = matrix x, or its transpose; `spare` has the size of x.
template <bool TRANSPOSED>
void multiply(const float* matrix, int64_t dim, float* x, float* spare, int64_t pitch, int64_t groups) {
  enum { OUT = 4 };  // dim is a multiple of 8
  for (int64_t c = 0; c < dim; c += OUT) {
    for (int64_t g = 0; g < groups; ++g) {
      Floats sums[OUT] = {};
      for (int64_t i = 0; i < dim; ++i) {
        const Floats in = load(x + i * pitch + g * LANES);
        UNROLL
        for (int k = 0; k < OUT; ++k) {
          sums[k] += matrix[TRANSPOSED ? i * dim + c + k : (c + k) * dim + i] * in;
        }
      }
      for (int k = 0; k < OUT; ++k) store(spare + (c + k) * pitch + g * LANES, sums[k]);
    }
  }
  __builtin_memcpy(x, spare, sizeof(float) * dim * pitch);
}

enum class Direction { row, query, back };

// Rotate rows of a KV head forward; rotate queries in the same way; or rotate rows and outputs back. Only matrices use
// `spare`.
void rotate(
    const Rotation& rotation, int64_t kv_head, Direction how, float* x, float* spare, int64_t pitch, int64_t groups) {
  if (rotation.matrix) {
    const float* matrix = (how == Direction::row ? rotation.matrix : rotation.inverse_transpose);
    matrix += kv_head * rotation.matrix_stride;
    if (how == Direction::back) {
      multiply<true>(matrix, rotation.head_dim, x, spare, pitch, groups);
    } else {
      multiply<false>(matrix, rotation.head_dim, x, spare, pitch, groups);
    }
  } else if (how == Direction::back) {
    for (int64_t s = rotation.stage_count; s-- > 0;) {
      rotate_stage<true>(rotation.stages[s], x, pitch, groups);
    }
  } else {
    for (int64_t s = 0; s < rotation.stage_count; ++s) {
      rotate_stage<false>(rotation.stages[s], x, pitch, groups);
    }
  }
}

// ---- numbers of any dtype ---------------------------------------------------------------------------

INLINE float read(const char* data, Type type, int64_t i) {
  if (type == Type::float32) return ((const float*)data)[i];
  const uint16_t x = ((const uint16_t*)data)[i];
  return type == Type::float16 ? float_of_half(x) : float_of_bits((uint32_t)x << 16);
}

INLINE void write(char* data, Type type, int64_t i, float x) {
  if (type == Type::float32) ((float*)data)[i] = x;
  if (type == Type::float16) ((uint16_t*)data)[i] = half_of_float(x);
  if (type == Type::bfloat16) ((uint16_t*)data)[i] = bfloat_of_float(x);
}

INLINE int64_t size_of(Type type) {
  return type == Type::float32 ? 4 : type == Type::boolean ? 1 : 2;
}

// Copy `count` numbers, `stride` apart, as float32 to out[0], out[step], ... Contiguous numbers are copied by vectors.
inline void read_row(const char* data, Type type, int64_t stride, int64_t count, float* out) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + LANES <= count; i += LANES) {
      const uint16_t* halves = (const uint16_t*)data + i;
      store(out + i, type == Type::float32   ? load((const float*)data + i)
                     : type == Type::float16 ? load_as_floats(halves)
                                             : floats_of(load_halves(halves) << 16));
    }
  }
  for (; i < count; ++i) out[i] = read(data, type, i * stride);
}

INLINE const char* row_of(const Tensor& x, int64_t a, int64_t b, int64_t c) {
  return x.data + (a * x.strides[0] + b * x.strides[1] + c * x.strides[2]) * size_of(x.type);
}

// The channel scale, or 1 if there is none.
INLINE float channel_factor(const rotormlx::Blocks& blocks, int64_t b, int64_t k, int64_t c) {
  return blocks.channel_scale.data ? *blocks.channel_scale.at<float>(b, k, c) : 1.0f;
}

INLINE int64_t rounded_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

}  // namespace
