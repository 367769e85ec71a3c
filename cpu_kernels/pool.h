// Threads that wait for work, shared by all calls of a process.
#pragma once

#include <cstdint>

namespace rotormlx {

// Wake up to `threads` - 1 sleeping threads, because tasks are about to come.
void announce_tasks(int64_t threads);

// The pool never starts more threads than this.
constexpr int64_t MAX_THREADS = 1024;

// Run `task(context, i, place)` for i = 0 to count - 1 on up to `threads` threads, including the calling one, and
// return when all tasks are done. `place` numbers the threads from 0, so that each can have its own memory. A task must
// not throw. If a thread cannot be started, the others do its work. While the pool serves another caller, the calling
// thread does all tasks.
void run_tasks(int64_t count, int64_t threads, void (*task)(void* context, int64_t i, int64_t place), void* context);

template <typename Task>
void run_tasks(int64_t count, int64_t threads, Task&& task) {
  run_tasks(
      count, threads, [](void* t, int64_t i, int64_t place) noexcept { (*(Task*)t)(i, place); }, &task);
}

}  // namespace rotormlx
