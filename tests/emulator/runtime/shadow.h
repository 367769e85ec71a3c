// Who touched a cell of memory, and whether a new access could race with that.
//
// Two accesses to one cell race when they come from different threads, at least one writes, and
// nothing orders them. Within a threadgroup a barrier orders them, within a simdgroup also a
// simdgroup barrier, and between threadgroups of a launch nothing does. Barriers are counted:
// accesses with different counts of a barrier that both threads pass are ordered.
#pragma once

#include <cstdint>
#include <string>

namespace emulator {

enum class Access { kRead, kWrite };

// The running thread, as race detection sees it.
struct Accessor {
  uint32_t epoch;            // barriers passed in the launch, counted for the memory accessed
  uint32_t first_epoch;      // the epoch in which this threadgroup began
  uint32_t simdgroup_epoch;  // simdgroup barriers passed, counted likewise
  uint8_t simdgroup;
  uint8_t lane;
};

// The threads that made one kind of access. Only what can still conflict is kept: those since the
// last barrier, reduced to one simdgroup and one lane, or to "several".
class AccessSet {
 public:
  static constexpr uint8_t kSeveral = 0xff;

  bool empty() const { return epoch_ == 0; }

  bool conflicts_with(const Accessor& me) const {
    if (empty()) return false;
    if (other_threadgroup_ || epoch_ < me.first_epoch) return true;
    if (epoch_ != me.epoch) return false;
    if (simdgroup_ != me.simdgroup) return true;
    if (simdgroup_epoch_ != me.simdgroup_epoch) return false;
    return lane_ != me.lane;
  }

  // For messages: who it was, if that is still known.
  std::string describe(const Accessor& me) const {
    if (other_threadgroup_ || epoch_ < me.first_epoch) return "another threadgroup";
    if (simdgroup_ == kSeveral) return "several simdgroups";
    const std::string simdgroup = "simdgroup " + std::to_string(simdgroup_);
    if (lane_ == kSeveral) return "several lanes of " + simdgroup;
    return "lane " + std::to_string(lane_) + " of " + simdgroup;
  }

  void add(const Accessor& me) {
    if (epoch_ != me.epoch) {
      other_threadgroup_ |= !empty() && epoch_ < me.first_epoch;
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
  bool other_threadgroup_ = false;
};

// The history of one cell.
class Cell {
 public:
  bool written() const { return written_; }
  void mark_written() { written_ = true; }

  // Records the access, unless it races with an earlier one: then returns that one.
  struct Conflict {
    Access access;
    const AccessSet* by;  // null if there is none
  };
  Conflict record(Access access, const Accessor& me) {
    const bool writes = access == Access::kWrite;
    if (writes && reads_.conflicts_with(me)) return {Access::kRead, &reads_};
    if (writes_.conflicts_with(me)) return {Access::kWrite, &writes_};
    (writes ? writes_ : reads_).add(me);
    written_ |= writes;
    return {access, nullptr};
  }

 private:
  AccessSet reads_, writes_;
  bool written_ = false;
};

}  // namespace emulator
