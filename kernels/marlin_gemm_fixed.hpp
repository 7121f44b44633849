// Packed products of one row of x as whole numbers.
#pragma once
#include "marlin_gemm.hpp"

namespace marlin {

// All targets, and true; false where this machine, this format, so many rows or values of unusual size are for other kernels.
bool multiply_fixed(Kind kind, Targets targets, const float* x, int64_t rows);

}  // namespace marlin
