// Packed products of floats, for any number of rows of x.
#pragma once
#include "marlin_gemm.hpp"

namespace marlin {

// Each weight decoded in registers, once for up to eight rows.
void multiply_registers(Kind kind, Targets targets, const float* x, int64_t rows);
// Weights decoded once into a buffer, for many rows.
void multiply_blocks(Kind kind, Targets targets, const float* x, int64_t rows);

}  // namespace marlin
