// Launcher of the kernel store.
#include "codecs.cuh"

#include "encode.cu"
#include "store.cu"

namespace {

__global__ void __launch_bounds__(CODEC_THREADS, 2) store_step(const __grid_constant__ rotormlx_store_arguments call) {
  store_tokens<KeyCodec, ValueCodec, CODEC_THREADS>(call);
}

}  // namespace

int rotormlx_store(const rotormlx_store_arguments* arguments, void* stream) {
  const dim3 grid(arguments->kv_heads, 2, arguments->batch);
  return launch(store_step, grid, CODEC_THREADS, 0, stream, *arguments);
}
