// marlin_gemm for up to four rows of x, with vectors of 512 bits: out[M, N] = x[M, K] @ W[N, K]^T in float32. Products add up before
// their scales multiply them once.
//
// Nibbles: a line of 64 bytes is 128 weights, eight a dword. Lanes are dwords: a permutation looks up the low nibble of each, so that a
// shift is all there is between two of the eight.
#include "marlin_gemm_lines.hpp"

#include <array>

#include "threads.hpp"
#include "packed_lines.hpp"
#include "targets.hpp"

namespace marlin {

#if MARLIN_AVX512
namespace {

constexpr int64_t NIBBLES = 8, WEIGHTS = LANES * NIBBLES;  // of a lane, and of a line

constexpr std::array<float, LANES> values_of(auto value) {
  std::array<float, LANES> values{};
  for (int code = 0; code < LANES; code++) values[code] = value(code);
  return values;
}

struct Nvfp4 : E4m3Scales {
  static constexpr bool affine = false;
  explicit Nvfp4(const Matrix&) {}
  alignas(64) static constexpr auto values = values_of([](int code) { return E2M1[code] / E4M3_FACTOR; });
};

struct Mxfp4 : E8m0Scales {
  static constexpr bool affine = false;
  explicit Mxfp4(const Matrix&) {}
  alignas(64) static constexpr auto values = values_of([](int code) { return E2M1[code]; });
};

// Without the biases, which meet the sums of x over each group.
struct Int4 : FloatScales {
  static constexpr bool affine = true;
  explicit Int4(const Matrix& w) : FloatScales(w, WEIGHTS) {}
  alignas(64) static constexpr auto values = values_of([](int code) { return float(code); });
};

// Rows of x in the order of lanes: [rows, lines, nibbles, lanes], and the sums of its groups, [rows, groups].
struct Laid {
  std::vector<float> values, sums;
};

void lay_out(const float* x, int64_t rows, const Matrix& w, bool affine, Laid& laid) {
  const int64_t lines = (w.depth + WEIGHTS - 1) / WEIGHTS;
  laid.values.resize(std::max<size_t>(laid.values.size(), rows * lines * WEIGHTS));
  float* to = laid.values.data();
  const __m512i places = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(NIBBLES));
  for (int64_t m = 0; m < rows; m++) {
    for (int64_t line = 0; line < lines; line++) {
      for (int64_t nibble = 0; nibble < NIBBLES; nibble++, to += LANES) {
        const int64_t start = line * WEIGHTS + nibble, there = (w.depth - start + NIBBLES - 1) / NIBBLES;
        const __mmask16 mask = there >= LANES ? 0xffff : __mmask16((1 << std::max<int64_t>(there, 0)) - 1);
        _mm512_storeu_ps(to, _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, places, x + m * w.depth + start, 4));
      }
    }
  }
  if (affine) sum_groups(x, rows, w, laid.sums);
}

// The sums of four vectors' lanes.
inline __m128 sums_of_four(Vector a, Vector b, Vector c, Vector d) {
  const auto halves = [](Vector v) { return _mm256_add_ps(_mm512_castps512_ps256(__m512(v)), _mm512_extractf32x8_ps(__m512(v), 1)); };
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(halves(a), halves(b)), _mm256_hadd_ps(halves(c), halves(d)));
  return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}

// TOGETHER rows of weights against ROWS rows of x: loads of x are shared, and there are chains of sums to spare.
template <class Format, int ROWS, int TOGETHER>
inline void together(const Format& format, const Matrix& w, const Laid& laid, float* out, int64_t n0, int64_t there, int64_t groups, int64_t ahead) {
  const int64_t lines = (w.row_bytes + LINE - 1) / LINE, whole = w.row_bytes / LINE;
  const __m512 values = _mm512_load_ps(Format::values.data());
  Packed rows[TOGETHER];
  rows_of<TOGETHER>(w, n0, there, groups, rows);
  Vector sums[TOGETHER][ROWS] = {};
  const auto step = [&](int64_t line, bool all) __attribute__((always_inline)) {
    __m512i dwords[TOGETHER][NIBBLES / 2];
    Vector parts[TOGETHER][ROWS] = {};
    for (int n = 0; n < TOGETHER; n++) {
      const uint8_t* from = rows[n].weight + line * LINE;
      __builtin_prefetch(from + ahead);
      if (!all) dwords[n][0] = __m512i(load_bytes(from, w.row_bytes - line * LINE));
#pragma GCC unroll 4
      for (int byte = 0; byte < NIBBLES / 2; byte++)
        dwords[n][byte] = all ? __m512i(load_bytes(from + byte)) : _mm512_srli_epi32(dwords[n][0], 8 * byte);
    }
#pragma GCC unroll 8
    for (int nibble = 0; nibble < NIBBLES; nibble++) {
      Vector weights[TOGETHER];
      for (int n = 0; n < TOGETHER; n++)
        weights[n] = Vector(_mm512_permutexvar_ps(_mm512_srli_epi32(dwords[n][nibble / 2], nibble % 2 * 4), values));
      for (int m = 0; m < ROWS; m++) {
        const Vector own = load(laid.values.data() + ((m * lines + line) * NIBBLES + nibble) * LANES);
        for (int n = 0; n < TOGETHER; n++) parts[n][m] += weights[n] * own;
      }
    }
    for (int n = 0; n < TOGETHER; n++) {
      const Vector scales = format.of_lanes(rows[n], line, all ? LANES : groups - line * WEIGHTS / w.group_size);
      for (int m = 0; m < ROWS; m++) sums[n][m] += parts[n][m] * scales;
    }
  };
  const int64_t inside = std::min(whole, lines - 1);  // the last reads nothing behind it
  for (int64_t line = 0; line < inside; line++) step(line, true);
  for (int64_t line = inside; line < lines; line++) step(line, false);
  for (int n = 0; n < TOGETHER; n++) {
    for (int m = 0; m < ROWS; m++) {
      if constexpr (Format::affine)
        for (int64_t g = 0; g < groups; g += LANES)
          sums[n][m] += load_some(rows[n].biases + g, groups - g) * load_some(laid.sums.data() + m * groups + g, groups - g);
    }
  }
  for (int m = 0; m < ROWS; m++) {
    float* to = out + m * w.columns + n0;
    if constexpr (TOGETHER == 4) {
      _mm_mask_storeu_ps(to, __mmask8((1 << there) - 1), sums_of_four(sums[0][m], sums[1][m], sums[2][m], sums[3][m]));
    } else {
      // In the same order.
      for (int n = 0; n < TOGETHER && n < there; n++) to[n] = _mm_cvtss_f32(sums_of_four(sums[n][m], sums[n][m], sums[n][m], sums[n][m]));
    }
  }
}

template <class Format, int ROWS>
void multiply(Targets targets, const float* x) {
  const Matrix& any = targets[0].w;
  constexpr int TOGETHER = ROWS == 1 ? 4 : 2;
  thread_local Laid kept;
  Laid& laid = kept;
  lay_out(x, ROWS, any, Format::affine, laid);
  const Format format(any);
  const int64_t groups = any.groups(), ahead = any.bytes_ahead(TOGETHER);
  over_columns(targets, 1, ROWS * any.depth, [&](const Target& target, int64_t first, int64_t last) {
    by_columns<TOGETHER>(first, last, [&](int64_t n, int64_t there) {
      together<Format, ROWS, TOGETHER>(format, target.w, laid, target.out, n, there, groups, ahead);
    });
    finish(target, 0, ROWS, first, last - first);
  });
}

}  // namespace

bool multiply_lines(Kind kind, Targets targets, const float* x, int64_t rows) {
  constexpr int64_t MOST_ROWS = 4;
  if (rows > MOST_ROWS) return false;
  if (kind == Kind::int8 || kind == Kind::mxfp8) return false;
  for_few_rows(rows, [&](auto some) {
    switch (kind) {
      case Kind::nvfp4: return multiply<Nvfp4, some>(targets, x);
      case Kind::mxfp4: return multiply<Mxfp4, some>(targets, x);
      default: return multiply<Int4, some>(targets, x);
    }
  });
  return true;
}
#else
bool multiply_lines(Kind, Targets, const float*, int64_t) { return false; }
#endif

}  // namespace marlin
