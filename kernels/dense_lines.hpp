// Dense products whose lanes lie along the depth.
#pragma once
#include "linear.hpp"
#include "vectors.hpp"

namespace marlin {

// Up to so many rows they run at the speed of memory.
#if MARLIN_AVX512
constexpr int64_t FEW_DENSE_ROWS = 16;
#else
constexpr int64_t FEW_DENSE_ROWS = 4;
#endif

// Rows of x as these products meet them: from four on those that are multiplied together lie side by side, vector by vector, in memory that stays
// with the thread for its next product.
class DenseRows {
 public:
  static constexpr int64_t AT_ONCE = FEW_DENSE_ROWS < 8 ? FEW_DENSE_ROWS : 8;

  DenseRows(const float* x, int64_t rows, int64_t depth);

  const float* x;
  int64_t rows, depth;
  const float* laid;  // or null
};

// Columns first .. last of out[rows, columns] = x[rows, depth] @ weight[columns, depth]^T, whose rows are `out_stride` apart; on one thread.
void multiply_dense_lines(const DenseRows& x, Strided weight, float* out, int64_t out_stride, int64_t first, int64_t last);

}  // namespace marlin
