// Relaxed atomics, the only ones that Metal 3.1 has.
#pragma once

#include "simdgroup.h"

namespace metal {

enum memory_order { memory_order_relaxed };

template <class T>
struct atomic {
  T value;
};
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_float = atomic<float>;

template <class T>
UNCHECKED T atomic_load_explicit(const volatile atomic<T>* object, memory_order) {
  emulator_atomic_access(object, sizeof(T));
  return object->value;
}
template <class T, class U>
UNCHECKED void atomic_store_explicit(volatile atomic<T>* object, U value, memory_order) {
  emulator_atomic_access(object, sizeof(T));
  object->value = static_cast<T>(value);
}

#define FETCH(name, expression)                                                                 \
  template <class T, class U>                                                                   \
  UNCHECKED T atomic_fetch_##name##_explicit(volatile atomic<T>* object, U operand,             \
                                             memory_order) {                                    \
    emulator_atomic_access(object, sizeof(T));                                                  \
    const T old = object->value, value = static_cast<T>(operand);                               \
    object->value = expression;                                                                 \
    return old;                                                                                 \
  }
FETCH(add, old + value)
FETCH(max, old < value ? value : old)
FETCH(min, value < old ? value : old)
FETCH(or, old | value)
#undef FETCH

}  // namespace metal
