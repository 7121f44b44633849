// Packed products of up to four rows of x with mxfp8.
#pragma once
#include "marlin_gemm.hpp"

namespace marlin {

void multiply_e4m3(Targets targets, const float* x, int64_t rows);

}  // namespace marlin
