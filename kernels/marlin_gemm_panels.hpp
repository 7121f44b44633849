// Packed products of many rows of x.
#pragma once
#include "marlin_gemm.hpp"

namespace marlin {

// All targets, and true; false where this machine has other kernels.
bool multiply_panels(Kind kind, Targets targets, const float* x, int64_t rows);

}  // namespace marlin
