// Dense products: for the bindings, and on plain memory for the other kernels.
#pragma once
#include <cstdint>

namespace mlx::core {
class array;
}

namespace marlin {

// x [.., K] float32, weight [N, K] float32 -> [.., N] float32.
mlx::core::array linear(const mlx::core::array& x, const mlx::core::array& weight);

// out[rows, columns] = x[rows, depth] @ weight[columns, depth]^T.
void multiply_dense(const float* x, const float* weight, float* out, int64_t rows, int64_t columns, int64_t depth);

// A matrix in memory: rows `stride` floats apart.
struct Strided {
  const float* data;
  int64_t stride;
};

// out[rows, columns] = a[rows, depth] @ b[columns, depth]^T, over threads.
void product(Strided a, Strided b, float* out, int64_t out_stride, int64_t rows, int64_t columns, int64_t depth);

// out[rows, columns] += a[rows, depth] @ b[depth, columns], on one thread.
void add_product(Strided a, Strided b, float* out, int64_t out_stride, int64_t rows, int64_t columns, int64_t depth);

}  // namespace marlin
