// Packed weights as whole numbers of a byte, and their products with bytes of x.
#pragma once
#include "whole_numbers.hpp"

namespace marlin {

// Without VNNI the products of x86 are of unsigned weights and signed bytes of x, whose pairs have to fit 16 bits.
#if (MARLIN_AVX512 || MARLIN_AVX2) && !MARLIN_VNNI
#define MARLIN_PAIRS_OF_BYTES 1
#endif

#if MARLIN_PAIRS_OF_BYTES
// Sums of neighbours of 16 bits, and what products are made of.
inline __attribute__((always_inline)) RegisterIntegers sums_of_pairs(RegisterWords pairs) {
#if MARLIN_AVX512
  return RegisterIntegers(_mm512_madd_epi16(__m512i(pairs), _mm512_set1_epi16(1)));
#else
  return RegisterIntegers(_mm256_madd_epi16(__m256i(pairs), _mm256_set1_epi16(1)));
#endif
}

template <bool SMALL>
inline __attribute__((always_inline)) RegisterWords pairs_of(RegisterBytes weights, RegisterBytes x) {
#if MARLIN_AVX512
  // Two products fit 16 bits: 2 * 128 * 127 at most. An unsigned and a signed factor: the sign moves over to x.
  const __mmask64 negative = _mm512_movepi8_mask(__m512i(weights));
  const __m512i signed_x = SMALL ? __m512i(x) : _mm512_mask_sub_epi8(__m512i(x), negative, _mm512_setzero_si512(), __m512i(x));
  return RegisterWords(_mm512_maddubs_epi16(SMALL ? __m512i(weights) : _mm512_abs_epi8(__m512i(weights)), signed_x));
#else
  // As above.
  return RegisterWords(SMALL ? _mm256_maddubs_epi16(__m256i(weights), __m256i(x))
                             : _mm256_maddubs_epi16(_mm256_abs_epi8(__m256i(weights)), _mm256_sign_epi8(__m256i(x), __m256i(weights))));
#endif
}
#endif

#if !(MARLIN_AVX512 || MARLIN_AVX2 || MARLIN_NEON)
// A call: its loops, written out wherever products are, would take a compiler minutes.
inline __attribute__((noinline)) RegisterIntegers dot_by_lanes(RegisterIntegers sums, RegisterBytes weights, RegisterBytes x) {
  for (int64_t lane = 0; lane < DWORDS; lane++)
    for (int64_t part = 4 * lane; part < 4 * lane + 4; part++) sums[lane] += int8_t(weights[part]) * int8_t(x[part]);
  return sums;
}
#endif

// sums[i] + the products of bytes 4i .. 4i+3. Bytes of weights are unsigned with VNNI, and signed without; SMALL ones are below 32 and
// both. Bytes of x are signed, and where weights are not SMALL never -128.
template <bool SMALL, class Numbers, class Codes>
inline __attribute__((always_inline)) Numbers dot(const Numbers& sums, const Codes& weights, const Codes& x) {
  if constexpr (IS_PAIR<Numbers>) {
    return {dot<SMALL>(sums.low, weights.low, x.low), dot<SMALL>(sums.high, weights.high, x.high)};
  } else {
#if MARLIN_VNNI
    return add_quads(sums, weights, x);
#elif MARLIN_PAIRS_OF_BYTES
    return sums + sums_of_pairs(pairs_of<SMALL>(weights, x));
#elif MARLIN_NEON
    const int8x16_t w = int8x16_t(weights), values = int8x16_t(x);
#if defined(__ARM_FEATURE_DOTPROD)
    return Numbers(vdotq_s32(int32x4_t(sums), w, values));
#else
    const int32x4_t lower = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(values)));
    const int32x4_t upper = vpaddlq_s16(vmull_s8(vget_high_s8(w), vget_high_s8(values)));
    return Numbers(vaddq_s32(int32x4_t(sums), vpaddq_s32(lower, upper)));
#endif
#else
    return dot_by_lanes(sums, weights, x);
#endif
  }
}

// The same of two registers each, of small weights: where pairs are added up, those of both at once.
inline __attribute__((always_inline)) RegisterIntegers dot_of_two(RegisterIntegers sums, const RegisterBytes* weights, const RegisterBytes* x) {
#if MARLIN_PAIRS_OF_BYTES
  return sums + sums_of_pairs(pairs_of<true>(weights[0], x[0]) + pairs_of<true>(weights[1], x[1]));
#else
  return dot<true>(dot<true>(sums, weights[0], x[0]), weights[1], x[1]);
#endif
}

// How each format's bytes become whole numbers: the number that a code stands for is its byte less OFFSET, times FACTOR and the scale of its
// group.
struct WholeFloat4 {
  static constexpr bool nibbles = true, affine = false;
  static constexpr int OFFSET = 12;  // E2M1 doubled runs from -12 to 12
  alignas(16) static constexpr uint8_t TABLE[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
};

struct WholeInt4 {
  static constexpr bool nibbles = true, affine = true;
  static constexpr int OFFSET = 0;
  static constexpr float FACTOR = 1.0f;
};

struct WholeInt8 {
  static constexpr bool nibbles = false, affine = true;
  static constexpr float FACTOR = 1.0f;
#if MARLIN_VNNI
  static constexpr int OFFSET = 0;
  static constexpr uint8_t FLIP = 0;
#else
  static constexpr int OFFSET = -128;  // as signed bytes
  static constexpr uint8_t FLIP = 128;
#endif
};

// Weights of packed bytes: with nibbles the even ones and the odd ones, else all of them, in `first`.
template <class Codes>
struct Whole {
  Codes first, second;
};

template <class Format, class Codes>
inline __attribute__((always_inline)) Whole<Codes> unpack(const Codes& packed) {
  if constexpr (!Format::nibbles) {
    return {packed ^ Format::FLIP, packed};
  } else if constexpr (Format::affine) {
    return {packed & 15, packed >> 4};
  } else {
#if MARLIN_AVX512 && defined(__AVX512VBMI__)
    return {looked_up(Format::TABLE, packed), looked_up(Format::TABLE, Codes(_mm512_srli_epi16(__m512i(packed), 4)))};
#else
    return {looked_up(Format::TABLE, packed & 15), looked_up(Format::TABLE, packed >> 4)};
#endif
  }
}

}  // namespace marlin
