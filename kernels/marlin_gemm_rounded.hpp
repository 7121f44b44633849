// The packed product with activations rounded to 8 bits, on plain memory.
#pragma once
#include "marlin_gemm.hpp"

namespace marlin {

// Whether the weights of a format are whole numbers under a scale, as the products of this file need them. E4M3 is not.
inline bool has_whole_weights(Kind kind) { return kind != Kind::mxfp8; }

// All targets with rounded(x), where `rounded` takes each 32 values of a row to multiples of a 127th of the largest of them. The sums
// of a block are exact.
void multiply_rounded(Kind kind, Targets targets, const float* x, int64_t rows);

}  // namespace marlin
