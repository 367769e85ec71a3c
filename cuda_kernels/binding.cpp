// torch operators around launch.h, for one configuration of head_dims, bits and rotations.
//
// rotormlx/torch/cuda.py is the only caller. It has checked shapes, dtypes, strides and devices, has chosen the current
// device, and passes the tables and the stream, so no CUDA header is needed here. -DROTORMLX_NAMESPACE names the
// namespace of the operators: one per configuration, because several can be loaded in one process.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstring>
#include <tuple>

#include "launch.h"

namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t BLOCK = 64;

int32_t dtype_of(at::ScalarType type) {
  if (type == at::kHalf) return ROTORMLX_FLOAT16;
  return type == at::kBFloat16 ? ROTORMLX_BFLOAT16 : ROTORMLX_FLOAT32;
}

template <typename T>
const T* pointer(const OptionalTensor& x) {
  return x.has_value() ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

// The stride of B if the batch rows have their own channel scales, [B, K, D]; else 0.
int64_t scale_stride(const OptionalTensor& x) { return x.has_value() && x->dim() == 3 ? x->stride(0) : 0; }

// The stride of K if every KV head has its own matrix, [K, D, D]; else 0.
int64_t matrix_stride(const Tensor& x) { return x.dim() == 3 ? x.stride(0) : 0; }

template <int N>
void copy_strides(int64_t (&to)[N], const Tensor& x) {
  for (int i = 0; i < N; ++i) to[i] = x.stride(i);
}

// The packed blocks of a call. Kernels that only read them take the same structure as kernels that write them.
rotormlx_packed packed_of(const OptionalTensor& words, const OptionalTensor& scales, const OptionalTensor& centres) {
  rotormlx_packed packed = {};
  if (!words.has_value()) return packed;
  packed.words = const_cast<uint32_t*>(pointer<uint32_t>(words));
  packed.scales = const_cast<void*>(pointer<void>(scales));
  packed.centres = const_cast<void*>(pointer<void>(centres));
  copy_strides(packed.words_strides, *words);
  copy_strides(packed.scales_strides, *scales);
  if (centres.has_value()) copy_strides(packed.centres_strides, *centres);
  return packed;
}

void check(const char* name, int error) {
  TORCH_CHECK(error == 0, "[", name, "] The CUDA kernel must be launched, but CUDA gave error ", error,
              "; run with CUDA_LAUNCH_BLOCKING=1 to see where.");
}

void* stream_of(int64_t stream) { return reinterpret_cast<void*>(stream); }

// Encode x [B, K, 64 N, D] to words [B, K, N, rows, lanes], scales [B, K, N, 64], centres [B, K, N, D] or [B, K, N, 0].
std::tuple<Tensor, Tensor, Tensor> encode(const Tensor& x, const OptionalTensor& centres,
                                          const OptionalTensor& channel_scale, const Tensor& coefficients,
                                          int64_t start, const OptionalTensor& state, int64_t role, int64_t rows,
                                          int64_t lanes, int64_t stream) {
  const int64_t batch = x.size(0), heads = x.size(1), blocks = x.size(2) / BLOCK;
  const bool is_key = role == ROTORMLX_KEY;
  Tensor words = x.new_empty({batch, heads, blocks, rows, lanes}, at::kInt);
  Tensor scales = x.new_empty({batch, heads, blocks, BLOCK}, at::kHalf);
  Tensor means = centres.has_value() ? *centres
                                     : x.new_empty({batch, heads, blocks, is_key ? x.size(3) : 0}, at::kHalf);
  rotormlx_encode_arguments call = {};
  call.role = int32_t(role);
  call.dtype = dtype_of(x.scalar_type());
  call.batch = int32_t(batch);
  call.kv_heads = int32_t(heads);
  call.blocks = int32_t(blocks);
  call.given_centres = centres.has_value();
  call.x = x.const_data_ptr();
  copy_strides(call.x_strides, x);
  call.coefficients = pointer<float>(coefficients);
  call.coefficients_stride = matrix_stride(coefficients);
  call.channel_scale = pointer<float>(channel_scale);
  call.channel_scale_stride = scale_stride(channel_scale);
  call.packed = packed_of(words, scales, is_key ? OptionalTensor(means) : std::nullopt);
  call.start = int32_t(start);
  call.state = pointer<uint32_t>(state);
  check("encode", rotormlx_encode(&call, stream_of(stream)));
  return {words, scales, means};
}

// Decode packed blocks to [B, K, 64 N, D].
Tensor decode(const Tensor& words, const Tensor& scales, const OptionalTensor& centres,
              const OptionalTensor& channel_scale, const Tensor& coefficients, int64_t role, int64_t head_dim,
              at::ScalarType dtype, int64_t stream) {
  const int64_t batch = words.size(0), heads = words.size(1), blocks = words.size(2);
  Tensor out = words.new_empty({batch, heads, blocks * BLOCK, head_dim}, dtype);
  rotormlx_decode_arguments call = {};
  call.role = int32_t(role);
  call.dtype = dtype_of(dtype);
  call.batch = int32_t(batch);
  call.kv_heads = int32_t(heads);
  call.blocks = int32_t(blocks);
  call.packed = packed_of(words, scales, centres);
  call.coefficients = pointer<float>(coefficients);
  call.coefficients_stride = matrix_stride(coefficients);
  call.channel_scale = pointer<float>(channel_scale);
  call.channel_scale_stride = scale_stride(channel_scale);
  call.out = out.mutable_data_ptr();
  check("decode", rotormlx_decode(&call, stream_of(stream)));
  return out;
}

// Store a decode step in place: see rotormlx_store.
void store(const Tensor& new_keys, const Tensor& new_values, const Tensor& lengths, const Tensor& counter,
           const Tensor& key_exact, const Tensor& key_words, const Tensor& key_scales, const Tensor& key_centres,
           const OptionalTensor& key_channel_scale, const Tensor& value_exact, const Tensor& value_words,
           const Tensor& value_scales, const OptionalTensor& value_channel_scale, const Tensor& key_coefficients,
           const Tensor& value_coefficients, int64_t sink, int64_t window, bool own_scale, int64_t stream) {
  rotormlx_store_arguments call = {};
  call.dtype = dtype_of(key_exact.scalar_type());
  call.batch = int32_t(new_keys.size(0));
  call.kv_heads = int32_t(new_keys.size(1));
  call.length = int32_t(new_keys.size(2));
  call.sink = int32_t(sink);
  call.window = int32_t(window);
  call.blocks = int32_t(key_words.size(2));
  call.capacity = int32_t(key_exact.size(2));
  call.own_scale = own_scale;
  call.lengths = static_cast<int32_t*>(lengths.mutable_data_ptr());
  call.counter = static_cast<int32_t*>(counter.mutable_data_ptr());
  call.new_keys = new_keys.const_data_ptr();
  call.new_values = new_values.const_data_ptr();
  call.exact_keys = key_exact.mutable_data_ptr();
  call.exact_values = value_exact.mutable_data_ptr();
  copy_strides(call.new_keys_strides, new_keys);
  copy_strides(call.new_values_strides, new_values);
  copy_strides(call.exact_keys_strides, key_exact);
  copy_strides(call.exact_values_strides, value_exact);
  call.keys = packed_of(key_words, key_scales, key_centres);
  call.values = packed_of(value_words, value_scales, std::nullopt);
  call.key_channel_scale = const_cast<float*>(pointer<float>(key_channel_scale));
  call.value_channel_scale = const_cast<float*>(pointer<float>(value_channel_scale));
  call.key_channel_scale_stride = scale_stride(key_channel_scale);
  call.value_channel_scale_stride = scale_stride(value_channel_scale);
  call.key_coefficients = pointer<float>(key_coefficients);
  call.value_coefficients = pointer<float>(value_coefficients);
  call.key_coefficients_stride = matrix_stride(key_coefficients);
  call.value_coefficients_stride = matrix_stride(value_coefficients);
  check("store", rotormlx_store(&call, stream_of(stream)));
}

// Make the structure of a plan from its fields in order.
rotormlx_attend_plan plan_of(at::IntArrayRef numbers) {
  constexpr size_t COUNT = sizeof(rotormlx_attend_plan) / sizeof(int32_t);
  TORCH_CHECK(numbers.size() == COUNT, "[attend] A plan must have ", COUNT, " numbers, but has ", numbers.size(), ".");
  int32_t fields[COUNT];
  for (size_t i = 0; i < COUNT; ++i) fields[i] = int32_t(numbers[i]);
  rotormlx_attend_plan plan;
  std::memcpy(&plan, fields, sizeof(plan));
  return plan;
}

// Attend with q [B, H, L, D] over exact and packed tokens; returns [B, H, L, Dv]. The kernels read the numbers of
// tokens from `lengths` on the device. The numbers passed by the host are the capacities of the buffers, so that a CUDA
// graph can be replayed.
Tensor attend(const Tensor& q, const Tensor& lengths, const Tensor& key_exact, const OptionalTensor& key_words,
              const OptionalTensor& key_scales, const OptionalTensor& key_centres,
              const OptionalTensor& key_channel_scale, const Tensor& value_exact, const OptionalTensor& value_words,
              const OptionalTensor& value_scales, const OptionalTensor& value_channel_scale,
              const Tensor& key_matrix, const Tensor& value_matrix, const Tensor& key_coefficients,
              const Tensor& value_coefficients, const OptionalTensor& counters, const OptionalTensor& mask,
              const OptionalTensor& sink_logits, int64_t sink, double scale, int64_t mask_kind, at::IntArrayRef plan,
              int64_t stream) {
  Tensor out = q.new_empty({q.size(0), q.size(1), q.size(2), value_exact.size(3)});
  rotormlx_attend_arguments call = {};
  call.dtype = dtype_of(q.scalar_type());
  call.batch = int32_t(q.size(0));
  call.heads = int32_t(q.size(1));
  call.kv_heads = int32_t(key_exact.size(1));
  call.length = int32_t(q.size(2));
  call.sink = int32_t(sink);
  call.packed_tokens = key_words.has_value() ? int32_t(key_words->size(2) * BLOCK) : 0;
  call.exact_tokens = int32_t(key_exact.size(2));
  call.lengths = pointer<int32_t>(lengths);
  call.scale = float(scale);
  call.q = q.const_data_ptr();
  copy_strides(call.q_strides, q);
  call.keys = packed_of(key_words, key_scales, key_centres);
  call.values = packed_of(value_words, value_scales, std::nullopt);
  call.exact_keys = key_exact.const_data_ptr();
  call.exact_values = value_exact.const_data_ptr();
  copy_strides(call.exact_keys_strides, key_exact);
  copy_strides(call.exact_values_strides, value_exact);
  call.key_matrix = pointer<float>(key_matrix);
  call.key_matrix_stride = matrix_stride(key_matrix);
  call.key_channel_scale = pointer<float>(key_channel_scale);
  call.key_channel_scale_stride = scale_stride(key_channel_scale);
  call.value_matrix = pointer<float>(value_matrix);
  call.value_matrix_stride = matrix_stride(value_matrix);
  call.key_coefficients = pointer<float>(key_coefficients);
  call.value_coefficients = pointer<float>(value_coefficients);
  call.counters = counters.has_value() ? static_cast<int32_t*>(counters->mutable_data_ptr()) : nullptr;
  call.value_channel_scale = pointer<float>(value_channel_scale);
  call.value_channel_scale_stride = scale_stride(value_channel_scale);
  call.mask_kind = int32_t(mask_kind);
  call.mask = pointer<void>(mask);
  if (mask.has_value()) {
    call.mask_columns = int32_t(mask->size(3));
    copy_strides(call.mask_strides, *mask);
  }
  call.sink_logits = pointer<float>(sink_logits);
  call.out = out.mutable_data_ptr();
  const rotormlx_attend_plan spread = plan_of(plan);
  Tensor workspace = q.new_empty({int64_t(rotormlx_attend_workspace(&call, &spread))}, at::kByte);
  call.workspace = workspace.mutable_data_ptr();
  check("attend", rotormlx_attend(&call, &spread, stream_of(stream)));
  return out;
}

}  // namespace

TORCH_LIBRARY(ROTORMLX_NAMESPACE, library) {
  library.def(
      "encode(Tensor x, Tensor? centres, Tensor? channel_scale, Tensor coefficients, int start, Tensor? state, "
      "int role, int rows, int lanes, int stream) -> (Tensor, Tensor, Tensor)");
  library.def(
      "decode(Tensor words, Tensor scales, Tensor? centres, Tensor? channel_scale, Tensor coefficients, int role, "
      "int head_dim, ScalarType dtype, int stream) -> Tensor");
  library.def(
      "attend(Tensor q, Tensor lengths, Tensor key_exact, Tensor? key_words, Tensor? key_scales, Tensor? key_centres, "
      "Tensor? key_channel_scale, Tensor value_exact, Tensor? value_words, Tensor? value_scales, "
      "Tensor? value_channel_scale, Tensor key_matrix, Tensor value_matrix, Tensor key_coefficients, "
      "Tensor value_coefficients, Tensor(a!)? counters, Tensor? mask, Tensor? sink_logits, int sink, float scale, "
      "int mask_kind, int[] plan, int stream) -> Tensor");
  library.def(
      "store(Tensor new_keys, Tensor new_values, Tensor(a!) lengths, Tensor(b!) counter, Tensor(c!) key_exact, "
      "Tensor(d!) key_words, Tensor(e!) key_scales, Tensor(f!) key_centres, Tensor(g!)? key_channel_scale, "
      "Tensor(h!) value_exact, Tensor(i!) value_words, Tensor(j!) value_scales, Tensor(k!)? value_channel_scale, "
      "Tensor key_coefficients, Tensor value_coefficients, int sink, int window, bool own_scale, int stream) -> ()");
  // Registered for every device: the tests run these operators with launchers on the host.
  library.impl("encode", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(encode));
  library.impl("decode", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(decode));
  library.impl("store", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(store));
  library.impl("attend", c10::DispatchKey::CompositeExplicitAutograd, TORCH_FN(attend));
}
