// linear: out[M, N] = x[M, K] @ weight[N, K]^T in float32. Few rows: a product at the speed of memory; many: tiles of registers
// with AVX-512 and AVX2, OpenBLAS elsewhere.
#include "common.hpp"
#include "linear.hpp"
#include "product_tiles.hpp"

extern "C" {
// scipy-openblas32's names; CblasRowMajor 101, CblasNoTrans 111, CblasTrans 112.
void scipy_cblas_sgemm(int, int, int, int, int, int, float, const float*, int, const float*, int, float, float*, int);
void scipy_openblas_set_num_threads(int);
}

namespace marlin {

namespace {

int thread_count = 1;
bool rows_are_exact = false;

// TOGETHER rows of weights against ROWS rows of x. Weights are read once for all rows of x; several rows of weights at once
// keep more of them on their way from memory, and more sums in flight than the latency of one.
template <int ROWS, int TOGETHER>
inline void block(const float* x, const float* weight, float* out, int64_t columns, int64_t depth) {
  const int64_t whole = depth / LANES * LANES;
  Sums sums[ROWS][TOGETHER] = {};
  for (int64_t k = 0; k < whole; k += LANES) {
    for (int n = 0; n < TOGETHER; n++) {
      const Vector values = load(weight + n * depth + k);
      for (int m = 0; m < ROWS; m++) add_products(sums[m][n], values, load(x + m * depth + k));
    }
  }
  for (int m = 0; m < ROWS; m++) {
    for (int n = 0; n < TOGETHER; n++) {
      float total = sum(sums[m][n]);
      for (int64_t k = whole; k < depth; k++) total += weight[n * depth + k] * x[m * depth + k];
      out[m * columns + n] = total;
    }
  }
}

template <int ROWS>
void few_rows(const float* x, const float* weight, float* out, int64_t columns, int64_t depth, int64_t first, int64_t last) {
#if MARLIN_AVX512
  constexpr int TOGETHER = ROWS > 4 ? 3 : 4;  // as many sums as there are registers
#else
  constexpr int TOGETHER = ROWS > 2 ? 2 : 4;
#endif
  int64_t n = first;
  for (; n + TOGETHER <= last; n += TOGETHER) block<ROWS, TOGETHER>(x, weight + n * depth, out + n, columns, depth);
  for (; n < last; n++) block<ROWS, 1>(x, weight + n * depth, out + n, columns, depth);
}

#if MARLIN_AVX512
constexpr int64_t FEW = 16, AT_ONCE = 8;
#else
constexpr int64_t FEW = 4, AT_ONCE = 4;
#endif

void up_to_eight(const float* x, const float* weight, float* out, int64_t rows, int64_t columns, int64_t depth, int64_t first, int64_t last) {
  switch (rows) {
    case 1: return few_rows<1>(x, weight, out, columns, depth, first, last);
    case 2: return few_rows<2>(x, weight, out, columns, depth, first, last);
    case 3: return few_rows<3>(x, weight, out, columns, depth, first, last);
    case 4: return few_rows<4>(x, weight, out, columns, depth, first, last);
    case 5: return few_rows<5>(x, weight, out, columns, depth, first, last);
    case 6: return few_rows<6>(x, weight, out, columns, depth, first, last);
    case 7: return few_rows<7>(x, weight, out, columns, depth, first, last);
    default: return few_rows<8>(x, weight, out, columns, depth, first, last);
  }
}

}  // namespace

void multiply_dense(const float* x, const float* weight, float* out, int64_t rows, int64_t columns, int64_t depth) {
  if (rows > FEW && !exact_rows()) return product({x, depth}, {weight, depth}, out, columns, rows, columns, depth);
  constexpr int64_t COLUMNS_AT_ONCE = 48;  // which stay in the second cache while all rows of x pass them
  const int64_t most = rows > FEW ? COLUMNS_AT_ONCE : columns;
  over_threads(columns, rows * depth, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; n += most)
      for (int64_t m = 0; m < rows; m += AT_ONCE)
        up_to_eight(x + m * depth, weight, out + m * columns, std::min(AT_ONCE, rows - m), columns, depth, n, std::min(last, n + most));
  });
}

namespace {

class Linear : public CpuPrimitive {
 public:
  using CpuPrimitive::CpuPrimitive;
  const char* name() const override { return "MarlinLinear"; }

 protected:
  std::function<void()> task(const std::vector<mx::array>& inputs, mx::array& out) const override {
    const int64_t columns = inputs[1].shape(0), depth = inputs[1].shape(1), rows = inputs[0].size() / depth;
    return [x = inputs[0].data<float>(), weight = inputs[1].data<float>(), result = out.data<float>(), rows, columns,
            depth] { multiply_dense(x, weight, result, rows, columns, depth); };
  }
};

}  // namespace

int threads() { return thread_count; }

bool exact_rows() { return rows_are_exact; }

void set_exact_rows(bool exact) { rows_are_exact = exact; }

void set_threads(int count) {
  thread_count = count;
  scipy_openblas_set_num_threads(1);  // the parts of a product are spread here, so that kernels may call it from any thread
}

void product(Strided a, Strided b, float* out, int64_t out_stride, int64_t rows, int64_t columns, int64_t depth) {
  const auto part = [&](int64_t row, int64_t row_count, int64_t column, int64_t column_count) {
#if MARLIN_TILES
    tiles::product({a.data + row * a.stride, a.stride}, {b.data + column * b.stride, b.stride}, out + row * out_stride + column,
                   out_stride, row_count, column_count, depth);
#else
    scipy_cblas_sgemm(101, 111, 112, row_count, column_count, depth, 1.0f, a.data + row * a.stride, a.stride,
                      b.data + column * b.stride, b.stride, 0.0f, out + row * out_stride + column, out_stride);
#endif
  };
  // Parts of the longer side, so that each stays near square.
  if (rows > columns) return over_threads(rows, columns * depth, [&](int64_t first, int64_t last) { part(first, last - first, 0, columns); });
  over_threads(columns, rows * depth, [&](int64_t first, int64_t last) { part(0, rows, first, last - first); });
}

void add_product(Strided a, Strided b, float* out, int64_t out_stride, int64_t rows, int64_t columns, int64_t depth) {
#if MARLIN_TILES
  tiles::add_product(a, b, out, out_stride, rows, columns, depth);
#else
  scipy_cblas_sgemm(101, 111, 111, rows, columns, depth, 1.0f, a.data, a.stride, b.data, b.stride, 1.0f, out, out_stride);
#endif
}

mx::array linear(const mx::array& x, const mx::array& weight) {
  auto shape = x.shape();
  shape.back() = weight.shape(0);
  auto stream = mx::default_stream(mx::Device::cpu);
  std::vector<mx::array> inputs{contiguous_input(x), contiguous_input(weight)};
  return mx::array(shape, mx::float32, std::make_shared<Linear>(stream), std::move(inputs));
}

}  // namespace marlin
