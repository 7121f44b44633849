// marlin_gemm of mxfp8 for up to four rows of x: out[M, N] = x[M, K] @ W[N, K]^T in float32. Lanes are sixteen neighbours; the products of a
// group add up before its scale multiplies them once, and in the same order whichever rows and columns are beside them.
#include "marlin_gemm_e4m3.hpp"

#include "dense_lines.hpp"
#include "threads.hpp"
#include "packed_lines.hpp"
#include "targets.hpp"

namespace marlin {

namespace {

constexpr int64_t GROUP = 32;

#if MARLIN_AVX512
// A group of each of TOGETHER rows, as half floats in memory: from there a conversion takes sixteen as they are, which out of a register
// cost a shuffle more. So they are made a group ahead.
template <int TOGETHER>
struct Halves {
  alignas(64) uint16_t values[2][TOGETHER][GROUP];

  __attribute__((always_inline)) void unpack(int n, const uint8_t* from, int64_t group) {
    const __m512i words = _mm512_slli_epi16(_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 7);
    _mm512_store_si512(values[group % 2][n], _mm512_and_si512(words, _mm512_set1_epi16(int16_t(0xbf80))));
  }
  __attribute__((always_inline)) Vector weights(int n, const uint8_t*, int64_t group, int64_t half) const {
    return Vector(_mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(values[group % 2][n] + half))));
  }
};
#else
template <int TOGETHER>
struct Halves {
  void unpack(int, const uint8_t*, int64_t) {}
  __attribute__((always_inline)) Vector weights(int, const uint8_t* row, int64_t group, int64_t half) const {
    const uint8_t* from = row + group * GROUP + half;
#if MARLIN_AVX2
    return from_halves(_mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 7));
#else
    Vector values;
    for (int lane = 0; lane < LANES; lane++) values[lane] = e4m3_table[from[lane]];
    return values;
#endif
  }
};
#endif

// TOGETHER rows of weights against ROWS rows of x. IN_PARTS: products of a group add up before its scale multiplies them once, which costs one row
// less, and is another order than any other number of rows has.
template <bool IN_PARTS, int ROWS, int TOGETHER>
inline void together(const Matrix& w, const float* x, float* out, int64_t n0, int64_t groups, int64_t ahead) {
  Packed rows[TOGETHER];
  for (int n = 0; n < TOGETHER; n++) rows[n] = w.row(n0 + n, groups);
  Halves<TOGETHER> halves;
  alignas(64) float scales[TOGETHER][LANES];
  Sums sums[TOGETHER][ROWS] = {};
  const auto unpack = [&](int64_t group) __attribute__((always_inline)) {
    for (int n = 0; n < TOGETHER; n++) {
      const uint8_t* from = rows[n].weight + group * GROUP;
      __builtin_prefetch(from + ahead);
      halves.unpack(n, from, group);
    }
  };
  unpack(0);
  for (int64_t group = 0; group < groups; group++) {
    if (group % LANES == 0)
      for (int n = 0; n < TOGETHER; n++) store(e8m0_of_groups(rows[n], group, groups - group) * (1 / E4M3_FACTOR), scales[n]);
    if (group + 1 < groups) unpack(group + 1);
    Sums parts[TOGETHER][ROWS] = {};
#pragma GCC unroll 2
    for (int64_t half = 0; half < GROUP; half += LANES) {
      Vector weights[TOGETHER];
      for (int n = 0; n < TOGETHER; n++) {
        weights[n] = halves.weights(n, rows[n].weight, group, half);
        if constexpr (!IN_PARTS) weights[n] *= splat(scales[n][group % LANES]);
      }
      for (int m = 0; m < ROWS; m++) {
        const Vector own = load(x + m * w.depth + group * GROUP + half);
        for (int n = 0; n < TOGETHER; n++) add_products(IN_PARTS ? parts[n][m] : sums[n][m], weights[n], own);
      }
    }
    if constexpr (IN_PARTS)
      for (int n = 0; n < TOGETHER; n++)
        for (int m = 0; m < ROWS; m++) sums[n][m] += parts[n][m] * splat_as<Sums>(scales[n][group % LANES]);
  }
  for (int m = 0; m < ROWS; m++)
    for (int n = 0; n < TOGETHER; n++) out[m * w.columns + n0 + n] = sum(sums[n][m]);
}

template <bool IN_PARTS, int ROWS>
void multiply(Targets targets, const float* x) {
  const Matrix& any = targets[0].w;
#if MARLIN_AVX512
  constexpr int TOGETHER = ROWS <= 2 ? 4 : 2;
#else
  constexpr int TOGETHER = ROWS <= 2 ? 4 / ROWS : 2;
#endif
  const int64_t groups = any.groups(), ahead = any.bytes_ahead(TOGETHER);
  over_columns(targets, 1, ROWS * any.depth, [&](const Target& target, int64_t first, int64_t last) {
    by_columns<TOGETHER>(first, last, [&](auto some, int64_t n) { together<IN_PARTS, ROWS, some>(target.w, x, target.out, n, groups, ahead); });
    finish(target, 0, ROWS, first, last - first);
  });
}

// Weights of a row under their scales, as floats.
void unpack(const Packed& row, int64_t groups, float* to) {
  alignas(64) float scales[LANES];
  Halves<1> halves;
  for (int64_t group = 0; group < groups; group++) {
    if (group % LANES == 0) store(e8m0_of_groups(row, group, groups - group) * (1 / E4M3_FACTOR), scales);
    halves.unpack(0, row.weight + group * GROUP, group);
    for (int64_t half = 0; half < GROUP; half += LANES)
      store(halves.weights(0, row.weight, group, half) * splat(scales[group % LANES]), to + group * GROUP + half);
  }
}

void multiply_written_out(Targets targets, const float* x, int64_t rows) {
  constexpr int64_t BYTES_IN_CACHE = 1 << 18, OF_A_TURN = 12;  // columns: whole turns of a dense product
  const Matrix& any = targets[0].w;
  const int64_t depth = any.depth, groups = any.groups(), stride = depth + LANES;  // rows that are a page apart share too few places of the caches
  const DenseRows laid(x, rows, depth);
  const int64_t at_once = std::max(OF_A_TURN, BYTES_IN_CACHE / int64_t(depth * sizeof(float)) / OF_A_TURN * OF_A_TURN);
  over_columns(targets, 1, rows * depth, [&](const Target& target, int64_t first, int64_t last) {
    thread_local AlignedBytes kept;
    auto* weights = reinterpret_cast<float*>(kept.of(at_once * stride * sizeof(float)));
    for (int64_t n = first; n < last; n += at_once) {
      const int64_t count = std::min(at_once, last - n);
      for (int64_t each = 0; each < count; each++) unpack(target.w.row(n + each, groups), groups, weights + each * stride);
      multiply_dense_lines(laid, {weights, stride}, target.out + n, target.w.columns, 0, count);
    }
    finish(target, 0, rows, first, last - first);
  });
}

}  // namespace

void multiply_e4m3(Targets targets, const float* x, int64_t rows) {
  if (rows > 4) return multiply_written_out(targets, x, rows);
  if (rows <= 2 && !exact_rows()) return for_few_rows<2>(rows, [&](auto some) { multiply<true, some>(targets, x); });
  for_few_rows(rows, [&](auto some) { multiply<false, some>(targets, x); });
}

}  // namespace marlin
