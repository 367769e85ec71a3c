// Threads that wait for work, shared by all calls of a process.
#pragma once

#include <cstdint>

namespace rotormlx {

// Tells up to `threads` - 1 sleeping threads that tasks will come in a moment, so that they are awake by then.
void announce_tasks(int64_t threads);

// More threads than any machine has cores are never started.
constexpr int64_t MAX_THREADS = 1024;

// Runs `task(context, i, place)` for i = 0 to count - 1 on up to `threads` threads, the calling one among them, and
// returns when all are done. `place` counts the threads from 0, so that each can have memory of its own. A task must
// not throw. A thread that cannot be started is done without, and while the pool serves another caller, the calling
// thread does all tasks.
void run_tasks(int64_t count, int64_t threads, void (*task)(void* context, int64_t i, int64_t place), void* context);

template <typename Task>
void run_tasks(int64_t count, int64_t threads, Task&& task) {
  run_tasks(
      count, threads, [](void* t, int64_t i, int64_t place) noexcept { (*(Task*)t)(i, place); }, &task);
}

}  // namespace rotormlx
