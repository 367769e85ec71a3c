#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace rotormlx {
namespace {

using Task = void (*)(void*, int64_t, int64_t);
using std::chrono::microseconds;

// How long a worker waits awake for an announced call, and for the next tasks of a call. A sleeping thread needs about
// 50 to 200 microseconds to wake.
constexpr microseconds ANNOUNCED{300}, NEXT{20};

// Wait until `ready` without sleeping; return false if that takes longer than `limit`.
template <typename Ready>
bool look_out(microseconds limit, Ready ready) {
  const auto until = std::chrono::steady_clock::now() + limit;
  while (!ready()) {
    if (std::chrono::steady_clock::now() > until) return false;
    std::this_thread::yield();
  }
  return true;
}

struct Pool {
  std::mutex busy;      // held by the caller that is served
  int64_t started = 0;  // workers; touched by that caller only

  // Threads that sleep: `mutex` guards what they wait for.
  std::mutex mutex;
  std::condition_variable wake, done;
  int64_t announced = 0;
  std::atomic<int64_t> opened{0};  // how often tasks have been opened

  // The current tasks may be read while `open`. A worker first counts itself in `working`, then checks `open`; the
  // caller first closes, then waits until no worker is counted. So the caller never waits for a worker that comes too
  // late.
  std::atomic<bool> open{false}, caller_sleeps{false};
  std::atomic<int64_t> working{0}, next{0};
  Task task = nullptr;
  void* context = nullptr;
  int64_t count = 0, wanted = 0;

  void work(int64_t place) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(context, i, place);
  }

  void join(int64_t index) {
    ++working;
    if (open && index < wanted) work(index + 1);
    if (--working == 0 && caller_sleeps) {
      std::lock_guard<std::mutex> lock(mutex);
      done.notify_one();
    }
  }

  void worker(int64_t index) {
    for (int64_t seen = 0, heard = 0;;) {
      {
        std::unique_lock<std::mutex> lock(mutex);
        wake.wait(lock, [&] { return opened != seen || announced != heard; });
        heard = announced;
      }
      for (microseconds limit = ANNOUNCED; look_out(limit, [&] { return opened != seen; }); limit = NEXT) {
        seen = opened;
        join(index);
      }
    }
  }

  // Fewer threads, if the system allows no more.
  void start(int64_t helpers) noexcept {
    try {
      for (; started < helpers; ++started) {
        std::thread([this, index = started] { worker(index); }).detach();
      }
    } catch (...) {
    }
  }

  void announce(int64_t threads) {
    start(threads - 1);
    {
      std::lock_guard<std::mutex> lock(mutex);
      ++announced;
    }
    wake.notify_all();
  }

  void run(int64_t tasks, int64_t threads, Task f, void* c) {
    wanted = (threads < tasks ? threads : tasks) - 1;
    start(wanted);
    task = f;
    context = c;
    count = tasks;
    next = 0;
    open = true;
    {
      std::lock_guard<std::mutex> lock(mutex);
      ++opened;
    }
    wake.notify_all();
    work(0);
    open = false;
    // The others are doing their last tasks, which takes less time than to sleep and be woken.
    const auto all_done = [this] { return working == 0; };
    if (look_out(ANNOUNCED, all_done)) return;
    caller_sleeps = true;
    std::unique_lock<std::mutex> lock(mutex);
    done.wait(lock, all_done);
    caller_sleeps = false;
  }
};

std::atomic<Pool*> pool{nullptr};

// Never destroyed: its threads wait in it until the process ends. A forked process has none of them and starts its own.
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

void announce_tasks(int64_t threads) {
  threads = std::min(threads, MAX_THREADS);
  if (threads < 2) return;
  Pool& p = the_pool();
  std::unique_lock<std::mutex> lock(p.busy, std::try_to_lock);
  if (lock) p.announce(threads);
}

void run_tasks(int64_t count, int64_t threads, Task task, void* context) {
  threads = std::min(threads, MAX_THREADS);
  if (threads > 1 && count > 1) {
    Pool& p = the_pool();
    std::unique_lock<std::mutex> lock(p.busy, std::try_to_lock);
    if (lock) return p.run(count, threads, task, context);
  }
  for (int64_t i = 0; i < count; ++i) task(context, i, 0);
}

}  // namespace rotormlx
