// Launchers of the kernels encode, decode and rotor3.
#include "codecs.cuh"

#include "decode.cu"
#include "encode.cu"
#include "rotor3.cu"

namespace {

// Thread blocks that a multiprocessor must have room for: three, if a thread fits into 80 registers without spilling.
template <typename Codec>
constexpr int blocks_at_once() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return Codec::BITS == 3 && Codec::IS_KEY == 0 ? 2 : 3;
#else
  return 3;
#endif
}

template <typename Codec>
__global__ void __launch_bounds__(CODEC_THREADS, blocks_at_once<Codec>()) encode(
    const __grid_constant__ rotormlx_encode_arguments call) {
  encode_block<Codec, CODEC_THREADS>(call);
}

template <typename Codec>
__global__ void __launch_bounds__(CODEC_THREADS) decode(const __grid_constant__ rotormlx_decode_arguments call) {
  decode_block<Codec, CODEC_THREADS>(call);
}

__global__ void __launch_bounds__(CODEC_THREADS) rotor3(const __grid_constant__ rotormlx_rotor3_arguments call) {
  quantize_dequantize<ValueCodec, CODEC_THREADS>(call);
}

}  // namespace

int rotormlx_encode(const rotormlx_encode_arguments* arguments, void* stream) {
  const dim3 grid(arguments->blocks, arguments->kv_heads, arguments->batch);
  return arguments->role == ROTORMLX_KEY
             ? launch(encode<KeyCodec>, grid, CODEC_THREADS, 0, stream, *arguments)
             : launch(encode<ValueCodec>, grid, CODEC_THREADS, 0, stream, *arguments);
}

int rotormlx_decode(const rotormlx_decode_arguments* arguments, void* stream) {
  const dim3 grid(arguments->blocks, arguments->kv_heads, arguments->batch);
  return arguments->role == ROTORMLX_KEY
             ? launch(decode<KeyCodec>, grid, CODEC_THREADS, 0, stream, *arguments)
             : launch(decode<ValueCodec>, grid, CODEC_THREADS, 0, stream, *arguments);
}

int rotormlx_rotor3(const rotormlx_rotor3_arguments* arguments, void* stream) {
  const int rows_a_block = CODEC_THREADS / ValueCodec::LANES;
  const dim3 grid(ceil_divide(arguments->rows, rows_a_block));
  return launch(rotor3, grid, CODEC_THREADS, 0, stream, *arguments);
}
