// min, max, clamp, abs and select on every type, and Metal's functions on the bits of integers.
#pragma once
#include "mathematics.h"

namespace metal {

// Overloads by exact type: arguments of two types are ambiguous here, as in Metal. A NaN gives way to a number.
#define EMULATOR_ORDER(T)                                                                          \
  METAL_FUNC constexpr T min(T a, T b) { return a != a ? b : b != b ? a : b < a ? b : a; }         \
  METAL_FUNC constexpr T max(T a, T b) { return a != a ? b : b != b ? a : a < b ? b : a; }         \
  METAL_FUNC constexpr T clamp(T x, T low, T high) { return min(max(x, low), high); }
EMULATOR_ORDER(char)
EMULATOR_ORDER(signed char)
EMULATOR_ORDER(uchar)
EMULATOR_ORDER(short)
EMULATOR_ORDER(ushort)
EMULATOR_ORDER(int)
EMULATOR_ORDER(uint)
EMULATOR_ORDER(long)
EMULATOR_ORDER(ulong)
EMULATOR_ORDER(half)
EMULATOR_ORDER(bfloat)
EMULATOR_ORDER(float)
#undef EMULATOR_ORDER

template <class T, int N>
METAL_FUNC vec<T, N> min(vec<T, N> a, vec<T, N> b) {
  return each(a, b, [](T x, T y) { return min(x, y); });
}
template <class T, int N>
METAL_FUNC vec<T, N> max(vec<T, N> a, vec<T, N> b) {
  return each(a, b, [](T x, T y) { return max(x, y); });
}
template <class T, int N>
METAL_FUNC vec<T, N> clamp(vec<T, N> x, vec<T, N> low, vec<T, N> high) {
  return min(max(x, low), high);
}

template <class T>
METAL_FUNC enable_if_t<is_integral_v<T>, T> abs(T x) {
  return x < (T)0 ? (T)-x : x;
}
// Not by comparison: the absolute value of -0 is +0.
METAL_FUNC float abs(float x) { return __builtin_fabsf(x); }
METAL_FUNC half abs(half x) { return (half)__builtin_fabsf(x); }
METAL_FUNC bfloat abs(bfloat x) { return (bfloat)__builtin_fabsf(x); }
template <class T, int N>
METAL_FUNC vec<T, N> abs(vec<T, N> a) {
  return each(a, [](T x) { return abs(x); });
}

template <class T>
METAL_FUNC T select(T if_false, T if_true, bool condition) {
  return condition ? if_true : if_false;
}
template <class T, int N>
METAL_FUNC vec<T, N> select(vec<T, N> if_false, vec<T, N> if_true, vec<bool, N> condition) {
  vec<T, N> result;
  for (int i = 0; i < N; i++) result.data[i] = condition.data[i] ? if_true.data[i] : if_false.data[i];
  return result;
}

template <class T>
METAL_FUNC enable_if_t<is_integral_v<T>, T> popcount(T x) {
  return (T)__builtin_popcountll((make_unsigned_t<T>)x);
}
template <class T>
METAL_FUNC enable_if_t<is_integral_v<T>, T> clz(T x) {
  return x ? (T)(__builtin_clzll((make_unsigned_t<T>)x) - (64 - 8 * sizeof(T))) : (T)(8 * sizeof(T));
}
template <class T>
METAL_FUNC enable_if_t<is_integral_v<T>, T> ctz(T x) {
  return x ? (T)__builtin_ctzll((ulong)x) : (T)(8 * sizeof(T));
}
METAL_FUNC uint reverse_bits(uint x) { return __builtin_bitreverse32(x); }
METAL_FUNC uint low_bits(uint count) { return count >= 32 ? ~0u : (1u << count) - 1; }
METAL_FUNC uint extract_bits(uint x, uint offset, uint count) { return count ? (x >> offset) & low_bits(count) : 0; }
METAL_FUNC int extract_bits(int x, uint offset, uint count) {
  return count ? (int)((uint)x << (32 - offset - count)) >> (32 - count) : 0;
}
METAL_FUNC uint insert_bits(uint base, uint inserted, uint offset, uint count) {
  const uint mask = low_bits(count) << offset;
  return (base & ~mask) | ((inserted << offset) & mask);
}
METAL_FUNC uint rotate(uint x, uint count) { return __builtin_rotateleft32(x, count); }
METAL_FUNC uint mulhi(uint a, uint b) { return (uint)(((ulong)a * b) >> 32); }
METAL_FUNC int mul24(int a, int b) { return a * b; }
METAL_FUNC int mad24(int a, int b, int c) { return a * b + c; }

}  // namespace metal
