// Packed products of a few rows, in vectors of 512 bits.
#pragma once
#include "marlin_gemm.hpp"

namespace marlin {

// All targets, and true; false where this machine, this format or so many rows are for other kernels.
bool multiply_lines(Kind kind, Targets targets, const float* x, int64_t rows);

}  // namespace marlin
