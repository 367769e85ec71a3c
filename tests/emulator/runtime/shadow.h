// Who touched a cell of memory, and whether a new access could race with that.
//
// Two accesses to one cell race when they come from different threads, at least one writes, and
// nothing orders them. Within a threadgroup a barrier orders them, within a simdgroup also a
// simdgroup barrier, and between threadgroups of a launch only a counter (counters.h). Barriers are
// counted: accesses with different counts of a barrier that both threads pass are ordered. Counts
// never repeat in a launch, so that one also tells which threadgroup passed it.
#pragma once

#include <cstdint>
#include <string>

namespace emulator {

enum class Access { kRead, kWrite, kAdd };  // kAdd: atomically, to a counter

// The running thread, as race detection sees it.
struct Accessor {
  uint32_t epoch;            // barriers passed in the launch, counted for the memory accessed
  uint32_t first_epoch;      // the epoch in which this threadgroup began
  uint32_t simdgroup_epoch;  // simdgroup barriers passed, counted likewise
  uint8_t simdgroup;
  uint8_t lane;
};

// What orders accesses of several threadgroups: see counters.h.
bool are_ordered_by_counters(uint32_t epoch, const Accessor& me);

// Sets of epochs, one of each of some threadgroups, by number; 0 is the empty one.
uint32_t set_with(uint32_t set, uint32_t epoch);
bool is_set_ordered(uint32_t set, const Accessor& me);

// The threads that made one kind of access. Only what can still conflict is kept: those since the
// last barrier, reduced to one simdgroup and one lane, or to "several"; and of each earlier
// threadgroup the last epoch in which it did.
class AccessSet {
 public:
  static constexpr uint8_t kSeveral = 0xff;

  bool empty() const { return epoch_ == 0; }

  bool conflicts_with(const Accessor& me) const {
    if (empty()) return false;
    if (earlier_ != 0 && !is_set_ordered(earlier_, me)) return true;
    if (epoch_ < me.first_epoch) return !are_ordered_by_counters(epoch_, me);
    if (epoch_ != me.epoch) return false;
    if (simdgroup_ != me.simdgroup) return true;
    if (simdgroup_epoch_ != me.simdgroup_epoch) return false;
    return lane_ != me.lane;
  }

  // For messages: who it was, if that is still known.
  std::string describe(const Accessor& me) const {
    if (earlier_ != 0 || epoch_ < me.first_epoch) return "another threadgroup";
    if (simdgroup_ == kSeveral) return "several simdgroups";
    const std::string simdgroup = "simdgroup " + std::to_string(simdgroup_);
    if (lane_ == kSeveral) return "several lanes of " + simdgroup;
    return "lane " + std::to_string(lane_) + " of " + simdgroup;
  }

  void add(const Accessor& me) {
    if (epoch_ != me.epoch) {
      if (!empty() && epoch_ < me.first_epoch) earlier_ = set_with(earlier_, epoch_);
      epoch_ = me.epoch;
      simdgroup_epoch_ = me.simdgroup_epoch;
      simdgroup_ = me.simdgroup;
      lane_ = me.lane;
    } else if (simdgroup_ != me.simdgroup) {
      simdgroup_ = kSeveral;
    } else if (simdgroup_epoch_ != me.simdgroup_epoch) {
      simdgroup_epoch_ = me.simdgroup_epoch;
      lane_ = me.lane;
    } else if (lane_ != me.lane) {
      lane_ = kSeveral;
    }
  }

 private:
  uint32_t epoch_ = 0;  // 0: nobody yet; epochs count from 1
  uint32_t simdgroup_epoch_ = 0;
  uint8_t simdgroup_ = 0;
  uint8_t lane_ = 0;
  uint32_t earlier_ = 0;  // of other threadgroups
};

// The history of one cell.
class Cell {
 public:
  bool written() const { return written_; }
  void mark_written() { written_ = true; }
  bool is_counter() const { return is_counter_; }
  void mark_counter() { is_counter_ = true; }

  // Records the access, unless it races with an earlier one: then returns that one. Additions to a
  // counter are recorded by it.
  struct Conflict {
    Access access;
    const AccessSet* by;  // null if there is none
  };
  Conflict record(Access access, const Accessor& me) {
    const bool writes = access != Access::kRead;
    if (writes && reads_.conflicts_with(me)) return {Access::kRead, &reads_};
    if (writes_.conflicts_with(me)) return {Access::kWrite, &writes_};
    if (access == Access::kAdd) return {access, nullptr};
    (writes ? writes_ : reads_).add(me);
    written_ |= writes;
    return {access, nullptr};
  }

 private:
  AccessSet reads_, writes_;
  bool written_ = false;
  bool is_counter_ = false;
};

}  // namespace emulator
