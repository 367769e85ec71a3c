// Runs the threads of a launch as fibers, one threadgroup at a time.
#pragma once

#include <vector>

#include "fiber.h"
#include "launch.h"
#include "shadow.h"

namespace emulator {

class Scheduler {
 public:
  // Runs the whole launch, or until a violation.
  void run(const LaunchRequest& request, void* const* buffers);

  // For the running thread.
  bool running() const { return current_ != nullptr; }
  bool on_own_stack(uintptr_t address) const { return current_->fiber.owns(address); }
  const ThreadContext& context() const { return current_->context; }
  Accessor accessor(BarrierScope memory) const;
  void wait_at_barrier(unsigned scope, int line);
  void wait_at_simdgroup_barrier(unsigned scope, int line);
  uint32_t exchange(const void* mine, size_t bytes, void* everyones, int line);
  uint32_t exchange_in_quad(const void* mine, size_t bytes, void* everyones, int line);
  [[noreturn]] void abandon_launch();  // after a violation: never comes back to this thread

  uint64_t switches() const { return switches_; }

 private:
  enum class State {
    kReady, kAtQuadExchange, kAtExchange, kAtSimdgroupBarrier, kAtBarrier, kFinished
  };

  struct Thread {
    ThreadContext context;
    Fiber fiber;
    State state;
    int line;           // where it waits
    unsigned scope;     // of the barrier it waits at
    const void* mine;   // the value it brings to an exchange,
    void* everyones;    // where it wants all lanes' values,
    size_t bytes;       // and the size of one
  };

  // Barriers passed, for device memory and threadgroup memory.
  struct Epochs {
    uint32_t device = 1, threadgroup = 1;
    void advance(unsigned scope) {
      device += (scope & kDeviceMemory) != 0;
      threadgroup += (scope & kThreadgroupMemory) != 0;
    }
    uint32_t operator[](BarrierScope memory) const {
      return memory == kDeviceMemory ? device : threadgroup;
    }
  };

  static void fiber_main();

  void place_threads(Index3 grid, Index3 dispatched, Index3 count, Index3 position);
  void run_threadgroup();
  void run_simdgroup(int simdgroup);
  void resume(Thread& thread);
  void wait(State state, int line);

  void bring(const void* mine, size_t bytes, void* everyones, State state, int line);
  bool release_quads(int simdgroup);
  bool release_simdgroup(int simdgroup);
  bool release_barrier();
  void hand_over_values(int first, int count);
  static void report_divergence(const Thread* begin, const Thread* end);
  static const char* place_of(State state);

  int simdgroup_size(int simdgroup) const;
  void put_in_order(std::vector<int>& items, int count);
  uint32_t random();

  std::vector<Thread> threads_;
  std::vector<int> simdgroup_order_, lane_order_;
  std::vector<char> exchanged_;
  Thread* current_ = nullptr;
  char* stacks_ = nullptr;
  int thread_count_ = 0, simdgroup_count_ = 0;

  Epochs epochs_, first_epochs_;
  Epochs simdgroup_epochs_[kMaxThreads / kSimdWidth];

  KernelEntry entry_ = nullptr;
  void* const* buffers_ = nullptr;
  uint32_t order_ = 0, random_state_ = 1;
  uint64_t switches_ = 0;
};

extern Scheduler scheduler;

}  // namespace emulator
