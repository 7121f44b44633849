// Packed products of a few rows, a line of nibbles at a time.
#pragma once
#include "marlin_gemm.hpp"

namespace marlin {

// out[rows, columns] = x[rows, depth] @ W^T, and true; false where this machine, this format or so many rows are for other kernels.
bool multiply_lines(Kind kind, const Matrix& w, const float* x, float* out, int64_t rows);

}  // namespace marlin
