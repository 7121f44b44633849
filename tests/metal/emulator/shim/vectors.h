// Metal's vectors of 2, 3 and 4 numbers, their packed forms, and operators on each element.
#pragma once
#include "scalars.h"

namespace metal {

template <class T, int N>
struct vec;
template <class T>
struct is_vec : false_type {};
template <class T, int N>
struct is_vec<vec<T, N>> : true_type {};

// Some elements of a vector in some order. It lies at the vector's own address, in a union with its elements.
template <class T, int... Elements>
struct Swizzle {
  T data[1];

  operator vec<T, sizeof...(Elements)>() const {
    const T* elements = data;
    return vec<T, (int)sizeof...(Elements)>(elements[Elements]...);
  }
  Swizzle& operator=(const vec<T, sizeof...(Elements)>& values) {
    T* elements = data;
    const int places[] = {Elements...};
    for (unsigned i = 0; i < sizeof...(Elements); i++) elements[places[i]] = values.data[i];
    return *this;
  }
  Swizzle& operator=(const Swizzle& other) { return *this = vec<T, sizeof...(Elements)>(other); }
};

#ifdef EMULATOR_ADDRESS_SPACES
#define EMULATOR_COPY_FROM(N, space)                                                                        \
  vec(const __attribute__((address_space(space))) vec& other) {                                             \
    for (int i = 0; i < N; i++) data[i] = other.data[i];                                                    \
  }
#define EMULATOR_COPIES(N) EMULATOR_COPY_FROM(N, 1) EMULATOR_COPY_FROM(N, 2) EMULATOR_COPY_FROM(N, 3)
#else
#define EMULATOR_COPIES(N)
#endif

#define EMULATOR_VECTOR_MEMBERS(N)                                                                          \
  constexpr vec() = default;                                                                                \
  constexpr vec(const vec&) = default;                                                                      \
  EMULATOR_COPIES(N)                                                                                        \
  vec& operator=(const vec& other) {                                                                        \
    for (int i = 0; i < N; i++) data[i] = other.data[i];                                                    \
    return *this;                                                                                           \
  }                                                                                                         \
  template <class U, class = enable_if_t<!is_vec<U>::value && std::is_convertible<U, T>::value>>            \
  constexpr vec(U value) : data{} {                                                                         \
    for (int i = 0; i < N; i++) data[i] = (T)value;                                                         \
  }                                                                                                         \
  template <class U>                                                                                        \
  explicit constexpr vec(const vec<U, N>& other) : data{} {                                                 \
    for (int i = 0; i < N; i++) data[i] = (T)other.data[i];                                                 \
  }                                                                                                         \
  T& operator[](int i) { return data[i]; }                                                                  \
  constexpr const T& operator[](int i) const { return data[i]; }

template <class T>
struct alignas(sizeof(T) * 2) vec<T, 2> {
  union {
    T data[2];
    struct {
      T x, y;
    };
    struct {
      T r, g;
    };
    Swizzle<T, 0, 1> xy;
    Swizzle<T, 1, 0> yx;
    Swizzle<T, 0, 0> xx;
    Swizzle<T, 1, 1> yy;
  };
  EMULATOR_VECTOR_MEMBERS(2)
  constexpr vec(T first, T second) : data{first, second} {}
};

template <class T>
struct alignas(sizeof(T) * 4) vec<T, 3> {
  union {
    T data[3];
    struct {
      T x, y, z;
    };
    struct {
      T r, g, b;
    };
    Swizzle<T, 0, 1> xy;
    Swizzle<T, 1, 2> yz;
    Swizzle<T, 0, 2> xz;
  };
  EMULATOR_VECTOR_MEMBERS(3)
  constexpr vec(T first, T second, T third) : data{first, second, third} {}
  constexpr vec(vec<T, 2> start, T third) : data{start.data[0], start.data[1], third} {}
};

template <class T>
struct alignas(sizeof(T) * 4) vec<T, 4> {
  union {
    T data[4];
    struct {
      T x, y, z, w;
    };
    struct {
      T r, g, b, a;
    };
    Swizzle<T, 0, 1> xy, lo;
    Swizzle<T, 2, 3> zw, hi;
    Swizzle<T, 1, 2> yz;
    Swizzle<T, 0, 2> xz;
    Swizzle<T, 1, 3> yw;
    Swizzle<T, 1, 0> yx;
    Swizzle<T, 0, 0> xx;
    Swizzle<T, 1, 1> yy;
    Swizzle<T, 0, 1, 2> xyz;
    Swizzle<T, 1, 2, 3> yzw;
  };
  EMULATOR_VECTOR_MEMBERS(4)
  constexpr vec(T first, T second, T third, T fourth) : data{first, second, third, fourth} {}
  constexpr vec(vec<T, 2> start, vec<T, 2> end) : data{start.data[0], start.data[1], end.data[0], end.data[1]} {}
  constexpr vec(vec<T, 3> start, T fourth) : data{start.data[0], start.data[1], start.data[2], fourth} {}
};
#undef EMULATOR_VECTOR_MEMBERS

// Without the alignment: three floats take 12 bytes.
template <class T, int N>
struct packed_vec {
  T data[N];

  packed_vec() = default;
  packed_vec(vec<T, N> values) {
    for (int i = 0; i < N; i++) data[i] = values.data[i];
  }
  operator vec<T, N>() const {
    vec<T, N> values;
    for (int i = 0; i < N; i++) values.data[i] = data[i];
    return values;
  }
  T& operator[](int i) { return data[i]; }
  T operator[](int i) const { return data[i]; }
};

#define EMULATOR_VECTOR_ARITHMETIC(op)                                                                      \
  template <class T, int N>                                                                                 \
  inline vec<T, N> operator op(const vec<T, N>& a, const vec<T, N>& b) {                                    \
    vec<T, N> result;                                                                                       \
    for (int i = 0; i < N; i++) result.data[i] = (T)(a.data[i] op b.data[i]);                               \
    return result;                                                                                          \
  }                                                                                                         \
  template <class T, int N, class U, class = enable_if_t<is_arithmetic_v<U>>>                               \
  inline vec<T, N> operator op(const vec<T, N>& a, U b) {                                                   \
    return a op vec<T, N>(b);                                                                               \
  }                                                                                                         \
  template <class T, int N, class U, class = enable_if_t<is_arithmetic_v<U>>>                               \
  inline vec<T, N> operator op(U a, const vec<T, N>& b) {                                                   \
    return vec<T, N>(a) op b;                                                                               \
  }                                                                                                         \
  template <class T, int N, class U>                                                                        \
  inline vec<T, N>& operator op##=(vec<T, N>& a, const U& b) {                                              \
    return a = a op b;                                                                                      \
  }
EMULATOR_VECTOR_ARITHMETIC(+)
EMULATOR_VECTOR_ARITHMETIC(-)
EMULATOR_VECTOR_ARITHMETIC(*)
EMULATOR_VECTOR_ARITHMETIC(/)
EMULATOR_VECTOR_ARITHMETIC(%)
EMULATOR_VECTOR_ARITHMETIC(&)
EMULATOR_VECTOR_ARITHMETIC(|)
EMULATOR_VECTOR_ARITHMETIC(^)
EMULATOR_VECTOR_ARITHMETIC(<<)
EMULATOR_VECTOR_ARITHMETIC(>>)
#undef EMULATOR_VECTOR_ARITHMETIC

#define EMULATOR_VECTOR_COMPARISON(op)                                                                      \
  template <class T, int N>                                                                                 \
  inline vec<bool, N> operator op(const vec<T, N>& a, const vec<T, N>& b) {                                 \
    vec<bool, N> result;                                                                                    \
    for (int i = 0; i < N; i++) result.data[i] = a.data[i] op b.data[i];                                    \
    return result;                                                                                          \
  }                                                                                                         \
  template <class T, int N, class U, class = enable_if_t<is_arithmetic_v<U>>>                               \
  inline vec<bool, N> operator op(const vec<T, N>& a, U b) {                                                \
    return a op vec<T, N>(b);                                                                               \
  }
EMULATOR_VECTOR_COMPARISON(<)
EMULATOR_VECTOR_COMPARISON(>)
EMULATOR_VECTOR_COMPARISON(<=)
EMULATOR_VECTOR_COMPARISON(>=)
EMULATOR_VECTOR_COMPARISON(==)
EMULATOR_VECTOR_COMPARISON(!=)
#undef EMULATOR_VECTOR_COMPARISON

template <class T, int N, class F>
METAL_FUNC vec<T, N> each(const vec<T, N>& a, F function) {
  vec<T, N> result;
  for (int i = 0; i < N; i++) result.data[i] = function(a.data[i]);
  return result;
}

template <class T, int N, class F>
METAL_FUNC vec<T, N> each(const vec<T, N>& a, const vec<T, N>& b, F function) {
  vec<T, N> result;
  for (int i = 0; i < N; i++) result.data[i] = function(a.data[i], b.data[i]);
  return result;
}

template <class T, int N>
inline vec<T, N> operator-(const vec<T, N>& a) {
  return each(a, [](T x) { return (T)-x; });
}
template <class T, int N>
inline vec<T, N> operator~(const vec<T, N>& a) {
  return each(a, [](T x) { return (T)~x; });
}
template <int N>
inline bool all(const vec<bool, N>& a) {
  bool result = true;
  for (int i = 0; i < N; i++) result &= a.data[i];
  return result;
}
template <int N>
inline bool any(const vec<bool, N>& a) {
  bool result = false;
  for (int i = 0; i < N; i++) result |= a.data[i];
  return result;
}
template <class T, int N>
inline T dot(const vec<T, N>& a, const vec<T, N>& b) {
  T sum = a.data[0] * b.data[0];
  for (int i = 1; i < N; i++) sum += a.data[i] * b.data[i];
  return sum;
}

#define EMULATOR_VECTOR_NAMES(T)          \
  typedef vec<T, 2> T##2;                 \
  typedef vec<T, 3> T##3;                 \
  typedef vec<T, 4> T##4;                 \
  typedef packed_vec<T, 2> packed_##T##2; \
  typedef packed_vec<T, 3> packed_##T##3; \
  typedef packed_vec<T, 4> packed_##T##4;
EMULATOR_VECTOR_NAMES(bool)
EMULATOR_VECTOR_NAMES(char)
EMULATOR_VECTOR_NAMES(uchar)
EMULATOR_VECTOR_NAMES(short)
EMULATOR_VECTOR_NAMES(ushort)
EMULATOR_VECTOR_NAMES(int)
EMULATOR_VECTOR_NAMES(uint)
EMULATOR_VECTOR_NAMES(long)
EMULATOR_VECTOR_NAMES(ulong)
EMULATOR_VECTOR_NAMES(half)
EMULATOR_VECTOR_NAMES(bfloat)
EMULATOR_VECTOR_NAMES(float)
#undef EMULATOR_VECTOR_NAMES

}  // namespace metal
