#include "counters.h"

#include <algorithm>

namespace emulator {

Counters counters;

namespace {

// A set is another one and one epoch more. Cells that the same threadgroups touch have the same.
struct Sets {
  struct Set {
    uint32_t rest, epoch;
  };
  std::vector<Set> all;
  std::unordered_map<uint64_t, uint32_t> numbers;
} sets;

}  // namespace

bool are_ordered_by_counters(uint32_t epoch, const Accessor& me) { return counters.are_ordered(epoch, me); }

uint32_t set_with(uint32_t set, uint32_t epoch) {
  const auto [place, is_new] = sets.numbers.try_emplace(uint64_t{set} << 32 | epoch, sets.all.size() + 1);
  if (is_new) sets.all.push_back({set, epoch});
  return place->second;
}

bool is_set_ordered(uint32_t set, const Accessor& me) {
  for (; set != 0; set = sets.all[set - 1].rest) {
    if (!counters.are_ordered(sets.all[set - 1].epoch, me)) return false;
  }
  return true;
}

void Counters::start_launch() {
  counters_.clear();
  sets = Sets{};
}

void Counters::start_threadgroup() {
  hands_.clear();
  received_.clear();
}

void Counters::fence(const Accessor& me, uint32_t thread) {
  Hand& hand = hands_[thread];
  hand.fenced_epoch = me.epoch;
  for (const Epochs& epochs : hand.seen) received_.push_back({epochs, me.epoch, me.simdgroup, me.lane});
  hand.seen.clear();
}

void Counters::add(uintptr_t address, const Accessor& me, uint32_t thread) {
  Counter& counter = counters_[address];
  Hand& hand = hands_[thread];
  hand.seen.insert(hand.seen.end(), counter.published.begin(), counter.published.end());
  counter.last = AccessSet();
  counter.last.add(me);
  // Without a fence there are no epochs before it.
  counter.published.push_back({me.first_epoch, hand.fenced_epoch});
}

bool Counters::are_ordered(uint32_t epoch, const Accessor& me) const {
  return std::any_of(received_.begin(), received_.end(), [&](const Received& received) {
    const bool mine = received.simdgroup == me.simdgroup && received.lane == me.lane;
    return received.epochs.hold(epoch) && (mine || received.since < me.epoch);
  });
}

}  // namespace emulator
