// Sixteen floats, sixteen whole numbers or 64 bytes at a time, whatever registers the machine has.
//
// Where no register holds 64 bytes, compilers lower a vector type of that size badly (GCC keeps every one in memory), so there it
// is a pair of halves, down to what a register holds: what is said of the whole is said of each half.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>
#define MARLIN_AVX512 1
#elif defined(__AVX2__) && defined(__F16C__) && defined(__FMA__)
#include <immintrin.h>
#define MARLIN_AVX2 1
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#define MARLIN_NEON 1
#endif

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define MARLIN_SHUFFLES 1
#endif
#endif

namespace marlin {

constexpr int LANES = 16;

template <class Lane, int BYTES>
struct RegisterOf {
  typedef Lane type __attribute__((vector_size(BYTES)));
};

template <class Half>
struct Pair {
  Half low, high;

  static constexpr int64_t SIZE = sizeof(Half) * 2;
  using Lane = std::remove_cv_t<std::remove_reference_t<decltype(std::declval<const Half&>()[0])>>;
  static constexpr int64_t HALF_LANES = sizeof(Half) / sizeof(Lane);

  Lane operator[](int64_t lane) const { return lane < HALF_LANES ? low[lane] : high[lane - HALF_LANES]; }
  Lane& operator[](int64_t lane) { return reinterpret_cast<Lane*>(this)[lane]; }
  Pair operator-() const { return {-low, -high}; }
};

#define MARLIN_EACH_HALF(OP)                                                                                             \
  template <class Half>                                                                                                  \
  inline auto operator OP(const Pair<Half>& a, const Pair<Half>& b) {                                                    \
    return Pair<std::remove_cv_t<decltype(a.low OP b.low)>>{a.low OP b.low, a.high OP b.high};                           \
  }                                                                                                                      \
  template <class Half, class Scalar, class = std::enable_if_t<std::is_arithmetic_v<Scalar>>>                            \
  inline auto operator OP(const Pair<Half>& a, Scalar b) {                                                               \
    const typename Pair<Half>::Lane lane = b;                                                                            \
    return Pair<std::remove_cv_t<decltype(a.low OP lane)>>{a.low OP lane, a.high OP lane};                               \
  }                                                                                                                      \
  template <class Half, class Scalar, class = std::enable_if_t<std::is_arithmetic_v<Scalar>>>                            \
  inline auto operator OP(Scalar a, const Pair<Half>& b) {                                                               \
    const typename Pair<Half>::Lane lane = a;                                                                            \
    return Pair<std::remove_cv_t<decltype(lane OP b.low)>>{lane OP b.low, lane OP b.high};                               \
  }
MARLIN_EACH_HALF(+)
MARLIN_EACH_HALF(-)
MARLIN_EACH_HALF(*)
MARLIN_EACH_HALF(/)
MARLIN_EACH_HALF(&)
MARLIN_EACH_HALF(^)
MARLIN_EACH_HALF(<<)
MARLIN_EACH_HALF(>>)
MARLIN_EACH_HALF(<)
MARLIN_EACH_HALF(>)
MARLIN_EACH_HALF(==)
#undef MARLIN_EACH_HALF

template <class Half, class Other>
inline Pair<Half>& operator+=(Pair<Half>& a, const Other& b) {
  return a = a + b;
}
template <class Half, class Other>
inline Pair<Half>& operator*=(Pair<Half>& a, const Other& b) {
  return a = a * b;
}
template <class Type>
constexpr bool IS_PAIR = false;
template <class Half>
constexpr bool IS_PAIR<Pair<Half>> = true;

#if MARLIN_AVX512
template <class Lane>
using Wide = typename RegisterOf<Lane, 64>::type;
#elif MARLIN_AVX2
template <class Lane>
using Wide = Pair<typename RegisterOf<Lane, 32>::type>;
#else
template <class Lane>
using Wide = Pair<Pair<typename RegisterOf<Lane, 16>::type>>;
#endif

using Vector = Wide<float>;
using Integers = Wide<int32_t>;
using Bytes = Wide<uint8_t>;

// The bits of a vector as lanes of another type.
template <class To, class From>
inline To bits_as(const From& from) {
  if constexpr (IS_PAIR<To>) {
    return {bits_as<decltype(To::low)>(from.low), bits_as<decltype(To::high)>(from.high)};
  } else {
    return To(from);
  }
}

// Lane by lane, between floats and whole numbers of one size.
template <class To, class From>
inline To converted(const From& from) {
  if constexpr (IS_PAIR<To>) {
    return {converted<decltype(To::low)>(from.low), converted<decltype(To::high)>(from.high)};
  } else {
    return __builtin_convertvector(from, To);
  }
}

template <class Mask, class Values>
inline Values chosen(const Mask& mask, const Values& yes, const Values& no) {
  if constexpr (IS_PAIR<Values>) {
    return {chosen(mask.low, yes.low, no.low), chosen(mask.high, yes.high, no.high)};
  } else {
    return mask ? yes : no;
  }
}

template <class Values>
inline Values load_as(const void* from) {
  if constexpr (IS_PAIR<Values>) {
    return {load_as<decltype(Values::low)>(from), load_as<decltype(Values::high)>(static_cast<const char*>(from) + sizeof(Values) / 2)};
  } else {
    Values values;
    std::memcpy(&values, from, sizeof(values));
    return values;
  }
}

template <class Values>
inline void store_as(const Values& values, void* to) {
  if constexpr (IS_PAIR<Values>) {
    store_as(values.low, to);
    store_as(values.high, static_cast<char*>(to) + sizeof(values) / 2);
  } else {
    std::memcpy(to, &values, sizeof(values));
  }
}

template <class Values, class Lane>
inline Values splat_as(Lane value) {
  return value - Values{};  // + would turn -0 into 0, and costs an addition
}

inline Vector load(const float* from) { return load_as<Vector>(from); }
inline void store(const Vector& value, float* to) { store_as(value, to); }
inline Vector splat(float value) { return splat_as<Vector>(value); }

template <class Values>
inline float sum(const Values& values) {
  if constexpr (IS_PAIR<Values>) {
    return sum(values.low + values.high);
  } else {
#if MARLIN_AVX512
    return _mm512_reduce_add_ps(__m512(values));
#elif MARLIN_AVX2
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(__m256(values)), _mm256_extractf128_ps(__m256(values), 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#endif
    float total = 0.0f;
    for (size_t lane = 0; lane < sizeof(values) / sizeof(float); lane++) total += values[lane];
    return total;
  }
}

// The largest lane. Of floats none is NaN.
template <class Values>
inline auto largest(const Values& values) {
  if constexpr (IS_PAIR<Values>) {
    return largest(chosen(values.low > values.high, values.low, values.high));
  } else {
    using Lane = std::remove_cvref_t<decltype(values[0])>;
#if MARLIN_AVX512
    if constexpr (std::is_same_v<Lane, int32_t> && sizeof(values) == 64) return Lane(_mm512_reduce_max_epi32(__m512i(values)));
#elif MARLIN_AVX2
    if constexpr (std::is_same_v<Lane, int32_t> && sizeof(values) == 32) {
      const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(__m256i(values)), _mm256_extracti128_si256(__m256i(values), 1));
      const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
      return Lane(_mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1))));
    }
#endif
    Lane most = values[0];
    for (size_t lane = 1; lane < sizeof(values) / sizeof(most); lane++) most = values[lane] > most ? values[lane] : most;
    return most;
  }
}

#if MARLIN_AVX2
// All bits of the first `count` of eight lanes.
inline __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int32_t(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// The first `count` of sixteen floats; the others are `fill`.
inline Vector load_some(const float* from, int64_t count, float fill = 0.0f) {
  if (count >= LANES) return load(from);
#if MARLIN_AVX512
  return Vector(_mm512_mask_loadu_ps(__m512(splat(fill)), __mmask16((1u << count) - 1), from));
#elif MARLIN_AVX2
  const auto half = [&](int64_t start) {
    const __m256i there = first_lanes(count - start);
    return _mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(from + start, there), _mm256_castsi256_ps(there));
  };
  return {half(0), half(8)};
#endif
  float lanes[LANES];
  store(splat(fill), lanes);
  std::memcpy(lanes, from, count * sizeof(float));
  return load(lanes);
}

inline void store_some(const Vector& value, float* to, int64_t count) {
  if (count >= LANES) return store(value, to);  // of a size that is known: anything else is a call
#if MARLIN_AVX512
  return _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), __m512(value));
#elif MARLIN_AVX2
  _mm256_maskstore_ps(to, first_lanes(count), __m256(value.low));
  return _mm256_maskstore_ps(to + 8, first_lanes(count - 8), __m256(value.high));
#endif
  float lanes[LANES];
  store(value, lanes);
  std::memcpy(to, lanes, count * sizeof(float));
}

// What products add up in: lanes fold onto each other where a vector takes several registers, so that more sums stay in them.
template <class Values>
struct SumOf {
  using type = Values;
};
template <class Half>
struct SumOf<Pair<Half>> {
  using type = Half;
};
using Sums = SumOf<Vector>::type;

// sums += a * b
template <class Values>
inline __attribute__((always_inline)) void add_products(Sums& sums, const Values& a, const Values& b) {
  if constexpr (std::is_same_v<Values, Sums>) {
    sums += a * b;
  } else {
    sums += a.low * b.low;
    sums += a.high * b.high;
  }
}

// The lanes of two vectors by turns: those of the lower halves, then those of the upper ones.
template <class Values>
inline void interleave(const Values& even, const Values& odd, Values& first, Values& second) {
  if constexpr (IS_PAIR<Values>) {
    interleave(even.low, odd.low, first.low, first.high);
    interleave(even.high, odd.high, second.low, second.high);
#if MARLIN_SHUFFLES
  } else if constexpr (sizeof(even) / sizeof(even[0]) == 16) {
    first = __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    second = __builtin_shufflevector(even, odd, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  } else if constexpr (sizeof(even) / sizeof(even[0]) == 8) {
    first = __builtin_shufflevector(even, odd, 0, 8, 1, 9, 2, 10, 3, 11);
    second = __builtin_shufflevector(even, odd, 4, 12, 5, 13, 6, 14, 7, 15);
  } else {
    first = __builtin_shufflevector(even, odd, 0, 4, 1, 5);
    second = __builtin_shufflevector(even, odd, 2, 6, 3, 7);
  }
#else
  } else {
    constexpr int COUNT = sizeof(even) / sizeof(even[0]);
    Values both[2];
    for (int lane = 0; lane < COUNT; lane++) {
      both[2 * lane / COUNT][2 * lane % COUNT] = even[lane];
      both[(2 * lane + 1) / COUNT][(2 * lane + 1) % COUNT] = odd[lane];
    }
    first = both[0], second = both[1];
  }
#endif
}

// e^x for x up to 88, to two units in the last place: 2^n times a polynomial on half an octave (Cephes, expf).
inline Vector exponential(Vector x) {
  x = chosen(x < -87.0f, splat(-87.0f), chosen(x > 88.0f, splat(88.0f), x));
  const Vector shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum rounds to an integer
  const Vector whole = shifted - 12582912.0f;
  const Vector rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Vector y = splat(1.9875691500e-4f);
  for (float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) y = y * rest + next;
  y = y * rest * rest + rest + 1.0f;
  return y * bits_as<Vector>((converted<Integers>(whole) + 127) << 23);
}

}  // namespace marlin
