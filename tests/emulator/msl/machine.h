// What clang compiles a kernel with for a GPU that stands for Apple's (``machine.py``): the declarations
// of the lint, with bodies. What Apple's GPU does in one instruction is a line of its own in the
// assembly, ``; metal <name>``.
#pragma once

#include "lint.h"

#define ONE_INSTRUCTION(name, result, x) asm("; metal " name " %0, %1" : "=v"(result) : "v"(x))

namespace metal {

float exp(float x) {
  float y;
  ONE_INSTRUCTION("exp", y, x);
  return y;
}
namespace fast {
float exp(float x) { return metal::exp(x); }
}
float sqrt(float x) { return __builtin_sqrtf(x); }
float fabs(float x) { return __builtin_fabsf(x); }
float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#define BODIES(T)                              \
  T max(T a, T b) { return a > b ? a : b; }    \
  T min(T a, T b) { return a < b ? a : b; }
BODIES(char)
BODIES(uchar)
BODIES(short)
BODIES(ushort)
BODIES(int)
BODIES(uint)
BODIES(long)
BODIES(ulong)
BODIES(half)
#undef BODIES
float max(float a, float b) { return __builtin_fmaxf(a, b); }
float min(float a, float b) { return __builtin_fminf(a, b); }

void threadgroup_barrier(mem_flags) { asm volatile("; metal barrier" ::: "memory"); }
void simdgroup_barrier(mem_flags) { asm volatile("; metal simdgroup_barrier" ::: "memory"); }

#define OF_LANES(name)                        \
  template <class T>                          \
  T name(T x) {                               \
    T y;                                      \
    ONE_INSTRUCTION(#name, y, x);             \
    return y;                                 \
  }
OF_LANES(simd_sum)
OF_LANES(simd_max)
#undef OF_LANES
template <class T>
T simd_shuffle_xor(T x, ushort) {
  T y;
  ONE_INSTRUCTION("simd_shuffle_xor", y, x);
  return y;
}
template <class T>
T quad_shuffle(T x, ushort lane) {
  T y;
  asm("; metal quad_shuffle %0, %1, %2" : "=v"(y) : "v"(x), "v"(lane));
  return y;
}
bool simd_any(bool x) {
  int y;
  ONE_INSTRUCTION("simd_any", y, (int)x);
  return y;
}

}  // namespace metal

// Threadgroup variables lie at known places, 4 KB apart, so a constant offset costs nothing.
#undef LINT_SHARED_VARIABLE
#define LINT_SHARED_VARIABLE(name) \
  threadgroup name##_type& name = *(threadgroup name##_type*)(4096 * (__COUNTER__ + 1))

// ---- the attributes of a kernel's parameters
namespace attribute {
inline uint3 threadgroup_position_in_grid() {
  return {__builtin_amdgcn_workgroup_id_x(), __builtin_amdgcn_workgroup_id_y(), __builtin_amdgcn_workgroup_id_z()};
}
inline uint3 threadgroups_per_grid() {
  uint3 count;
  asm("; count %0" : "=s"(count.x));
  asm("; count %0" : "=s"(count.y));
  asm("; count %0" : "=s"(count.z));
  return count;
}
inline uint3 thread_position_in_threadgroup() {
  return {__builtin_amdgcn_workitem_id_x(), __builtin_amdgcn_workitem_id_y(), __builtin_amdgcn_workitem_id_z()};
}
inline uint thread_index_in_threadgroup() { return __builtin_amdgcn_workitem_id_x(); }
inline uint thread_index_in_simdgroup() { return __builtin_amdgcn_workitem_id_x() & 31u; }
inline uint simdgroup_index_in_threadgroup() {
  return __builtin_amdgcn_readfirstlane(__builtin_amdgcn_workitem_id_x() >> 5);
}
}  // namespace attribute
