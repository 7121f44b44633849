// Packed products in tiles of bfloat16.
#pragma once
#include "marlin_gemm.hpp"

namespace marlin {

// All targets, where `amx::usable()`; with 8 activation bits x becomes bfloat16.
void multiply_amx(Kind kind, Targets targets, const float* x, int64_t rows, int activation_bits);

}  // namespace marlin
