// What a front end may ask of the runtime. A front end is a set of headers that lets g++ compile
// the text of a GPU kernel; the runtime knows threads, barriers and memory, but no GPU language.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

constexpr int kSimdWidth = 32;
constexpr int kQuadWidth = 4;
constexpr int kMaxThreads = 1024;

struct Index3 {
  uint32_t x, y, z;
};

// Where a thread stands in its launch. Handed to the kernel's entry function.
struct ThreadContext {
  Index3 position_in_grid;
  Index3 position_in_threadgroup;
  Index3 threadgroup_position;
  Index3 threadgroup_size;  // smaller at the edge of the grid
  Index3 threadgroup_count;
  uint32_t index_in_threadgroup;
  uint32_t lane;
  uint32_t simdgroup;
};

// Which memory a barrier orders; a bit set.
enum BarrierScope : unsigned { kNoMemory = 0, kDeviceMemory = 1, kThreadgroupMemory = 2 };

// One per declaration of a variable shared by a threadgroup: remembers where the current
// threadgroup's copy lies. Zero-initialised statics of the kernel's own module.
struct SharedVariable {
  const char* name;
  uint64_t threadgroup_serial;
  void* address;
};

using KernelEntry = void (*)(void* const* buffers, const ThreadContext* thread);

}  // namespace emulator

extern "C" {

// Both barriers end the launch with a violation unless every thread of the group arrives at the
// same source line.
void emulator_barrier(unsigned scope, int line);
void emulator_simdgroup_barrier(unsigned scope, int line);

// Rendezvous of a simdgroup: every lane gives `bytes` bytes and receives all lanes' values, lane i
// at `everyones + i * bytes`. Returns the mask of lanes that exist.
uint32_t emulator_exchange(const void* mine, size_t bytes, void* everyones, int line);
// The same of a quad, four neighbouring lanes, whatever the other lanes do; `everyones` has room for
// a simdgroup.
uint32_t emulator_exchange_in_quad(const void* mine, size_t bytes, void* everyones, int line);
uint32_t emulator_lane();

// The running thread, for a front end whose kernels ask for it anywhere.
const emulator::ThreadContext* emulator_context();

// Memory for a variable shared by the threadgroup. Races are tracked in cells of `cell_bytes`.
void* emulator_shared_variable(emulator::SharedVariable* variable, size_t bytes, size_t alignment,
                               size_t cell_bytes);

// Adds to a counter in device memory, at once before or after what others add, and gives what it was.
int32_t emulator_add(int32_t* counter, int32_t addend);
// Orders what the running thread does before and after it for threads of other threadgroups, as
// counters.h says.
void emulator_fence();

// Ends the launch with a violation found by the front end.
[[noreturn]] void emulator_fail(const char* kind, const char* message, int line);
}
