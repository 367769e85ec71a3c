// Threads that wait for work, shared by all calls of a process.
#pragma once

#include <cstdint>

namespace rotormlx {

// Tells up to `threads` - 1 sleeping threads that tasks will come in a moment, so that they are awake by then.
void announce_tasks(int64_t threads);

// Runs `task(context, i)` for i = 0 to count - 1 on up to `threads` threads, the calling one among them, and returns
// when all are done. A task must not throw. While the pool serves another caller, the calling thread does all of them.
void run_tasks(int64_t count, int64_t threads, void (*task)(void* context, int64_t i), void* context);

template <typename Task>
void run_tasks(int64_t count, int64_t threads, Task&& task) {
  run_tasks(count, threads, [](void* t, int64_t i) noexcept { (*(Task*)t)(i); }, &task);
}

}  // namespace rotormlx
