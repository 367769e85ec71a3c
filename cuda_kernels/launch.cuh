// Definitions that all launchers share: one configuration of head_dims and bits.
#pragma once

#include "vocabulary.cuh"

// Tokens of a block: docs/FORMAT.md, section 3.
constexpr int BLOCK = 64;

#include "../shared_kernels/levels.h"
#include "../shared_kernels/trellis.h"
#include "../shared_kernels/rotation.h"

#include "launch.h"
#include "scores.cuh"

namespace {

constexpr int KEY_DIM = ROTORMLX_KEY_DIM, VALUE_DIM = ROTORMLX_VALUE_DIM;
constexpr int KEY_BITS = ROTORMLX_KEY_BITS, VALUE_BITS = ROTORMLX_VALUE_BITS;
static_assert(KEY_DIM % 8 == 0 && KEY_DIM <= 256 && VALUE_DIM % 8 == 0 && VALUE_DIM <= 256,
              "head_dims are multiples of 8 up to 256");

int ceil_divide(int64_t a, int64_t b) { return int((a + b - 1) / b); }

template <typename Arguments>
int launch(void (*kernel)(Arguments), dim3 grid, int threads, size_t shared_bytes, void* stream,
           Arguments arguments) {
  if (shared_bytes > 48 * 1024) {
    // More than 48 KiB of shared memory must be requested.
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return int(error);
  }
  void* all[] = {&arguments};
  return int(cudaLaunchKernel(
      kernel, grid, dim3(threads), all, shared_bytes, static_cast<cudaStream_t>(stream)));
}

}  // namespace
