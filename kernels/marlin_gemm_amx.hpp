// Packed products in tiles of bfloat16.
#pragma once
#include "marlin_gemm.hpp"

namespace marlin {

// All targets, where `amx::usable()`; `rounded`: x becomes bfloat16.
void multiply_amx(Kind kind, Targets targets, const float* x, int64_t rows, bool rounded);

}  // namespace marlin
