// What the compiler calls. Kernels are compiled with -fsanitize=thread, which puts a call before
// every load and store, and with a few checks of -fsanitize=undefined, which call only when
// broken. The sanitizers' own runtimes are not linked: these functions take their place.
#include "counters.h"
#include "memory.h"
#include "report.h"
#include "scheduler.h"

using namespace emulator;

static uint64_t access_count;

uint64_t emulator::checked_accesses() { return access_count; }
void emulator::reset_checked_accesses() { access_count = 0; }

static inline void check(const void* pointer, size_t bytes, Access access, const void* caller) {
  auto address = reinterpret_cast<uintptr_t>(pointer);
  // Initialisers of program-scope constants run when the module is loaded, outside any launch.
  if (!scheduler.running() || scheduler.on_own_stack(address)) return;
  ++access_count;
  check_access(address, bytes, access, caller);
}

#define CALLER __builtin_return_address(0)

// A vector lies on a multiple of its size.
static inline void check_aligned(const void* pointer, size_t bytes, const void* caller) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes == 0 || !scheduler.running()) return;
  fail("alignment", "", 0, caller, "%zu bytes that do not lie on a multiple of that", bytes);
}

#define HOOK(NAME, BYTES, ACCESS) \
  extern "C" void __tsan_##NAME##BYTES(void* p) { check(p, BYTES, ACCESS, CALLER); }
#define ALIGNED_HOOK(NAME, BYTES, ACCESS)         \
  extern "C" void __tsan_##NAME##BYTES(void* p) { \
    check_aligned(p, BYTES, CALLER);              \
    check(p, BYTES, ACCESS, CALLER);              \
  }
#define HOOKS(BYTES)                              \
  ALIGNED_HOOK(read, BYTES, Access::kRead)        \
  ALIGNED_HOOK(write, BYTES, Access::kWrite)      \
  HOOK(unaligned_read, BYTES, Access::kRead)      \
  HOOK(unaligned_write, BYTES, Access::kWrite)
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)

extern "C" void __tsan_read_range(void* p, size_t bytes) {
  check(p, bytes, Access::kRead, CALLER);
}
extern "C" void __tsan_write_range(void* p, size_t bytes) {
  check(p, bytes, Access::kWrite, CALLER);
}
extern "C" void __tsan_init() {}

// ---- for front ends

int32_t emulator_add(int32_t* counter, int32_t addend) {
  check(counter, sizeof(int32_t), Access::kAdd, CALLER);
  counters.add(reinterpret_cast<uintptr_t>(counter), scheduler.accessor(kDeviceMemory),
               scheduler.context().index_in_threadgroup);
  const int32_t before = *counter;
  *counter += addend;
  return before;
}

void emulator_fence() {
  counters.fence(scheduler.accessor(kDeviceMemory), scheduler.context().index_in_threadgroup);
}

// ---- undefined behaviour

// The part of the undefined-behaviour checks' arguments that is used here.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
struct TypeDescriptor {
  uint16_t kind;
  uint16_t info;  // twice the logarithm of an integer's width in bits, and 1 for a signed type
  char name[1];
};
struct TwoTypes {
  SourceLocation location;
  const TypeDescriptor* first;
  const TypeDescriptor* second;
};

// Small integers arrive zero-extended.
static long long decode(uintptr_t value, const TypeDescriptor* type) {
  const int unused_bits = 64 - (1 << (type->info >> 1));
  const auto widened = static_cast<int64_t>(value << unused_bits);
  return type->info & 1 ? widened >> unused_bits : static_cast<long long>(value);
}

// An index outside an array whose size the compiler knows: also of thread-private arrays and of
// constants, and of the inner dimension of an array, which the memory checks cannot see.
extern "C" void __ubsan_handle_out_of_bounds(const TwoTypes* array_and_index, uintptr_t index) {
  fail("out of bounds", "", 0, CALLER, "index %lld of an array of type %s",
       decode(index, array_and_index->second), array_and_index->first->name);
}

// Metal masks the count of a shift, CUDA clamps it, C++ leaves it undefined: kernels must not.
extern "C" void __ubsan_handle_shift_out_of_bounds(const TwoTypes* value_and_count, uintptr_t,
                                                   uintptr_t count) {
  fail("arithmetic", "", 0, CALLER, "shift of a value of type %s by %lld",
       value_and_count->first->name, decode(count, value_and_count->second));
}

extern "C" void __ubsan_handle_divrem_overflow(const void*, uintptr_t, uintptr_t) {
  fail("arithmetic", "", 0, CALLER, "integer division by zero");
}
