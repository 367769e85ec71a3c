// Counters in device memory, through which the threadgroups of a launch let each other read what they wrote.
//
// A thread that passes a fence and then adds to a counter publishes what its threadgroup did before the last barrier in
// front of the fence. Whoever adds to the same counter later, and passes a fence behind that, may touch it: the thread
// itself at once, the others of its threadgroup behind a barrier.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "shadow.h"

namespace emulator {

class Counters {
 public:
  void start_launch();
  void start_threadgroup();

  // The running thread, `me`, which is thread `thread` of its threadgroup, passes a fence.
  void fence(const Accessor& me, uint32_t thread);
  // It has added to a counter at `address`.
  void add(uintptr_t address, const Accessor& me, uint32_t thread);

  // Who has added last to the counter there. That thread has seen what all others added.
  const AccessSet& last_adder(uintptr_t address) const { return counters_.at(address).last; }
  // Whether what another threadgroup did in this epoch is ordered before what `me` does now.
  bool are_ordered(uint32_t epoch, const Accessor& me) const;

 private:
  struct Epochs {
    uint32_t first, end;
    bool hold(uint32_t epoch) const { return epoch >= first && epoch < end; }
  };
  struct Counter {
    AccessSet last;  // addition
    std::vector<Epochs> published;
  };
  struct Received {
    Epochs epochs;
    uint32_t since;  // the epoch of the thread that received it
    uint8_t simdgroup, lane;
  };
  // What a thread has at hand between its fences and additions.
  struct Hand {
    uint32_t fenced_epoch = 0;  // 0: it has passed no fence
    std::vector<Epochs> seen;   // published on counters that it added to behind its latest fence
  };

  std::unordered_map<uintptr_t, Counter> counters_;
  std::unordered_map<uint32_t, Hand> hands_;
  std::vector<Received> received_;
};

extern Counters counters;

}  // namespace emulator
