#include "memory.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "counters.h"
#include "report.h"
#include "scheduler.h"

namespace emulator {

DeviceMemory device_memory;
ThreadgroupMemory threadgroup_memory;

namespace {

// Undefined bytes look like this: NaN in every float format, and an index far out of bounds.
constexpr int kPoison = 0xff;

constexpr size_t kPageBytes = 4096;

size_t pages_for(size_t bytes) { return (bytes / kPageBytes + 1) * kPageBytes; }

struct AddressRange {
  uintptr_t begin = 0, end = 0;
  bool contains(uintptr_t address) const { return address >= begin && address < end; }
};
AddressRange kernel_module;

int find_module(dl_phdr_info* info, size_t, void* entry) {
  AddressRange range{~uintptr_t{0}, 0};
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    if (segment.p_type != PT_LOAD) continue;
    uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
    range.begin = std::min(range.begin, begin);
    range.end = std::max<uintptr_t>(range.end, begin + segment.p_memsz);
  }
  if (!range.contains(reinterpret_cast<uintptr_t>(entry))) return 0;
  kernel_module = range;
  return 1;
}

// Pages of zeros stay what they are in fresh memory: then an array of 8 GiB with a few numbers in it takes a few pages.
void copy_pages(char* to, const char* from, size_t bytes) {
  static const char zeros[kPageBytes] = {};
  for (size_t i = 0; i < bytes; i += kPageBytes) {
    const size_t count = std::min(kPageBytes, bytes - i);
    if (std::memcmp(from + i, zeros, count) != 0) std::memcpy(to + i, from + i, count);
  }
}

}  // namespace

void set_kernel_module(KernelEntry entry) {
  dl_iterate_phdr(find_module, reinterpret_cast<void*>(entry));
}

uint64_t offset_in_kernel_module(const void* code) {
  return reinterpret_cast<uintptr_t>(code) - kernel_module.begin;
}

// ---- device memory

bool DeviceMemory::reserve() {
  if (space_) return true;
  void* space = mmap(nullptr, kMaxBuffers * kSlotBytes, PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (space == MAP_FAILED) return false;
  space_ = static_cast<char*>(space);
  return true;
}

void DeviceMemory::bind(const BufferRequest* requests, size_t count) {
  regions_.clear();
  addresses_.clear();
  for (size_t i = 0; i < count; ++i) {
    const BufferRequest& request = requests[i];
    char* base = space_ + i * kSlotBytes + kSlotBytes / 2;
    mprotect(base, pages_for(request.bytes), PROT_READ | PROT_WRITE);
    if (request.role == kOutput) {
      std::memset(base, kPoison, request.bytes);
    } else {
      copy_pages(base, static_cast<const char*>(request.host), request.bytes);
    }
    Region region{request.name, base, request.bytes, request.element_bytes, kDeviceMemory,
                  request.role != kInput, {}};
    if (region.writable) region.cells.resize(request.bytes / request.element_bytes);
    if (request.role == kInitialised) {
      for (Cell& cell : region.cells) cell.mark_written();
    }
    regions_.push_back(std::move(region));
    addresses_.push_back(base);
  }
}

void DeviceMemory::copy_back(const BufferRequest* requests) const {
  for (size_t i = 0; i < regions_.size(); ++i) {
    if (regions_[i].writable) std::memcpy(requests[i].host, regions_[i].base, regions_[i].bytes);
  }
}

void DeviceMemory::release() {
  for (const Region& region : regions_) {
    madvise(region.base, pages_for(region.bytes), MADV_DONTNEED);
    mprotect(region.base, pages_for(region.bytes), PROT_NONE);
  }
  regions_.clear();
}

// ---- threadgroup memory

void ThreadgroupMemory::start(size_t limit) {
  limit_ = limit;
  peak_bytes_ = 0;
  arena_.assign(limit + kMaxVariables * kGapBytes, static_cast<char>(kPoison));
  clear();
}

void ThreadgroupMemory::clear() {
  ++serial_;
  std::memset(arena_.data(), kPoison, next_offset_);
  regions_.clear();
  next_offset_ = kGapBytes;
  used_bytes_ = 0;
}

void* ThreadgroupMemory::allocate(SharedVariable* variable, size_t bytes, size_t alignment,
                                  size_t cell_bytes, const void* caller) {
  if (variable->threadgroup_serial == serial_) return variable->address;
  used_bytes_ += bytes;
  peak_bytes_ = std::max(peak_bytes_, used_bytes_);
  if (used_bytes_ > limit_ || regions_.size() == kMaxVariables) {
    fail("threadgroup memory", variable->name, 0, caller,
         "%zu bytes are declared up to '%s', the limit is %zu", used_bytes_, variable->name,
         limit_);
  }
  alignment = std::max(alignment, size_t{16});
  auto free_address = reinterpret_cast<uintptr_t>(arena_.data()) + next_offset_;
  size_t offset = next_offset_ + (alignment - free_address % alignment) % alignment;
  next_offset_ = offset + bytes + kGapBytes;
  char* base = arena_.data() + offset;
  regions_.push_back(Region{variable->name, base, bytes, cell_bytes, kThreadgroupMemory, true,
                            std::vector<Cell>(bytes / cell_bytes)});
  variable->threadgroup_serial = serial_;
  variable->address = base;
  return base;
}

Region* ThreadgroupMemory::region_near(uintptr_t address) {
  Region* nearest = nullptr;
  for (Region& region : regions_) {  // ascending, and few
    if (reinterpret_cast<uintptr_t>(region.base) > address) break;
    nearest = &region;
  }
  return nearest;
}

// ---- the rules

namespace {

const char* verb(Access access) {
  return access == Access::kRead ? "read of" : access == Access::kWrite ? "write to" : "addition to";
}
const char* noun(Access access) {
  return access == Access::kRead ? "read" : access == Access::kWrite ? "write" : "addition";
}

const char* memory_name(const Region& region) {
  return region.memory == kDeviceMemory ? "device" : "threadgroup";
}

[[noreturn]] void fail_out_of_bounds(const Region& region, ptrdiff_t offset, size_t bytes,
                                     Access access, const void* caller) {
  fail("out of bounds", region.name, 0, caller,
       "%s %zu bytes at byte %td of %s memory '%s', which has %zu bytes (%zu elements of %zu)",
       verb(access), bytes, offset, memory_name(region), region.name.c_str(), region.bytes,
       region.bytes / region.cell_bytes, region.cell_bytes);
}

[[noreturn]] void fail_at_element(const char* kind, const Region& region, size_t element,
                                  Access access, const std::string& explanation,
                                  const void* caller) {
  fail(kind, region.name, 0, caller, "%s %s memory %s[%zu], %s", verb(access),
       memory_name(region), region.name.c_str(), element, explanation.c_str());
}

void check_cells(Region& region, size_t first, size_t last, Access access, const void* caller) {
  const Accessor me = scheduler.accessor(region.memory);
  for (size_t i = first; i <= last; ++i) {
    Cell& cell = region.cells[i];
    if (access != Access::kWrite && !cell.written()) {
      fail_at_element("uninitialised", region, i, access, "which nobody has written", caller);
    }
    Cell::Conflict conflict = cell.record(access, me);
    if (access == Access::kAdd) {
      cell.mark_counter();
    } else if (cell.is_counter()) {
      const auto address = reinterpret_cast<uintptr_t>(region.base) + i * region.cell_bytes;
      const AccessSet& adder = counters.last_adder(address);
      if (adder.conflicts_with(me)) conflict = {Access::kAdd, &adder};
    }
    if (conflict.by) {
      fail_at_element("race", region, i, access,
                      std::string("not ordered after a ") + noun(conflict.access) + " by " +
                          conflict.by->describe(me), caller);
    }
  }
}

void check_region(Region& region, uintptr_t address, size_t bytes, Access access,
                  const void* caller) {
  const auto offset = static_cast<ptrdiff_t>(address - reinterpret_cast<uintptr_t>(region.base));
  if (offset < 0 || offset + bytes > region.bytes) {
    fail_out_of_bounds(region, offset, bytes, access, caller);
  }
  const size_t first = offset / region.cell_bytes;
  const size_t last = (offset + bytes - 1) / region.cell_bytes;
  if (region.writable) return check_cells(region, first, last, access, caller);
  if (access != Access::kRead) {
    fail_at_element("read-only", region, first, access, "which is an input", caller);
  }
}

}  // namespace

void check_access(uintptr_t address, size_t bytes, Access access, const void* caller) {
  Region* region = nullptr;
  if (threadgroup_memory.contains(address)) {
    region = threadgroup_memory.region_near(address);
  } else if (device_memory.contains(address)) {
    region = device_memory.region_near(address);
  }
  if (region) return check_region(*region, address, bytes, access, caller);
  if (kernel_module.contains(address) && access == Access::kRead) return;  // a constant
  fail("stray pointer", "", 0, caller,
       kernel_module.contains(address)
           ? "%s %zu bytes of program-scope memory, which is constant"
           : "%s %zu bytes outside all buffers, threadgroup memory and this thread's own variables",
       verb(access), bytes);
}

void check_outputs_written() {
  for (const Region& region : device_memory.regions()) {
    auto unwritten = [](const Cell& cell) { return !cell.written(); };
    auto first = std::find_if(region.cells.begin(), region.cells.end(), unwritten);
    if (first == region.cells.end()) continue;
    report_for_launch("unwritten output", region.name,
                      "%td of %zu elements of '%s' were never written, the first is element %td",
                      std::count_if(first, region.cells.end(), unwritten), region.cells.size(),
                      region.name.c_str(), first - region.cells.begin());
    return;
  }
}

}  // namespace emulator
