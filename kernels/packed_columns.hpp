// Sixteen columns of a packed matrix side by side, one a lane: what kernels read whose lanes are columns.
#pragma once
#include <algorithm>

#include "threads.hpp"
#include "decode.hpp"
#include "marlin_gemm.hpp"

namespace marlin {

constexpr int64_t LINE = 64;  // bytes of a vector

inline Bytes load_bytes(const uint8_t* from) { return load_as<Bytes>(from); }

// The first `count` of 64 bytes; the others are zero.
inline Bytes load_bytes(const uint8_t* from, int64_t count) {
#if MARLIN_AVX512
  return Bytes(_mm512_maskz_loadu_epi8(count >= LINE ? ~0ull : count > 0 ? (1ull << count) - 1 : 0, from));
#else
  uint8_t bytes[LINE] = {};
  std::memcpy(bytes, from, std::clamp<int64_t>(count, 0, LINE));
  return load_bytes(bytes);
#endif
}

// Sixteen dwords of sixteen vectors, transposed: four perfect shuffles.
inline __attribute__((always_inline)) void transpose(Integers* rows) {
  for (int round = 0; round < 4; round++) {
    Integers mixed[LANES];
    for (int row = 0; row < LANES / 2; row++) interleave(rows[row], rows[row + LANES / 2], mixed[2 * row], mixed[2 * row + 1]);
    std::copy_n(mixed, LANES, rows);
  }
}

#if MARLIN_AVX512 || MARLIN_AVX2
// Sixteen E4M3 codes, sign-extended to words and moved seven bits up, where half floats have exponent and mantissa: each times 2^-8. A half
// has one exponent bit more, where a copy of the sign is in the way.
inline Vector from_halves(__m256i words) {
  const __m256i halves = _mm256_and_si256(words, _mm256_set1_epi16(int16_t(0xbf80)));
#if MARLIN_AVX512
  return Vector(_mm512_cvtph_ps(halves));
#else
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
#endif
}

// Sixteen E4M3 codes in the upper bytes of words, each times 2^-8.
inline Vector from_e4m3(__m256i upper) { return from_halves(_mm256_srai_epi16(upper, 1)); }
#endif

// The numbers of sixteen E4M3 codes, byte number `part` of dwords, times this power of two.
#if MARLIN_AVX512 || MARLIN_AVX2
constexpr float E4M3_FACTOR = 0x1p-8f;
#else
constexpr float E4M3_FACTOR = 1.0f;
#endif
inline Vector e4m3_of(Integers codes, int part) {
#if MARLIN_AVX512
  return from_e4m3(_mm256_slli_epi16(_mm512_cvtepi32_epi16(_mm512_srli_epi32(__m512i(codes), 8 * part)), 8));
#elif MARLIN_AVX2
  const auto byte = [&](const auto& half) { return _mm256_and_si256(_mm256_srli_epi32(__m256i(half), 8 * part), _mm256_set1_epi32(255)); };
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(byte(codes.low), byte(codes.high)), 0xd8);
  return from_e4m3(_mm256_slli_epi16(words, 8));
#else
  Vector values;
  for (int lane = 0; lane < LANES; lane++) values[lane] = e4m3_table[uint8_t(codes[lane] >> (8 * part))];
  return values;
#endif
}

// 2^(code - 127); code 0, a subnormal, counts as nothing.
inline Vector powers_of_two(Integers codes) { return bits_as<Vector>(codes << 23); }
inline Vector e8m0_of(Integers codes, int part) { return powers_of_two((codes >> (8 * part)) & 255); }

// Columns `column` .. `column` + 15; behind the last one, the last one again.
class Columns {
 public:
  Columns(const Matrix& w, int64_t column)
      : first_(w.row(std::min(column, w.columns - 1))), last_(std::clamp<int64_t>(w.columns - 1 - column, 0, LANES - 1)), row_bytes_(w.row_bytes),
        groups_(w.groups()) {
    for (int r = 0; r < LANES; r++) places_[r] = int32_t(std::min<int64_t>(r, last_) * groups_);
  }

  int64_t groups() const { return groups_; }
  int64_t group_size() const { return first_.group_size; }

  // Sixteen dwords of each column from byte `start` on, a vector for each; zeros behind the end of a row.
  __attribute__((always_inline)) void line(int64_t start, Integers* dwords) const {
    const int64_t left = row_bytes_ - start;
    const auto from = [&](int r) { return first_.weight + start + std::min<int64_t>(r, last_) * row_bytes_; };
    // Sixteen rows at once are more than the processor foresees: those of the next panel, or the one after.
    for (int r = 0; r < LANES; r++) __builtin_prefetch(from(r) + 2 * LANES * row_bytes_, 0, 2);
    if (left >= LINE) {
      for (int r = 0; r < LANES; r++) dwords[r] = bits_as<Integers>(load_bytes(from(r)));
    } else {
      for (int r = 0; r < LANES; r++) dwords[r] = bits_as<Integers>(load_bytes(from(r), left));
    }
    transpose(dwords);
  }

  // Four scale codes of each column from group `group` on; zeros behind the last.
  Integers four_codes(int64_t group) const {
    const int64_t some = groups_ - group;
    const uint8_t* from = first_.codes + group;
#if MARLIN_AVX512
    if (some >= 4) return Integers(_mm512_i32gather_epi32(__m512i(places_), from, 1));
#elif MARLIN_AVX2
    const auto gathered = [&](const auto& places) { return _mm256_i32gather_epi32(reinterpret_cast<const int*>(from), __m256i(places), 1); };
    using Half = decltype(Integers::low);
    if (some >= 4) return {Half(gathered(places_.low)), Half(gathered(places_.high))};
#endif
    Integers codes{};
    for (int r = 0; r < LANES && some > 0; r++) {
      int32_t four = 0;
      if (some >= 4) {
        std::memcpy(&four, from + places_[r], 4);
      } else {
        std::memcpy(&four, from + places_[r], some);
      }
      codes[r] = four;
    }
    return codes;
  }

  // Scale and bias of group `group` of each column, for formats that have them as floats; zeros behind the last.
  void floats(int64_t group, Vector& scale, Vector& bias) const {
    scale = bias = Vector{};
    if (group >= groups_) return;
#if MARLIN_AVX512
    scale = Vector(_mm512_i32gather_ps(__m512i(places_), first_.scales + group, 4));
    bias = Vector(_mm512_i32gather_ps(__m512i(places_), first_.biases + group, 4));
#elif MARLIN_AVX2
    const auto gathered = [&](const float* from) {
      return Vector{_mm256_i32gather_ps(from, __m256i(places_.low), 4), _mm256_i32gather_ps(from, __m256i(places_.high), 4)};
    };
    scale = gathered(first_.scales + group);
    bias = gathered(first_.biases + group);
#else
    for (int r = 0; r < LANES; r++) scale[r] = first_.scales[places_[r] + group], bias[r] = first_.biases[places_[r] + group];
#endif
  }

 private:
  Packed first_;
  int64_t last_, row_bytes_, groups_;
  Integers places_;  // of each column's groups
};

}  // namespace marlin
