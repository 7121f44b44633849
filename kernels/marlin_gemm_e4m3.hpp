// Packed products of mxfp8 by lines.
#pragma once
#include "marlin_gemm.hpp"

namespace marlin {

// Any number of rows of x, each of which comes out the same whichever others are beside it.
void multiply_e4m3(Targets targets, const float* x, int64_t rows);

}  // namespace marlin
