// A fiber is a stack and a saved stack pointer: a GPU thread that runs until it must wait.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_UCONTEXT 1
#endif

#ifdef EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

namespace emulator {

class Fiber {
 public:
  static constexpr size_t kStackBytes = 256 << 10;

  // The next resume() calls `entry`, which must never return.
  void start(char* stack, size_t index, void (*entry)());

  // Runs the fiber until it calls suspend(). Only the scheduler resumes, only fibers suspend.
  void resume();
  void suspend();

  // Whether `address` lies on this fiber's stack.
  bool owns(uintptr_t address) const {
    return address - reinterpret_cast<uintptr_t>(stack_) < kStackBytes;
  }

 private:
  char* stack_ = nullptr;
#ifdef EMULATOR_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
};

}  // namespace emulator
