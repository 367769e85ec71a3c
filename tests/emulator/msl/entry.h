// How the emulator calls a kernel: what it passes for each parameter.
#pragma once

#include "vectors.h"

namespace emulator {

// A parameter `device T* x` or `constant T& x` takes the type it wants.
struct BufferPointer {
  void* address;
  template <class T>
  operator T*() const {
    return static_cast<T*>(address);
  }
};
struct BufferReference {
  void* address;
  template <class T>
  operator T&() const {
    return *static_cast<T*>(address);
  }
};

inline uint3 to_uint3(Index3 index) { return {index.x, index.y, index.z}; }

// The attributes [[name]] of kernel parameters.
namespace attribute {

#define ATTRIBUTE(type, name, value)                                                      \
  __attribute__((no_sanitize("thread"))) inline type name(const ThreadContext& context) { \
    return value;                                                                         \
  }
ATTRIBUTE(uint3, thread_position_in_grid, to_uint3(context.position_in_grid))
ATTRIBUTE(uint3, thread_position_in_threadgroup, to_uint3(context.position_in_threadgroup))
ATTRIBUTE(uint3, threadgroup_position_in_grid, to_uint3(context.threadgroup_position))
ATTRIBUTE(uint3, threadgroups_per_grid, to_uint3(context.threadgroup_count))
ATTRIBUTE(uint, thread_index_in_threadgroup, context.index_in_threadgroup)
ATTRIBUTE(uint, thread_index_in_simdgroup, context.lane)
ATTRIBUTE(uint, simdgroup_index_in_threadgroup, context.simdgroup)
#undef ATTRIBUTE

}  // namespace attribute

// Races in shared variables are tracked by scalar where the type tells what that is, else by byte.
template <class T>
constexpr size_t scalar_bytes = std::is_class_v<T> ? 1 : sizeof(T);
template <class T, int N>
constexpr size_t scalar_bytes<metal::vec<T, N>> = sizeof(T);

}  // namespace emulator

// What a declaration `threadgroup T name[n];` is rewritten to, after a type `name_type`.
#define EMULATOR_SHARED_VARIABLE(name)                                                      \
  static emulator::SharedVariable name##_variable{#name, 0, nullptr};                       \
  auto& name = *static_cast<name##_type*>(                                                  \
      emulator_shared_variable(&name##_variable, sizeof(name##_type), alignof(name##_type), \
                               emulator::scalar_bytes<std::remove_all_extents_t<name##_type>>))
