// Whole numbers in one register of the machine: what differs by class of processor in products of bytes and words.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>

#include "packed_columns.hpp"

#if (MARLIN_AVX512 && defined(__AVX512VNNI__)) || (MARLIN_AVX2 && (defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))))
#define MARLIN_VNNI 1
#endif

namespace marlin {

#if MARLIN_AVX512
constexpr int64_t REGISTER = 64;  // bytes
#elif MARLIN_AVX2
constexpr int64_t REGISTER = 32;
#else
constexpr int64_t REGISTER = 16;
#endif
constexpr int64_t DWORDS = REGISTER / 4;

using RegisterBytes = RegisterOf<uint8_t, REGISTER>::type;
using RegisterWords = RegisterOf<uint16_t, REGISTER>::type;
using RegisterIntegers = RegisterOf<int32_t, REGISTER>::type;
using RegisterFloats = RegisterOf<float, REGISTER>::type;

// The first `count` bytes of a register; the others are zero.
inline RegisterBytes load_first(const uint8_t* from, int64_t count) {
  if (count >= REGISTER) return load_as<RegisterBytes>(from);
#if MARLIN_AVX512
  return RegisterBytes(_mm512_maskz_loadu_epi8(count > 0 ? (1ull << count) - 1 : 0, from));
#else
  uint8_t bytes[REGISTER] = {};
  if (count > 0) std::memcpy(bytes, from, count);
  return load_as<RegisterBytes>(bytes);
#endif
}

#if MARLIN_VNNI
// sums[i] + the products of unsigned bytes of a, 4i .. 4i + 3, and signed ones of b.
inline __attribute__((always_inline)) RegisterIntegers add_quads(RegisterIntegers sums, RegisterBytes a, RegisterBytes b) {
#if MARLIN_AVX512
  return RegisterIntegers(_mm512_dpbusd_epi32(__m512i(sums), __m512i(a), __m512i(b)));
#elif defined(__AVXVNNI__)
  return RegisterIntegers(_mm256_dpbusd_avx_epi32(__m256i(sums), __m256i(a), __m256i(b)));
#else
  return RegisterIntegers(_mm256_dpbusd_epi32(__m256i(sums), __m256i(a), __m256i(b)));
#endif
}
#endif

// sums[i] + the products of signed words 2i and 2i + 1.
inline __attribute__((always_inline)) RegisterIntegers add_pairs(RegisterIntegers sums, RegisterWords a, RegisterWords b) {
#if MARLIN_VNNI && MARLIN_AVX512
  return RegisterIntegers(_mm512_dpwssd_epi32(__m512i(sums), __m512i(a), __m512i(b)));
#elif MARLIN_AVX512
  return sums + RegisterIntegers(_mm512_madd_epi16(__m512i(a), __m512i(b)));
#elif MARLIN_AVX2 && defined(__AVXVNNI__)
  return RegisterIntegers(_mm256_dpwssd_avx_epi32(__m256i(sums), __m256i(a), __m256i(b)));
#elif MARLIN_VNNI
  return RegisterIntegers(_mm256_dpwssd_epi32(__m256i(sums), __m256i(a), __m256i(b)));
#elif MARLIN_AVX2
  return sums + RegisterIntegers(_mm256_madd_epi16(__m256i(a), __m256i(b)));
#elif MARLIN_NEON
  const int32x4_t lower = vmull_s16(vget_low_s16(int16x8_t(a)), vget_low_s16(int16x8_t(b)));
  const int32x4_t upper = vmull_s16(vget_high_s16(int16x8_t(a)), vget_high_s16(int16x8_t(b)));
  return sums + RegisterIntegers(vpaddq_s32(lower, upper));
#else
  for (int64_t lane = 0; lane < DWORDS; lane++)
    sums[lane] += int16_t(a[2 * lane]) * int16_t(b[2 * lane]) + int16_t(a[2 * lane + 1]) * int16_t(b[2 * lane + 1]);
  return sums;
#endif
}

#if !(MARLIN_AVX512 || MARLIN_AVX2 || MARLIN_NEON)
// A call, as in products (whole_weights.hpp).
inline __attribute__((noinline)) RegisterBytes looked_up_by_lanes(const uint8_t* table, RegisterBytes codes) {
  for (int64_t place = 0; place < REGISTER; place++) codes[place] = table[codes[place]];
  return codes;
}
#endif

// TABLE[code] for every byte of a register that is below 16; VBMI's looks at the lower four bits of any.
template <class Codes>
inline __attribute__((always_inline)) Codes looked_up(const uint8_t* table, const Codes& codes) {
  if constexpr (IS_PAIR<Codes>) {
    return {looked_up(table, codes.low), looked_up(table, codes.high)};
  } else {
#if MARLIN_AVX512
    const __m512i wide = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
#if defined(__AVX512VBMI__)
    // Six bits of an index are read; the table repeats, so that the upper two may be anything and nothing is masked.
    return Codes(_mm512_permutexvar_epi8(__m512i(codes), wide));
#else
    return Codes(_mm512_shuffle_epi8(wide, __m512i(codes)));
#endif
#elif MARLIN_AVX2
    const __m256i wide = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    return Codes(_mm256_shuffle_epi8(wide, __m256i(codes)));
#elif MARLIN_NEON
    return Codes(vqtbl1q_u8(vld1q_u8(table), uint8x16_t(codes)));
#else
    return looked_up_by_lanes(table, codes);
#endif
  }
}

// The nearest whole numbers, of ties the even ones.
template <class Numbers, class Floats>
inline Numbers nearest(const Floats& values) {
  if constexpr (IS_PAIR<Floats>) {
    using Half = decltype(Numbers::low);
    return {nearest<Half>(values.low), nearest<Half>(values.high)};
  } else {
#if MARLIN_AVX512
    return Numbers(_mm512_cvtps_epi32(__m512(values)));
#elif MARLIN_AVX2
    return Numbers(_mm256_cvtps_epi32(__m256(values)));
#elif MARLIN_NEON
    return Numbers(vcvtnq_s32_f32(float32x4_t(values)));
#else
    Numbers whole;
    for (size_t lane = 0; lane < sizeof(whole) / sizeof(int32_t); lane++) whole[lane] = int32_t(std::lrint(values[lane]));
    return whole;
#endif
  }
}

// Sixteen whole numbers as words.
inline void store_words(const Integers& values, int16_t* to) {
#if MARLIN_AVX512
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(__m512i(values)));
#elif MARLIN_AVX2
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(__m256i(values.low), __m256i(values.high)), 0xd8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), words);
#else
  for (int lane = 0; lane < LANES; lane++) to[lane] = int16_t(values[lane]);
#endif
}

// Lane number i is from[i / TIMES]; what is read reaches a register's length.
template <int64_t TIMES>
inline __attribute__((always_inline)) RegisterFloats spread(const float* from) {
#if MARLIN_AVX512
  alignas(64) static constexpr auto places = [] {
    std::array<int32_t, DWORDS> each{};
    for (int64_t lane = 0; lane < DWORDS; lane++) each[lane] = int32_t(lane / TIMES);
    return each;
  }();
  return RegisterFloats(_mm512_permutexvar_ps(_mm512_load_si512(places.data()), _mm512_loadu_ps(from)));
#elif MARLIN_AVX2
  const __m256i places = _mm256_setr_epi32(0, 1 / TIMES, 2 / TIMES, 3 / TIMES, 4 / TIMES, 5 / TIMES, 6 / TIMES, 7 / TIMES);
  return RegisterFloats(_mm256_permutevar8x32_ps(_mm256_loadu_ps(from), places));
#else
  RegisterFloats lanes;
  for (int64_t lane = 0; lane < DWORDS; lane++) lanes[lane] = from[lane / TIMES];
  return lanes;
#endif
}

}  // namespace marlin
