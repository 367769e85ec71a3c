#include "launch.h"

#include "memory.h"
#include "report.h"
#include "scheduler.h"

using namespace emulator;

static bool can_launch(const LaunchRequest& request) {
  uint64_t threads = 1, grid = 1;
  for (int i = 0; i < 3; ++i) {
    threads *= request.threadgroup[i];
    grid *= request.grid[i];
  }
  if (grid == 0 || threads == 0 || threads > kMaxThreads) {
    report_for_launch("launch", "", "a threadgroup must have 1 to %d threads and the grid at least "
                      "one, not %zu and %zu", kMaxThreads, threads, grid);
  } else if (request.buffer_count > DeviceMemory::kMaxBuffers) {
    report_for_launch("launch", "", "%u buffers are bound, the limit is %zu", request.buffer_count,
                      DeviceMemory::kMaxBuffers);
  } else if (!device_memory.reserve()) {
    report_for_launch("launch", "", "the system gives no address space for buffers");
  }
  return !violated();
}

void emulator_launch(const LaunchRequest* request, Violation* violation, Statistics* statistics) {
  start_reporting(violation);
  if (!can_launch(*request)) return;
  set_kernel_module(request->entry);
  reset_checked_accesses();
  threadgroup_memory.start(request->threadgroup_memory_limit);
  device_memory.bind(request->buffers, request->buffer_count);
  scheduler.run(*request, device_memory.addresses());
  if (!violated()) check_outputs_written();
  if (!violated()) device_memory.copy_back(request->buffers);
  device_memory.release();
  *statistics = {checked_accesses(), scheduler.switches(), threadgroup_memory.peak_bytes()};
}
