// The interface to the host (Python, through ctypes): one launch of one kernel.
#pragma once

#include "emulator.h"

namespace emulator {

enum BufferRole : uint32_t {
  kInput = 0,        // read only
  kOutput = 1,       // starts undefined; every element must be written
  kInitialised = 2,  // may be read and written from the start
};

struct BufferRequest {
  const char* name;
  void* host;  // copied in before the launch, and back afterwards if writable
  uint64_t bytes;
  uint32_t element_bytes;
  uint32_t role;
};

struct LaunchRequest {
  KernelEntry entry;
  const BufferRequest* buffers;
  uint32_t buffer_count;
  uint32_t grid[3];         // in threads
  uint32_t threadgroup[3];  // in threads
  uint32_t order;           // of execution: 0 ascending, 1 descending, else seed of a random one
  uint32_t threadgroup_memory_limit;  // in bytes
};

// The first broken rule. `kind` is empty when there is none.
struct Violation {
  char kind[32];
  char message[256];
  char buffer[64];  // the buffer or variable concerned, if any
  uint32_t threadgroup[3];
  uint32_t thread[3];      // position in the grid
  uint64_t module_offset;  // of the instruction after the access; 0 if `line` tells the place
  int32_t line;
};

struct Statistics {
  uint64_t accesses;  // checked ones
  uint64_t switches;  // of fibers
  uint64_t threadgroup_bytes;
};

}  // namespace emulator

extern "C" void emulator_launch(const emulator::LaunchRequest* request,
                                emulator::Violation* violation,
                                emulator::Statistics* statistics);
