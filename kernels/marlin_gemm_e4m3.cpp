// marlin_gemm of mxfp8 in lines: out[M, N] = x[M, K] @ W[N, K]^T in float32, for up to eight rows of x at a time, and for more out of decoded
// columns that the second cache holds.
//
// Lanes are dwords, of four weights each. An E4M3 has the fields of a float whose exponent is 120 too small, four places below a float's: a
// shift up, one down with its sign and a mask make a weight, its subnormals too. Up to four rows of x are multiplied by a power of two
// that makes up for most of it, and their sums by what is left; for more of them each weight is multiplied by 2^120.
#include "marlin_gemm_e4m3.hpp"

#include <bit>

#include "dense_lines.hpp"
#include "packed_lines.hpp"
#include "targets.hpp"
#include "threads.hpp"
#include "whole_numbers.hpp"

namespace marlin {

namespace {

using Dwords = SumOf<Integers>::type;  // as many as sums have lanes

constexpr int64_t GROUP = 32, WIDTH = sizeof(Sums) / sizeof(float), WEIGHTS = 4 * WIDTH;  // lanes, and weights of a line
constexpr int64_t MOST_ROWS = 8;

constexpr float MISSING = 0x1p120f;

// Weight number PART of each dword, over MISSING.
template <int PART>
inline __attribute__((always_inline)) Sums weights_of(const Dwords& dwords) {
  constexpr int32_t FIELDS = int32_t(0x87f00000);
  return bits_as<Sums>(((dwords << (24 - 8 * PART)) >> 4) & FIELDS);
}

// A line of a row; what is behind the row is zero.
template <bool ALL>
inline __attribute__((always_inline)) Dwords load_line(const uint8_t* from) {
  if constexpr (ALL) {
    return load_as<Dwords>(from);
  } else {
    return bits_as<Dwords>(load_bytes(from, GROUP));
  }
}

// Scales of a line by lanes, out of those of groups from its first on.
template <int64_t LANES_OF_GROUP = WIDTH * GROUP / WEIGHTS>
inline __attribute__((always_inline)) Sums scales_of_line(const float* scales) {
  if constexpr (LANES_OF_GROUP < WIDTH) {
    return spread<LANES_OF_GROUP>(scales);
  } else {
    return splat_as<Sums>(*scales);
  }
}

// body(line, ALL) for all lines of a row.
template <class Body>
inline __attribute__((always_inline)) void over_lines(int64_t depth, const Body& body) {
  const int64_t whole = depth / WEIGHTS;
  for (int64_t line = 0; line < whole; line++) body(line, std::true_type{});
  if constexpr (WEIGHTS > GROUP)
    if (whole * WEIGHTS < depth) body(whole, std::false_type{});
}

// Scales of sixteen groups of a row, and what a register reads beyond; new ones when a line's are not among them.
struct Scales {
  alignas(64) float values[2 * LANES];

  __attribute__((always_inline)) Sums of(const Packed& row, int64_t line, int64_t groups) {
    const int64_t group = line * WEIGHTS / GROUP;
    if (group % LANES == 0) store(e8m0_of_groups(row, group, groups - group), values);
    return scales_of_line(values + group % LANES);
  }
};

// Rows of x by lines, [rows, lines, four weights of a dword, dwords] or, side by side, [lines, rows, ..]; where they are RAISED, each by a power
// of two, and what sums of a row have to be multiplied by, twice.
struct Laid {
  float *values, *roots;
  int64_t lines;
};

template <bool RAISED>
Laid lay_out(const float* x, int64_t rows, int64_t depth, bool side_by_side) {
  // Exponents as their bits are: of what the largest of a row comes to, and of factors, which are odd so that what is left has a root.
  constexpr int32_t LARGEST = 127 + 100, MOST_FACTOR = 253;
  thread_local AlignedBytes kept;
  thread_local std::vector<float> kept_roots;
  const int64_t lines = (depth + WEIGHTS - 1) / WEIGHTS;
  kept_roots.resize(std::max<size_t>(kept_roots.size(), rows));
  const Laid laid{reinterpret_cast<float*>(kept.of(rows * lines * WEIGHTS * sizeof(float))), kept_roots.data(), lines};
  over_threads(rows, 2 * depth, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; m++) {
      const float* row = x + m * depth;
      float factor = 1.0f;
      if constexpr (RAISED) {
        Integers most{};
        for (int64_t k = 0; k < depth; k += LANES) {
          const Integers magnitudes = bits_as<Integers>(load(row + k)) & 0x7fffffff;
          most = chosen(magnitudes > most, magnitudes, most);
        }
        const int32_t exponent = std::min((LARGEST + 127 - (largest(most) >> 23)) | 1, MOST_FACTOR);
        factor = std::bit_cast<float>(exponent << 23);
        laid.roots[m] = std::bit_cast<float>((127 + (120 + 127 - exponent) / 2) << 23);
      }
      for (int64_t line = 0; line < lines; line++) {
        float* to = laid.values + (side_by_side ? line * rows + m : m * lines + line) * WEIGHTS;
        const float* from = row + line * WEIGHTS;
        const int64_t there = std::min(WIDTH, (depth - line * WEIGHTS) / 4);
        const auto put = [&](int64_t lanes) __attribute__((always_inline)) {
          for (int64_t lane = 0; lane < lanes; lane++)
            for (int64_t part = 0; part < 4; part++) to[part * WIDTH + lane] = from[4 * lane + part] * factor;
        };
        if (there == WIDTH) {
          put(WIDTH);
        } else {
          std::fill_n(to, WEIGHTS, 0.0f);
          put(there);
        }
      }
    }
  });
  return laid;
}

// TOGETHER rows of weights against ROWS rows of x, all that there are. IN_PARTS: products of a line add up before its scales multiply them
// once, which costs up to four rows less, and is another order than more of them have.
template <bool IN_PARTS, int ROWS, int TOGETHER>
inline void together(const Matrix& w, const Laid& x, float* out, int64_t n0, int64_t there, int64_t groups, int64_t ahead) {
  Packed rows[TOGETHER];
  rows_of<TOGETHER>(w, n0, there, groups, rows);
  Scales scales[TOGETHER];
  Sums sums[TOGETHER][ROWS] = {};
  over_lines(w.depth, [&](int64_t line, auto all) __attribute__((always_inline)) {
    Dwords dwords[TOGETHER];
    Sums scale[TOGETHER], parts[TOGETHER][ROWS];
    for (int n = 0; n < TOGETHER; n++) {
      const uint8_t* from = rows[n].weight + line * WEIGHTS;
      __builtin_prefetch(from + ahead);
      dwords[n] = load_line<all>(from);
      scale[n] = scales[n].of(rows[n], line, groups);
    }
    const auto add = [&]<int PART>(std::integral_constant<int, PART>) __attribute__((always_inline)) {
      Sums weights[TOGETHER];
      for (int n = 0; n < TOGETHER; n++) weights[n] = IN_PARTS ? weights_of<PART>(dwords[n]) : weights_of<PART>(dwords[n]) * MISSING * scale[n];
      for (int m = 0; m < ROWS; m++) {
        const auto own = load_as<Sums>(x.values + (line * ROWS + m) * WEIGHTS + PART * WIDTH);
        for (int n = 0; n < TOGETHER; n++) {
          if constexpr (!IN_PARTS) {
            sums[n][m] += weights[n] * own;
          } else if constexpr (PART == 0) {
            parts[n][m] = weights[n] * own;
          } else {
            parts[n][m] += weights[n] * own;
          }
        }
      }
    };
    [&]<int... PARTS>(std::integer_sequence<int, PARTS...>) __attribute__((always_inline)) {
      (add(std::integral_constant<int, PARTS>{}), ...);
    }(std::make_integer_sequence<int, 4>{});
    if constexpr (IN_PARTS)
      for (int n = 0; n < TOGETHER; n++)
        for (int m = 0; m < ROWS; m++) sums[n][m] += parts[n][m] * scale[n];
  });
  for (int m = 0; m < ROWS; m++)
    for (int n = 0; n < TOGETHER && n < there; n++)
      out[m * w.columns + n0 + n] = IN_PARTS ? sum(sums[n][m]) * x.roots[m] * x.roots[m] : sum(sums[n][m]);
}

template <bool IN_PARTS, int ROWS>
void multiply(Targets targets, const float* x) {
  // As many sums, or sums and parts, as there are registers.
#if MARLIN_AVX512
  constexpr int TOGETHER = ROWS <= (IN_PARTS ? 2 : 4) ? 4 : 2;
#else
  constexpr int TOGETHER = ROWS == 1 ? 4 : ROWS <= (IN_PARTS ? 2 : 4) ? 2 : 1;
#endif
  const Matrix& any = targets[0].w;
  const Laid laid = lay_out<IN_PARTS>(x, ROWS, any.depth, true);
  const int64_t groups = any.groups(), ahead = any.bytes_ahead(TOGETHER);
  over_columns(targets, 1, ROWS * any.depth, [&](const Target& target, int64_t first, int64_t last) {
    by_columns<TOGETHER>(first, last, [&](int64_t n, int64_t there) {
      together<IN_PARTS, ROWS, TOGETHER>(target.w, laid, target.out, n, there, groups, ahead);
    });
    finish(target, 0, ROWS, first, last - first);
  });
}

// Weights of a row by lines, under their scales.
void unpack(const Packed& row, int64_t depth, int64_t groups, float* to) {
  Scales scales;
  over_lines(depth, [&](int64_t line, auto all) {
    const Sums scale = scales.of(row, line, groups);
    const Dwords dwords = load_line<all>(row.weight + line * WEIGHTS);
    [&]<int... PARTS>(std::integer_sequence<int, PARTS...>) {
      (store_as(weights_of<PARTS>(dwords) * MISSING * scale, to + line * WEIGHTS + PARTS * WIDTH), ...);
    }(std::make_integer_sequence<int, 4>{});
  });
}

void multiply_written_out(Targets targets, const float* x, int64_t rows) {
  constexpr int64_t BYTES_IN_CACHE = 1 << 18, OF_A_TURN = 12;  // columns: whole turns of a dense product
  const Matrix& any = targets[0].w;
  const Laid own = lay_out<false>(x, rows, any.depth, false);
  const int64_t depth = own.lines * WEIGHTS, groups = any.groups(), stride = depth + LANES;  // rows that are a page apart share too few places of the caches
  const DenseRows laid(own.values, rows, depth);
  const int64_t at_once = std::max(OF_A_TURN, BYTES_IN_CACHE / int64_t(depth * sizeof(float)) / OF_A_TURN * OF_A_TURN);
  over_columns(targets, 1, rows * depth, [&](const Target& target, int64_t first, int64_t last) {
    thread_local AlignedBytes kept;
    auto* weights = reinterpret_cast<float*>(kept.of(at_once * stride * sizeof(float)));
    for (int64_t n = first; n < last; n += at_once) {
      const int64_t count = std::min(at_once, last - n);
      for (int64_t each = 0; each < count; each++) unpack(target.w.row(n + each, groups), any.depth, groups, weights + each * stride);
      multiply_dense_lines(laid, {weights, stride}, target.out + n, target.w.columns, 0, count);
    }
    finish(target, 0, rows, first, last - first);
  });
}

}  // namespace

void multiply_e4m3(Targets targets, const float* x, int64_t rows) {
  if (rows > MOST_ROWS) return multiply_written_out(targets, x, rows);
  if (rows <= 4 && !exact_rows()) return for_few_rows<4>(rows, [&](auto some) { multiply<true, some>(targets, x); });
  for_few_rows<MOST_ROWS>(rows, [&](auto some) { multiply<false, some>(targets, x); });
}

}  // namespace marlin
