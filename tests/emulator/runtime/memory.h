// The memory a kernel may touch, and the rules it must keep there.
#pragma once

#include <string>
#include <vector>

#include "launch.h"
#include "shadow.h"

namespace emulator {

// A buffer, or a variable shared by a threadgroup.
struct Region {
  std::string name;
  char* base;
  size_t bytes;
  size_t cell_bytes;
  BarrierScope memory;
  bool writable;
  std::vector<Cell> cells;  // empty for read-only regions, where nothing can go wrong but bounds
};

// Buffers lie far apart, so that a wrong index, even a negative one taken for a huge unsigned one,
// stays nearer to its own buffer than to any other.
class DeviceMemory {
 public:
  static constexpr size_t kMaxBuffers = 32;  // Metal binds 31

  bool reserve();  // address space; false if the system gives none
  void bind(const BufferRequest* requests, size_t count);
  void copy_back(const BufferRequest* requests) const;
  void release();

  bool contains(uintptr_t address) const {
    return address - reinterpret_cast<uintptr_t>(space_) < kMaxBuffers * kSlotBytes;
  }
  // The region whose surroundings hold `address`; null if no buffer is bound there.
  Region* region_near(uintptr_t address) {
    size_t slot = (address - reinterpret_cast<uintptr_t>(space_)) / kSlotBytes;
    return slot < regions_.size() ? &regions_[slot] : nullptr;
  }

  void* const* addresses() const { return addresses_.data(); }
  const std::vector<Region>& regions() const { return regions_; }

 private:
  static constexpr size_t kSlotBytes = size_t{64} << 30;  // address space, not memory

  char* space_ = nullptr;
  std::vector<Region> regions_;
  std::vector<void*> addresses_;
};

// One threadgroup's shared variables, with undefined bytes between them.
class ThreadgroupMemory {
 public:
  void start(size_t limit);
  void clear();  // for the next threadgroup
  void* allocate(SharedVariable* variable, size_t bytes, size_t alignment, size_t cell_bytes,
                 const void* caller);

  bool contains(uintptr_t address) const {
    return address - reinterpret_cast<uintptr_t>(arena_.data()) < arena_.size();
  }
  // The variable that holds `address`, or else the last one before it.
  Region* region_near(uintptr_t address);

  size_t peak_bytes() const { return peak_bytes_; }

 private:
  static constexpr size_t kGapBytes = 64;
  static constexpr size_t kMaxVariables = 256;

  std::vector<char> arena_;
  std::vector<Region> regions_;
  size_t limit_ = 0, used_bytes_ = 0, peak_bytes_ = 0, next_offset_ = 0;
  uint64_t serial_ = 0;  // unique in the process: SharedVariables outlive launches
};

extern DeviceMemory device_memory;
extern ThreadgroupMemory threadgroup_memory;

// Checks one access of the running thread and ends the launch if it breaks a rule. `caller` is the
// return address of the instrumentation hook.
void check_access(uintptr_t address, size_t bytes, Access access, const void* caller);

uint64_t checked_accesses();
void reset_checked_accesses();

// Every element of an output must have been written when the launch ends.
void check_outputs_written();

// The kernel's module: its constants may be read, its code names the place of a violation.
void set_kernel_module(KernelEntry entry);
uint64_t offset_in_kernel_module(const void* code);

}  // namespace emulator
