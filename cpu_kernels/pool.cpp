#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace rotormlx {
namespace {

using Task = void (*)(void*, int64_t);

struct Pool {
  std::mutex busy;  // held by the caller that is served
  std::mutex mutex;
  std::condition_variable wake, done;
  // Guarded by `mutex`; a worker looks at them when `generation` has moved on.
  // A worker that wakes after the caller has found no task left is not waited for.
  int64_t generation = 0, started = 0, wanted = 0, working = 0;
  bool open = false;
  Task task = nullptr;
  void* context = nullptr;
  int64_t count = 0;
  std::atomic<int64_t> next{0};

  void work(Task task, void* context, int64_t count) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(context, i);
  }

  void worker(int64_t index) {
    std::unique_lock<std::mutex> lock(mutex);
    for (int64_t seen = 0;;) {
      wake.wait(lock, [&] { return generation != seen; });
      seen = generation;
      if (index >= wanted || !open) continue;
      ++working;
      lock.unlock();
      work(task, context, count);
      lock.lock();
      if (--working == 0) done.notify_one();
    }
  }

  void run(int64_t tasks, int64_t threads, Task f, void* c) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      const int64_t helpers = (threads < tasks ? threads : tasks) - 1;
      for (; started < helpers; ++started) {
        std::thread([this, index = started] { worker(index); }).detach();
      }
      task = f;
      context = c;
      count = tasks;
      next.store(0, std::memory_order_relaxed);
      wanted = helpers;
      open = true;
      ++generation;
    }
    wake.notify_all();
    work(f, c, tasks);
    std::unique_lock<std::mutex> lock(mutex);
    open = false;
    // The others are at their last tasks, which takes less time than to sleep and be woken.
    for (int i = 0; i < 100 && working > 0; ++i) {
      lock.unlock();
      std::this_thread::yield();
      lock.lock();
    }
    done.wait(lock, [this] { return working == 0; });
  }
};

std::atomic<Pool*> pool{nullptr};

// Never destroyed: its threads wait in it until the process ends. A forked process has none of them and makes its own.
Pool& the_pool() {
  static std::mutex making;
  Pool* found = pool.load(std::memory_order_acquire);
  if (found) return *found;
  std::lock_guard<std::mutex> lock(making);
  if (!(found = pool.load(std::memory_order_acquire))) {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
    (void)registered;
    found = new Pool;
    pool.store(found, std::memory_order_release);
  }
  return *found;
}

}  // namespace

void run_tasks(int64_t count, int64_t threads, Task task, void* context) {
  if (threads > 1 && count > 1) {
    Pool& p = the_pool();
    std::unique_lock<std::mutex> lock(p.busy, std::try_to_lock);
    if (lock) return p.run(count, threads, task, context);
  }
  for (int64_t i = 0; i < count; ++i) task(context, i);
}

}  // namespace rotormlx
