// The host's side of a `.cu` file with its launchers: launches are kept until Python runs them.
#pragma once
#pragma GCC system_header

#include <vector>

#include "prelude.h"

using cudaError_t = int;
using cudaStream_t = struct CUstream_st*;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

namespace emulator {

// A pointer that the host has is no address but says which buffer and where in it; null stays null.
constexpr uint64_t kHandle = 0x7a5a, kOffsetBits = 40;
constexpr size_t kMaxArgumentBytes = 4096;  // as CUDA has it

struct Launch {
  uint32_t grid[3], block[3];  // grid in blocks
  uint64_t shared_bytes;
  void (*run)(const Launch&, void* const* buffers);
  void (*kernel)();
  uint64_t arguments[kMaxArgumentBytes / 8];
};

inline std::vector<Launch> launches;
inline const Launch* current_launch;
inline uint64_t granted_shared_bytes = 48 * 1024;

template <class Arguments>
UNCHECKED void run(const Launch& launch, void* const* buffers) {
  Arguments arguments;
  uint64_t words[sizeof(Arguments) / 8];
  for (size_t i = 0; i < sizeof(Arguments) / 8; ++i) {
    uint64_t word = launch.arguments[i];
    if (word >> 48 == kHandle) {
      const uint64_t offset = word & ((uint64_t{1} << kOffsetBits) - 1);
      word = reinterpret_cast<uint64_t>(buffers[word >> kOffsetBits & 0xff]) + offset;
    }
    words[i] = word;
  }
  std::memcpy(static_cast<void*>(&arguments), words, sizeof(Arguments));
  reinterpret_cast<void (*)(Arguments)>(launch.kernel)(arguments);
}

}  // namespace emulator

template <class Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments), dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t) {
  static_assert(sizeof(Arguments) % 8 == 0, "arguments are copied in words of 8 bytes");
  if (shared_bytes > emulator::granted_shared_bytes) return cudaErrorInvalidValue;
  emulator::Launch launch{{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes,
                          emulator::run<Arguments>, reinterpret_cast<void (*)()>(kernel), {}};
  std::memcpy(launch.arguments, arguments[0], sizeof(Arguments));
  emulator::launches.push_back(launch);
  return cudaSuccess;
}

template <class Function>
cudaError_t cudaFuncSetAttribute(Function*, int, int bytes) {
  emulator::granted_shared_bytes = bytes;
  return cudaSuccess;
}

extern "C" {

inline __attribute__((used)) int emulator_launch_count() { return int(emulator::launches.size()); }
inline __attribute__((used)) const void* emulator_select_launch(int i) {
  return emulator::current_launch = &emulator::launches[i];
}
inline __attribute__((used)) void emulator_forget_launches() {
  emulator::launches.clear();
  emulator::granted_shared_bytes = 48 * 1024;
}
UNCHECKED inline __attribute__((used)) void emulator_entry(void* const* buffers,
                                                           const emulator::ThreadContext*) {
  emulator::current_launch->run(*emulator::current_launch, buffers);
}

}  // extern "C"

UNCHECKED inline size_t emulator_dynamic_shared_bytes() {
  return emulator::current_launch->shared_bytes;
}
