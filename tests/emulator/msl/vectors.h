// float2, half4 and the like, with the swizzles that kernels use: all pairs, and the permutations
// of three and of four components.
#pragma once

#include <utility>

#include "types.h"

namespace metal {

template <class T, int N>
struct vec;

// Some components of a vector, in some order: lies over the vector's own storage.
template <class T, int N, int... Index>
struct swizzle {
  T components[N];

  METAL_FUNC operator vec<T, sizeof...(Index)>() const { return {components[Index]...}; }

  METAL_FUNC swizzle& operator=(const vec<T, sizeof...(Index)>& value) {
    int i = 0;
    ((components[Index] = value[i++]), ...);
    return *this;
  }
  METAL_FUNC swizzle& operator=(const swizzle& other) {
    return *this = vec<T, sizeof...(Index)>(other);
  }
};

// What a type is as a vector. Scalars have no components.
template <class A>
struct vector_traits {
  static constexpr int count = 0;
  using element = A;
};
template <class T, int N>
struct vector_traits<vec<T, N>> {
  static constexpr int count = N;
  using element = T;
};
template <class T, int N, int... Index>
struct vector_traits<swizzle<T, N, Index...>> : vector_traits<vec<T, sizeof...(Index)>> {};

template <class A>
inline constexpr int count_v = vector_traits<A>::count;
template <class A>
using element_t = typename vector_traits<A>::element;
template <class A>
using as_vec_t = std::enable_if_t<(count_v<A> > 0), vec<element_t<A>, count_v<A>>>;

#define PAIR(a, b, i, j) swizzle<T, N, i, j> a##b;
#define PAIRS_OF_2 PAIR(x, x, 0, 0) PAIR(x, y, 0, 1) PAIR(y, x, 1, 0) PAIR(y, y, 1, 1)
#define PAIRS_OF_3 \
  PAIRS_OF_2 PAIR(x, z, 0, 2) PAIR(y, z, 1, 2) PAIR(z, x, 2, 0) PAIR(z, y, 2, 1) PAIR(z, z, 2, 2)
#define PAIRS_OF_4                                                           \
  PAIRS_OF_3 PAIR(x, w, 0, 3) PAIR(y, w, 1, 3) PAIR(z, w, 2, 3) PAIR(w, x, 3, 0) \
  PAIR(w, y, 3, 1) PAIR(w, z, 3, 2) PAIR(w, w, 3, 3)
#define TRIPLE(a, b, c, i, j, k) swizzle<T, N, i, j, k> a##b##c;
#define TRIPLES                                                                  \
  TRIPLE(x, y, z, 0, 1, 2) TRIPLE(x, z, y, 0, 2, 1) TRIPLE(y, x, z, 1, 0, 2)     \
  TRIPLE(y, z, x, 1, 2, 0) TRIPLE(z, x, y, 2, 0, 1) TRIPLE(z, y, x, 2, 1, 0)
#define QUADRUPLE(a, b, c, d, i, j, k, l) swizzle<T, N, i, j, k, l> a##b##c##d;
#define FROM_FIRST(a, b, c, d, i, j, k, l)                                        \
  QUADRUPLE(a, b, c, d, i, j, k, l) QUADRUPLE(a, b, d, c, i, j, l, k)             \
  QUADRUPLE(a, c, b, d, i, k, j, l) QUADRUPLE(a, c, d, b, i, k, l, j)             \
  QUADRUPLE(a, d, b, c, i, l, j, k) QUADRUPLE(a, d, c, b, i, l, k, j)
#define QUADRUPLES                                                                \
  FROM_FIRST(x, y, z, w, 0, 1, 2, 3) FROM_FIRST(y, x, z, w, 1, 0, 2, 3)           \
  FROM_FIRST(z, x, y, w, 2, 0, 1, 3) FROM_FIRST(w, x, y, z, 3, 0, 1, 2)

template <class T, int Count>
struct vec_storage;

template <class T>
struct alignas(2 * sizeof(T)) vec_storage<T, 2> {
  static constexpr int N = 2;
  union {
    T components[2];
    struct { T x, y; };
    PAIRS_OF_2
  };
};

template <class T>
struct alignas(4 * sizeof(T)) vec_storage<T, 3> {
  static constexpr int N = 3;
  union {
    T components[3];
    struct { T x, y, z; };
    PAIRS_OF_3 TRIPLES
  };
};

template <class T>
struct alignas(4 * sizeof(T)) vec_storage<T, 4> {
  static constexpr int N = 4;
  union {
    T components[4];
    struct { T x, y, z, w; };
    PAIRS_OF_4 TRIPLES TRIPLE(y, z, w, 1, 2, 3) QUADRUPLES
  };
};

#undef PAIR
#undef PAIRS_OF_2
#undef PAIRS_OF_3
#undef PAIRS_OF_4
#undef TRIPLE
#undef TRIPLES
#undef QUADRUPLE
#undef FROM_FIRST
#undef QUADRUPLES

template <class T, int N>
struct vec : vec_storage<T, N> {
  using vec_storage<T, N>::components;

  vec() = default;
  vec(const vec&) = default;
  METAL_FUNC vec& operator=(const vec& other) {
    struct Whole { T components[N]; };  // copied by one access, not N
    reinterpret_cast<Whole&>(*this) = reinterpret_cast<const Whole&>(other);
    return *this;
  }

  template <class S, class = std::enable_if_t<is_scalar_v<S>>>
  METAL_FUNC vec(S scalar) {
    for (int i = 0; i < N; ++i) components[i] = static_cast<T>(scalar);
  }

  // From a vector of another element type.
  template <class A, class = as_vec_t<A>,
            class = std::enable_if_t<count_v<A> == N && !std::is_same_v<element_t<A>, T>>>
  METAL_FUNC explicit vec(const A& other) {
    int i = 0;
    append(i, other);
  }

  // From scalars and shorter vectors, N components in all.
  template <class... A, class = std::enable_if_t<(sizeof...(A) > 1)>>
  METAL_FUNC vec(const A&... parts) {
    static_assert(((count_v<A> ? count_v<A> : 1) + ...) == N, "wrong number of components");
    int i = 0;
    (append(i, parts), ...);
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

  template <class A>
  METAL_FUNC void append(int& i, const A& part) {
    if constexpr (count_v<A> == 0) {
      components[i++] = static_cast<T>(part);
    } else {
      const as_vec_t<A> v = part;
      for (int j = 0; j < count_v<A>; ++j) components[i++] = static_cast<T>(v[j]);
    }
  }
};

// Without the alignment of a vector.
template <class T, int N>
struct packed_vec {
  T components[N];

  packed_vec() = default;
  METAL_FUNC packed_vec(const vec<T, N>& v) {
    for (int i = 0; i < N; ++i) components[i] = v[i];
  }
  METAL_FUNC operator vec<T, N>() const {
    vec<T, N> v;
    for (int i = 0; i < N; ++i) v[i] = components[i];
    return v;
  }
  METAL_FUNC T& operator[](int i) { return components[i]; }
  METAL_FUNC const T& operator[](int i) const { return components[i]; }
};

// ---- componentwise operations

template <class V, class F>
METAL_FUNC auto map(const V& v, F f) {
  vec<decltype(f(v[0])), count_v<V>> result;
  for (int i = 0; i < count_v<V>; ++i) result[i] = f(v[i]);
  return result;
}

template <class R, class V, class F>
METAL_FUNC vec<R, count_v<V>> zip(const V& a, const V& b, F f) {
  vec<R, count_v<V>> result;
  for (int i = 0; i < count_v<V>; ++i) result[i] = static_cast<R>(f(a[i], b[i]));
  return result;
}

// The vector type in which A and B meet: both the same, or one a scalar. Undefined otherwise.
template <class A, class B, bool AIsVector = (count_v<A> > 0), bool BIsVector = (count_v<B> > 0)>
struct common_vec {};
template <class A, class B>
struct common_vec<A, B, true, true>
    : std::enable_if<std::is_same_v<as_vec_t<A>, as_vec_t<B>>, as_vec_t<A>> {};
template <class A, class B>
struct common_vec<A, B, true, false> : std::enable_if<is_scalar_v<B>, as_vec_t<A>> {};
template <class A, class B>
struct common_vec<A, B, false, true> : std::enable_if<is_scalar_v<A>, as_vec_t<B>> {};
template <class A, class B>
using common_vec_t = typename common_vec<A, B>::type;

#define ARITHMETIC(op)                                                              \
  template <class A, class B, class V = common_vec_t<A, B>>                         \
  METAL_FUNC V operator op(const A& a, const B& b) {                                \
    return zip<element_t<V>>(V(a), V(b), [](auto x, auto y) { return x op y; });    \
  }                                                                                 \
  template <class A, class B, class V = as_vec_t<A>, class = common_vec_t<A, B>>    \
  METAL_FUNC A& operator op##=(A& a, const B& b) {                                  \
    return a = V(a) op b;                                                           \
  }
#define COMPARISON(op)                                                              \
  template <class A, class B, class V = common_vec_t<A, B>>                         \
  METAL_FUNC vec<bool, count_v<V>> operator op(const A& a, const B& b) {            \
    return zip<bool>(V(a), V(b), [](auto x, auto y) { return x op y; });            \
  }
ARITHMETIC(+)
ARITHMETIC(-)
ARITHMETIC(*)
ARITHMETIC(/)
ARITHMETIC(%)
ARITHMETIC(&)
ARITHMETIC(|)
ARITHMETIC(^)
ARITHMETIC(<<)
ARITHMETIC(>>)
COMPARISON(<)
COMPARISON(<=)
COMPARISON(>)
COMPARISON(>=)
COMPARISON(==)
COMPARISON(!=)
#undef ARITHMETIC
#undef COMPARISON

template <class A, class V = as_vec_t<A>>
METAL_FUNC V operator-(const A& a) {
  return map(V(a), [](auto x) { return static_cast<element_t<V>>(-x); });
}
template <class A, class V = as_vec_t<A>>
METAL_FUNC V operator~(const A& a) {
  return map(V(a), [](auto x) { return static_cast<element_t<V>>(~x); });
}

template <int N>
METAL_FUNC bool any(const vec<bool, N>& v) {
  bool result = false;
  for (int i = 0; i < N; ++i) result |= v[i];
  return result;
}
template <int N>
METAL_FUNC bool all(const vec<bool, N>& v) {
  bool result = true;
  for (int i = 0; i < N; ++i) result &= v[i];
  return result;
}

}  // namespace metal

#define VECTOR_TYPES(T)                                                            \
  using T##2 = metal::vec<T, 2>;                                                   \
  using T##3 = metal::vec<T, 3>;                                                   \
  using T##4 = metal::vec<T, 4>;                                                   \
  using packed_##T##2 = metal::packed_vec<T, 2>;                                   \
  using packed_##T##3 = metal::packed_vec<T, 3>;                                   \
  using packed_##T##4 = metal::packed_vec<T, 4>;
VECTOR_TYPES(bool)
VECTOR_TYPES(char)
VECTOR_TYPES(uchar)
VECTOR_TYPES(short)
VECTOR_TYPES(ushort)
VECTOR_TYPES(int)
VECTOR_TYPES(uint)
VECTOR_TYPES(long)
VECTOR_TYPES(ulong)
VECTOR_TYPES(half)
VECTOR_TYPES(bfloat)
VECTOR_TYPES(float)
#undef VECTOR_TYPES
