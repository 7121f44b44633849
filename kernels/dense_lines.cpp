// Dense products whose lanes lie along the depth: a row of a result comes out the same whichever rows and columns are beside it.
#include "dense_lines.hpp"

#include "threads.hpp"

namespace marlin {

namespace {

constexpr int64_t FEWEST_LAID = 4, AT_ONCE = DenseRows::AT_ONCE;

// Rows that are multiplied together: vector number v of row m is at laid + v * step + m * stride, what is left of it at x + m * depth.
struct Rows {
  const float *laid, *x;
  int64_t step, stride, depth;
};

// TOGETHER rows of weights against ROWS rows of x. Weights are read once for all rows of x; several rows of weights at once
// keep more of them on their way from memory, and more sums in flight than the latency of one.
template <int ROWS, int TOGETHER>
inline void block(const Rows& rows, Strided weight, float* out, int64_t out_stride) {
  const int64_t depth = rows.depth, whole = depth / LANES * LANES;
  Sums sums[ROWS][TOGETHER] = {};
  const float* x = rows.laid;
  for (int64_t k = 0; k < whole; k += LANES, x += rows.step) {
    for (int n = 0; n < TOGETHER; n++) {
      const Vector values = load(weight.data + n * weight.stride + k);
      for (int m = 0; m < ROWS; m++) add_products(sums[m][n], values, load(x + m * rows.stride));
    }
  }
  for (int m = 0; m < ROWS; m++) {
    for (int n = 0; n < TOGETHER; n++) {
      float total = sum(sums[m][n]);
      for (int64_t k = whole; k < depth; k++) total += weight.data[n * weight.stride + k] * rows.x[m * depth + k];
      out[m * out_stride + n] = total;
    }
  }
}

template <int ROWS>
void few_rows(const Rows& rows, Strided weight, float* out, int64_t out_stride, int64_t first, int64_t last) {
#if MARLIN_AVX512
  constexpr int TOGETHER = ROWS > 4 ? 3 : 4;  // as many sums as there are registers
#else
  constexpr int TOGETHER = ROWS > 2 ? 2 : 4;
#endif
  const auto from = [&](int64_t n) { return Strided{weight.data + n * weight.stride, weight.stride}; };
  int64_t n = first;
  for (; n + TOGETHER <= last; n += TOGETHER) block<ROWS, TOGETHER>(rows, from(n), out + n, out_stride);
  for (; n < last; n++) block<ROWS, 1>(rows, from(n), out + n, out_stride);
}

void up_to_eight(int64_t count, const Rows& rows, Strided weight, float* out, int64_t out_stride, int64_t first, int64_t last) {
  switch (count) {
    case 1: return few_rows<1>(rows, weight, out, out_stride, first, last);
    case 2: return few_rows<2>(rows, weight, out, out_stride, first, last);
    case 3: return few_rows<3>(rows, weight, out, out_stride, first, last);
    case 4: return few_rows<4>(rows, weight, out, out_stride, first, last);
    case 5: return few_rows<5>(rows, weight, out, out_stride, first, last);
    case 6: return few_rows<6>(rows, weight, out, out_stride, first, last);
    case 7: return few_rows<7>(rows, weight, out, out_stride, first, last);
    default: return few_rows<8>(rows, weight, out, out_stride, first, last);
  }
}

}  // namespace

DenseRows::DenseRows(const float* from, int64_t row_count, int64_t row_depth) : x(from), rows(row_count), depth(row_depth), laid(nullptr) {
  if (rows < FEWEST_LAID) return;
  thread_local AlignedBytes kept;
  const int64_t vectors = depth / LANES;
  auto* to = reinterpret_cast<float*>(kept.of(rows * vectors * LANES * sizeof(float)));
  over_threads(rows, depth, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; m++) {
      const int64_t start = m / AT_ONCE * AT_ONCE, count = std::min(AT_ONCE, rows - start);
      float* own = to + (start * vectors + m - start) * LANES;
      for (int64_t v = 0; v < vectors; v++) store(load(x + m * depth + v * LANES), own + v * count * LANES);
    }
  });
  laid = to;
}

void multiply_dense_lines(const DenseRows& x, Strided weight, float* out, int64_t out_stride, int64_t first, int64_t last) {
  constexpr int64_t COLUMNS_AT_ONCE = 48;  // which stay in the second cache while all rows of x pass them
  const int64_t most = x.rows > FEW_DENSE_ROWS ? COLUMNS_AT_ONCE : last - first, whole = x.depth / LANES * LANES;
  for (int64_t n = first; n < last; n += most) {
    for (int64_t m = 0; m < x.rows; m += AT_ONCE) {
      const int64_t count = std::min(AT_ONCE, x.rows - m);
      const float* own = x.x + m * x.depth;
      const Rows rows = x.laid ? Rows{x.laid + m * whole, own, count * LANES, LANES, x.depth} : Rows{own, own, LANES, x.depth, x.depth};
      up_to_eight(count, rows, weight, out + m * out_stride, out_stride, n, std::min(last, n + most));
    }
  }
}

}  // namespace marlin
