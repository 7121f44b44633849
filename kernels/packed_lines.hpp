// A line of 64 bytes of a packed row, whose lanes lie along the depth: the scales of its weights, by lanes.
#pragma once
#include "packed_columns.hpp"

namespace marlin {

// Scales of sixteen groups of a row, of which `count` are there and the others mean nothing; E4M3's times E4M3_FACTOR.
#if MARLIN_AVX512 || MARLIN_AVX2
inline __m128i codes_of_groups(const Packed& row, int64_t group, int64_t count) {
#if MARLIN_AVX512
  return _mm_maskz_loadu_epi8(__mmask16(count >= LANES ? 0xffff : (1 << count) - 1), row.codes + group);
#else
  if (count >= LANES) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row.codes + group));
  // Two loads that overlap, of a size that is known: a copy through memory waits for its stores.
  const uint8_t* from = row.codes + group;
  uint64_t lower = 0, upper = 0;
  if (count >= 8) {
    std::memcpy(&lower, from, 8);
    std::memcpy(&upper, from + count - 8, 8);
    upper = count == 8 ? 0 : upper >> (8 * (LANES - count));
  } else if (count >= 4) {
    uint32_t first, last;
    std::memcpy(&first, from, 4);
    std::memcpy(&last, from + count - 4, 4);
    lower = first | uint64_t(last) << (8 * (count - 4));
  } else {
    for (int64_t g = 0; g < count; g++) lower |= uint64_t(from[g]) << (8 * g);
  }
  return _mm_set_epi64x(int64_t(upper), int64_t(lower));
#endif
}
inline Vector e4m3_of_groups(const Packed& row, int64_t group, int64_t count) {
  return from_halves(_mm256_slli_epi16(_mm256_cvtepi8_epi16(codes_of_groups(row, group, count)), 7));
}
#else
inline Vector e4m3_of_groups(const Packed& row, int64_t group, int64_t count) {
  Vector scales{};
  for (int64_t g = 0; g < std::min<int64_t>(LANES, count); g++) scales[g] = e4m3_table[row.codes[group + g]];
  return scales;
}
#endif
inline Vector e8m0_of_groups(const Packed& row, int64_t group, int64_t count) {
  constexpr int32_t LEAST = 1 << 22;  // 2^-127, which code 0 stands for
#if MARLIN_AVX512
  const __m512i exponents = _mm512_slli_epi32(_mm512_cvtepu8_epi32(codes_of_groups(row, group, count)), 23);
  return Vector(_mm512_castsi512_ps(_mm512_max_epi32(exponents, _mm512_set1_epi32(LEAST))));
#elif MARLIN_AVX2
  const __m128i codes = codes_of_groups(row, group, count);
  const auto eight = [](__m128i some) {
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(_mm256_cvtepu8_epi32(some), 23), _mm256_set1_epi32(LEAST)));
  };
  return {eight(codes), eight(_mm_srli_si128(codes, 8))};
#else
  Integers exponents{};
  for (int64_t g = 0; g < std::min<int64_t>(LANES, count); g++) exponents[g] = std::max(int32_t(row.codes[group + g]) << 23, LEAST);
  return bits_as<Vector>(exponents);
#endif
}

// Each of_lanes(row, line, groups) reads line number `line` of a row, of which `groups` groups are there; lanes of others mean nothing.

// Times E4M3_FACTOR.
struct E4m3Scales {
  // The scales of 128 weights, two lanes each.
  Vector of_lanes(const Packed& row, int64_t line, int64_t groups) const {
    alignas(8) uint8_t codes[8] = {};
    const uint8_t* from = row.codes + 8 * line;
    if (groups < 8) from = static_cast<const uint8_t*>(std::memcpy(codes, from, groups));
#if MARLIN_AVX512 || MARLIN_AVX2
    int64_t eight;
    std::memcpy(&eight, from, sizeof(eight));
    const __m256i places = _mm256_setr_epi8(-1, 0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3,  //
                                            -1, 4, -1, 4, -1, 5, -1, 5, -1, 6, -1, 6, -1, 7, -1, 7);
    return from_e4m3(_mm256_shuffle_epi8(_mm256_set1_epi64x(eight), places));
#else
    Vector scales;
    for (int lane = 0; lane < LANES; lane++) scales[lane] = e4m3_table[from[lane / 2]];
    return scales;
#endif
  }
};

struct E8m0Scales {
  // The scales of 128 weights, four lanes each.
  Vector of_lanes(const Packed& row, int64_t line, int64_t groups) const {
    int32_t four = 0;
    if (groups >= 4) {
      std::memcpy(&four, row.codes + 4 * line, sizeof(four));
    } else {
      std::memcpy(&four, row.codes + 4 * line, groups);
    }
#if MARLIN_AVX512
    // Each code to the top of its lanes, then below the sign.
    constexpr int P0 = 0x00808080, P1 = 0x01808080, P2 = 0x02808080, P3 = 0x03808080;
    const __m512i places = _mm512_setr_epi32(P0, P0, P0, P0, P1, P1, P1, P1, P2, P2, P2, P2, P3, P3, P3, P3);
    const __m512i codes = _mm512_shuffle_epi8(_mm512_set1_epi32(four), places);
    return Vector(_mm512_castsi512_ps(_mm512_srli_epi32(codes, 1)));
#elif MARLIN_AVX2
    constexpr int P0 = 0x00808080, P1 = 0x01808080, P2 = 0x02808080, P3 = 0x03808080;
    const auto eight = [all = _mm256_set1_epi32(four)](int first, int second) {
      const __m256i places = _mm256_setr_epi32(first, first, first, first, second, second, second, second);
      return _mm256_castsi256_ps(_mm256_srli_epi32(_mm256_shuffle_epi8(all, places), 1));
    };
    return {eight(P0, P1), eight(P2, P3)};
#else
    Integers codes;
    for (int lane = 0; lane < LANES; lane++) codes[lane] = (four >> (lane / 4 * 8)) & 255;
    return powers_of_two(codes);
#endif
  }
};

// Of groups of any size.
struct FloatScales {
  FloatScales(const Matrix& w, int64_t weights_of_line) : group_size(w.group_size), weights(weights_of_line) {
    for (int lane = 0; lane < LANES; lane++) spread[lane] = lane * weights / LANES / group_size;
    most = std::max<int64_t>(1, weights / group_size);
  }

  Vector of_lanes(const Packed& row, int64_t line, int64_t groups) const {
    const float* from = row.scales + line * weights / group_size;
    const int64_t count = std::min(most, groups);
#if MARLIN_AVX512
    const __m512 some = _mm512_castps128_ps512(_mm_maskz_loadu_ps(__mmask8((1 << count) - 1), from));
    return Vector(_mm512_permutexvar_ps(__m512i(spread), some));
#elif MARLIN_AVX2
    const __m128i there = _mm_cmpgt_epi32(_mm_set1_epi32(int32_t(count)), _mm_setr_epi32(0, 1, 2, 3));
    const __m256 some = _mm256_castps128_ps256(_mm_maskload_ps(from, there));
    return {_mm256_permutevar8x32_ps(some, __m256i(spread.low)), _mm256_permutevar8x32_ps(some, __m256i(spread.high))};
#else
    Vector scales{};
    for (int lane = 0; lane < LANES; lane++) scales[lane] = spread[lane] < count ? from[spread[lane]] : 0.0f;
    return scales;
#endif
  }

  Integers spread;
  int64_t group_size, weights, most;
};

}  // namespace marlin
