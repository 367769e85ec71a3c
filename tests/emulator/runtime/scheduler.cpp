#include "scheduler.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "counters.h"
#include "memory.h"
#include "report.h"

namespace emulator {

Scheduler scheduler;

namespace {

constexpr uint32_t kAscending = 0, kDescending = 1;

Index3 index_of(uint32_t linear, const Index3& size) {
  return {linear % size.x, linear / size.x % size.y, linear / size.x / size.y};
}

Index3 from_array(const uint32_t (&a)[3]) { return {a[0], a[1], a[2]}; }

Index3 smaller(const Index3& a, const Index3& b) {
  return {std::min(a.x, b.x), std::min(a.y, b.y), std::min(a.z, b.z)};
}

uint32_t ceil_div(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

}  // namespace

// ---- the launch

void Scheduler::run(const LaunchRequest& request, void* const* buffers) {
  if (!stacks_) {
    stacks_ = static_cast<char*>(mmap(nullptr, kMaxThreads * Fiber::kStackBytes,
                                      PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    threads_.resize(kMaxThreads);
  }
  entry_ = request.entry;
  buffers_ = buffers;
  order_ = request.order;
  random_state_ = request.order * 2654435761u + 1;
  epochs_ = Epochs{};
  counters.start_launch();
  switches_ = 0;

  const Index3 grid = from_array(request.grid);
  const Index3 size = smaller(from_array(request.threadgroup), grid);
  const Index3 count{ceil_div(grid.x, size.x), ceil_div(grid.y, size.y), ceil_div(grid.z, size.z)};
  std::vector<int> threadgroups;
  put_in_order(threadgroups, static_cast<int>(count.x * count.y * count.z));
  for (int threadgroup : threadgroups) {
    place_threads(grid, size, count, index_of(threadgroup, count));
    run_threadgroup();
    if (violated()) return;
  }
}

void Scheduler::place_threads(Index3 grid, Index3 dispatched, Index3 count, Index3 position) {
  const Index3 origin{position.x * dispatched.x, position.y * dispatched.y,
                      position.z * dispatched.z};
  // Metal's dispatchThreads cuts the threadgroups at the edge of the grid.
  const Index3 size = smaller(dispatched, {grid.x - origin.x, grid.y - origin.y,
                                           grid.z - origin.z});
  thread_count_ = static_cast<int>(size.x * size.y * size.z);
  simdgroup_count_ = static_cast<int>(ceil_div(thread_count_, kSimdWidth));

  for (int i = 0; i < thread_count_; ++i) {
    Thread& thread = threads_[i];
    ThreadContext& c = thread.context;
    c.position_in_threadgroup = index_of(i, size);
    c.position_in_grid = {origin.x + c.position_in_threadgroup.x,
                          origin.y + c.position_in_threadgroup.y,
                          origin.z + c.position_in_threadgroup.z};
    c.threadgroup_position = position;
    c.threadgroup_size = size;
    c.threadgroup_count = count;
    c.index_in_threadgroup = i;
    c.lane = i % kSimdWidth;
    c.simdgroup = i / kSimdWidth;
    thread.state = State::kReady;
    thread.fiber.start(stacks_ + i * Fiber::kStackBytes, i, fiber_main);
  }

  epochs_.advance(kDeviceMemory | kThreadgroupMemory);
  first_epochs_ = epochs_;
  std::fill_n(simdgroup_epochs_, simdgroup_count_, Epochs{});
  threadgroup_memory.clear();
  counters.start_threadgroup();
}

void Scheduler::fiber_main() {
  Scheduler& s = scheduler;
  s.entry_(s.buffers_, &s.current_->context);
  s.wait(State::kFinished, 0);
}

// ---- scheduling

void Scheduler::run_threadgroup() {
  do {
    put_in_order(simdgroup_order_, simdgroup_count_);
    for (int simdgroup : simdgroup_order_) {
      run_simdgroup(simdgroup);
      if (violated()) return;
    }
  } while (release_barrier());
}

// Runs a simdgroup until all its lanes wait at a threadgroup barrier or have finished.
void Scheduler::run_simdgroup(int simdgroup) {
  do {
    put_in_order(lane_order_, simdgroup_size(simdgroup));
    for (int lane : lane_order_) {
      Thread& thread = threads_[simdgroup * kSimdWidth + lane];
      if (thread.state == State::kReady) resume(thread);
      if (violated()) return;
    }
  } while (release_simdgroup(simdgroup));
}

void Scheduler::resume(Thread& thread) {
  current_ = &thread;
  ++switches_;
  thread.fiber.resume();
  current_ = nullptr;
}

void Scheduler::wait(State state, int line) {
  current_->state = state;
  current_->line = line;
  ++switches_;
  current_->fiber.suspend();
}

void Scheduler::abandon_launch() {
  while (true) current_->fiber.suspend();
}

// ---- meeting points

void Scheduler::wait_at_barrier(unsigned scope, int line) {
  current_->scope = scope;
  wait(State::kAtBarrier, line);
}

void Scheduler::wait_at_simdgroup_barrier(unsigned scope, int line) {
  current_->scope = scope;
  wait(State::kAtSimdgroupBarrier, line);
}

void Scheduler::bring(const void* mine, size_t bytes, void* everyones, State state, int line) {
  current_->mine = mine;
  current_->bytes = bytes;
  current_->everyones = everyones;
  wait(state, line);
}

uint32_t Scheduler::exchange_in_quad(const void* mine, size_t bytes, void* everyones, int line) {
  bring(mine, bytes, everyones, State::kAtQuadExchange, line);
  const int first = static_cast<int>(current_->context.lane) / kQuadWidth * kQuadWidth;
  const int lanes = simdgroup_size(static_cast<int>(current_->context.simdgroup)) - first;
  return (1u << std::min(kQuadWidth, lanes)) - 1;
}

uint32_t Scheduler::exchange(const void* mine, size_t bytes, void* everyones, int line) {
  bring(mine, bytes, everyones, State::kAtExchange, line);
  const int lanes = simdgroup_size(static_cast<int>(current_->context.simdgroup));
  return static_cast<uint32_t>((uint64_t{1} << lanes) - 1);
}

// Lets quads go on whose lanes meet at a function of quads. False if there is none.
bool Scheduler::release_quads(int simdgroup) {
  const int size = simdgroup_size(simdgroup);
  bool any = false;
  for (int lane = 0; lane < size; lane += kQuadWidth) {
    const int first = simdgroup * kSimdWidth + lane, count = std::min(kQuadWidth, size - lane);
    Thread* begin = &threads_[first];
    Thread* end = begin + count;
    const Thread* waiting = std::find_if(
        begin, end, [](const Thread& t) { return t.state == State::kAtQuadExchange; });
    if (waiting == end) continue;
    const int line = waiting->line;
    const bool together = std::all_of(begin, end, [&](const Thread& t) {
      return t.state == State::kAtQuadExchange && t.line == line;
    });
    if (!together) {
      report_divergence(begin, end);
      return false;
    }
    hand_over_values(first, count);
    for (Thread* t = begin; t != end; ++t) t->state = State::kReady;
    any = true;
  }
  return any;
}

// Lets the lanes go on if they meet at a simdgroup function. False if there is none they wait for.
bool Scheduler::release_simdgroup(int simdgroup) {
  if (release_quads(simdgroup)) return true;
  if (violated()) return false;
  const int first = simdgroup * kSimdWidth, count = simdgroup_size(simdgroup);
  Thread* begin = &threads_[first];
  Thread* end = begin + count;
  const Thread* waiting = std::find_if(begin, end, [](const Thread& t) {
    return t.state == State::kAtExchange || t.state == State::kAtSimdgroupBarrier;
  });
  if (waiting == end) return false;

  const State state = waiting->state;
  const int line = waiting->line;
  const bool together = std::all_of(begin, end, [&](const Thread& t) {
    return t.state == state && t.line == line;
  });
  if (!together) {
    report_divergence(begin, end);
    return false;
  }
  if (state == State::kAtExchange) {
    hand_over_values(first, count);
  } else {
    simdgroup_epochs_[simdgroup].advance(waiting->scope);
  }
  for (Thread* t = begin; t != end; ++t) t->state = State::kReady;
  return true;
}

void Scheduler::hand_over_values(int first, int count) {
  const size_t bytes = threads_[first].bytes;
  exchanged_.assign(kSimdWidth * bytes, 0);
  for (int i = 0; i < count; ++i) {
    std::memcpy(exchanged_.data() + i * bytes, threads_[first + i].mine, bytes);
  }
  for (int i = 0; i < count; ++i) {
    std::memcpy(threads_[first + i].everyones, exchanged_.data(), exchanged_.size());
  }
}

// Lets the threadgroup go on if it meets at a barrier. False if all threads have finished.
bool Scheduler::release_barrier() {
  Thread* begin = threads_.data();
  Thread* end = begin + thread_count_;
  const Thread* waiting =
      std::find_if(begin, end, [](const Thread& t) { return t.state == State::kAtBarrier; });
  if (waiting == end) return false;

  const int line = waiting->line;
  const bool together = std::all_of(begin, end, [&](const Thread& t) {
    return t.state == State::kAtBarrier && t.line == line;
  });
  if (!together) {
    report_divergence(begin, end);
    return false;
  }
  unsigned scope = waiting->scope;
  for (Thread* t = begin; t != end; ++t) {
    scope &= t->scope;
    t->state = State::kReady;
  }
  epochs_.advance(scope);
  return true;
}

// Names two of the parties: where the first unfinished thread waits, and the first thread that does
// not wait with it.
void Scheduler::report_divergence(const Thread* begin, const Thread* end) {
  const Thread& one = *std::find_if(
      begin, end, [](const Thread& t) { return t.state != State::kFinished; });
  auto elsewhere = [&](const Thread& t) { return t.state != one.state || t.line != one.line; };
  const Thread& other = *std::find_if(begin, end, elsewhere);
  const Index3 position = other.context.position_in_grid;
  const auto all = end - begin, away = std::count_if(begin, end, elsewhere);
  const std::string line =
      other.state == State::kFinished ? "" : ", line " + std::to_string(other.line);
  report_for_thread("divergence", one.context, one.line,
                    "%td of %td threads are %s, but thread (%u, %u, %u) is %s%s", all - away, all,
                    place_of(one.state), position.x, position.y, position.z,
                    place_of(other.state), line.c_str());
}

const char* Scheduler::place_of(State state) {
  switch (state) {
    case State::kAtQuadExchange: return "in a function of quads";
    case State::kAtExchange: return "in a simdgroup function";
    case State::kAtSimdgroupBarrier: return "at a simdgroup barrier";
    case State::kAtBarrier: return "at a threadgroup barrier";
    case State::kFinished: return "past the kernel's end";
    case State::kReady: break;
  }
  return "running";
}

// ---- small things

Accessor Scheduler::accessor(BarrierScope memory) const {
  const ThreadContext& c = current_->context;
  return {epochs_[memory], first_epochs_[memory], simdgroup_epochs_[c.simdgroup][memory],
          static_cast<uint8_t>(c.simdgroup), static_cast<uint8_t>(c.lane)};
}

int Scheduler::simdgroup_size(int simdgroup) const {
  return std::min(kSimdWidth, thread_count_ - simdgroup * kSimdWidth);
}

void Scheduler::put_in_order(std::vector<int>& items, int count) {
  items.resize(count);
  for (int i = 0; i < count; ++i) items[i] = order_ == kDescending ? count - 1 - i : i;
  if (order_ == kAscending || order_ == kDescending) return;
  for (int i = count - 1; i > 0; --i) std::swap(items[i], items[random() % (i + 1)]);
}

uint32_t Scheduler::random() {  // xorshift
  random_state_ ^= random_state_ << 13;
  random_state_ ^= random_state_ >> 17;
  random_state_ ^= random_state_ << 5;
  return random_state_;
}

}  // namespace emulator

// ---- for front ends

using namespace emulator;

void emulator_barrier(unsigned scope, int line) { scheduler.wait_at_barrier(scope, line); }

void emulator_simdgroup_barrier(unsigned scope, int line) {
  scheduler.wait_at_simdgroup_barrier(scope, line);
}

uint32_t emulator_exchange(const void* mine, size_t bytes, void* everyones, int line) {
  return scheduler.exchange(mine, bytes, everyones, line);
}

uint32_t emulator_exchange_in_quad(const void* mine, size_t bytes, void* everyones, int line) {
  return scheduler.exchange_in_quad(mine, bytes, everyones, line);
}

uint32_t emulator_lane() { return scheduler.context().lane; }

const ThreadContext* emulator_context() { return &scheduler.context(); }

void* emulator_shared_variable(SharedVariable* variable, size_t bytes, size_t alignment,
                               size_t cell_bytes) {
  return threadgroup_memory.allocate(variable, bytes, alignment, cell_bytes,
                                     __builtin_return_address(0));
}

void emulator_fail(const char* kind, const char* message, int line) {
  fail(kind, "", line, nullptr, "%s", message);
}
