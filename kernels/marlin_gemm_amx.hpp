// Packed products in tiles of bfloat16.
#pragma once
#include "marlin_gemm.hpp"

namespace marlin {

// out[rows, columns] = x[rows, depth] @ W^T where `amx::usable()`; with 8 activation bits x becomes bfloat16.
void multiply_amx(Kind kind, const Matrix& w, const float* x, float* out, int64_t rows, int activation_bits);

}  // namespace marlin
