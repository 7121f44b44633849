// linear: out[M, N] = x[M, K] @ weight[N, K]^T in float32. Few rows: a product at the speed of memory; many: tiles of registers
// with AVX-512 and AVX2, OpenBLAS elsewhere.
#include "common.hpp"
#include "dense_lines.hpp"
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

}  // namespace

void multiply_dense(const float* x, const float* weight, float* out, int64_t rows, int64_t columns, int64_t depth) {
  if (rows > FEW_DENSE_ROWS && !exact_rows()) return product({x, depth}, {weight, depth}, out, columns, rows, columns, depth);
  const DenseRows laid(x, rows, depth);
  over_threads(columns, rows * depth, [&](int64_t first, int64_t last) { multiply_dense_lines(laid, {weight, depth}, out, columns, first, last); });
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
