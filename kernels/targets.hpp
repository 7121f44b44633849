// Several products that share their x, as one: their columns are spread over threads together.
#pragma once
#include "threads.hpp"
#include "marlin_gemm.hpp"

namespace marlin {

// Factor and bias of some rows and columns whose sums are there.
inline void finish(const Target& target, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  if (target.factor == 1.0f && !target.bias) return;
  for (int64_t m = row; m < row + rows; m++) {
    float* out = target.out + m * target.w.columns + column;
    for (int64_t n = 0; n < columns; n += LANES) {
      Vector value = load_some(out + n, columns - n) * target.factor;
      if (target.bias) value += load_some(target.bias + column + n, columns - n);
      store_some(value, out + n, columns - n);
    }
  }
}

// The sum of x over each group of a matrix, [rows, groups]: what biases of affine formats meet. Groups of all formats
// are whole vectors.
inline void sum_groups(const float* x, int64_t rows, const Matrix& w, std::vector<float>& sums) {
  const int64_t groups = w.groups();
  sums.resize(rows * groups);
  for (int64_t group = 0; group < rows * groups; group++) {
    Vector total{};
    for (int64_t k = 0; k < w.group_size; k += LANES) total += load(x + group * w.group_size + k);
    sums[group] = sum(total);
  }
}

// body(target, first, last) for tiles first .. last of `width` columns of a target.
template <class Body>
void over_columns(Targets targets, int64_t width, int64_t work_per_column, const Body& body) {
  const auto tiles_of = [&](const Target& target) { return (target.w.columns + width - 1) / width; };
  int64_t total = 0;
  for (const Target& target : targets) total += tiles_of(target);
  over_threads(total, width * work_per_column, [&](int64_t first, int64_t last) {
    int64_t start = 0;
    for (const Target& target : targets) {
      const int64_t count = tiles_of(target), own_first = std::max<int64_t>(first - start, 0), own_last = std::min(last - start, count);
      if (own_first < own_last) body(target, own_first, own_last);
      start += count;
    }
  });
}

// body(n, there) for TOGETHER columns at a time from n on, of which the last time fewer may be there: a body takes the last of these for those
// that are not, and keeps nothing of them. A loop of its own for them would take a compiler as long again.
template <int TOGETHER, class Body>
void by_columns(int64_t first, int64_t last, const Body& body) {
  for (int64_t n = first; n < last; n += TOGETHER) body(n, std::min<int64_t>(TOGETHER, last - n));
}

// Packed rows of such columns.
template <int TOGETHER>
inline __attribute__((always_inline)) void rows_of(const Matrix& w, int64_t n, int64_t there, int64_t groups, Packed* rows) {
#pragma GCC unroll 4
  for (int64_t own = 0; own < TOGETHER; own++) rows[own] = w.row(n + std::min(own, there - 1), groups);
}

// body(ROWS), an integral_constant, for FEWEST to MOST rows.
template <int MOST = 4, int FEWEST = 1, class Body>
void for_few_rows(int64_t rows, const Body& body) {
  if constexpr (MOST > FEWEST)
    if (rows < MOST) return for_few_rows<MOST - 1, FEWEST>(rows, body);
  body(std::integral_constant<int, MOST>{});
}

}  // namespace marlin
