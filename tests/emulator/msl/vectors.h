// float2, uint3 and the like: memory and components, since no kernel here computes with vectors.
#pragma once

#include "types.h"

namespace metal {

template <class T, int N>
struct vec_storage;

template <class T>
struct alignas(2 * sizeof(T)) vec_storage<T, 2> {
  union {
    T components[2];
    struct { T x, y; };
  };
};

template <class T>
struct alignas(4 * sizeof(T)) vec_storage<T, 3> {
  union {
    T components[3];
    struct { T x, y, z; };
  };
};

template <class T>
struct alignas(4 * sizeof(T)) vec_storage<T, 4> {
  union {
    T components[4];
    struct { T x, y, z, w; };
  };
};

template <class T, int N>
struct vec : vec_storage<T, N> {
  using vec_storage<T, N>::components;

  vec() = default;

  template <class... A, class = std::enable_if_t<sizeof...(A) == N>>
  METAL_FUNC vec(A... parts) {
    int i = 0;
    ((components[i++] = static_cast<T>(parts)), ...);
  }

  METAL_FUNC T& operator[](int i) {
    check_index(i);
    return components[i];
  }
  METAL_FUNC const T& operator[](int i) const {
    check_index(i);
    return components[i];
  }

 private:
  // The compiler checks the index of a value that is read, but allows one more in a reference.
  METAL_FUNC void check_index(int i) const { [[maybe_unused]] const T value = components[i]; }
};

}  // namespace metal

using uint2 = metal::vec<uint, 2>;
using uint3 = metal::vec<uint, 3>;
using uint4 = metal::vec<uint, 4>;
using ulong2 = metal::vec<ulong, 2>;
using float2 = metal::vec<float, 2>;
using float4 = metal::vec<float, 4>;
