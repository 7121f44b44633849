// The packed product with activations rounded to 8 bits, on plain memory.
#pragma once
#include <vector>

#include "marlin_gemm.hpp"

namespace marlin {

// Whether the weights of a format are whole numbers under a scale, as the products of this file need them. E4M3 is not.
inline bool has_whole_weights(Kind kind) { return kind != Kind::mxfp8; }

// All targets with rounded(x), where `rounded` takes each 32 values of a row to multiples of a 127th of the largest of them. The sums
// of a block are exact. Lines: lanes lie along the depth, and weights are unpacked for each three rows. Columns: lanes are columns.
void multiply_rounded_lines(Kind kind, Targets targets, const float* x, int64_t rows);
void multiply_rounded_columns(Kind kind, Targets targets, const float* x, int64_t rows);

// rounded(x) as floats, [rows, depth], for products of floats.
void round_to_8_bits(const float* x, int64_t rows, int64_t depth, std::vector<float>& to);

}  // namespace marlin
