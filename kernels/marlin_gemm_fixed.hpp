// marlin_gemm in fixed point, see fixed_point.hpp.
#pragma once
#include "fixed_point.hpp"

namespace marlin {

// False, and nothing is done, where the format has no such product. Rows of x whose values do not fit are left to `alone`.
bool multiply_fixed(Kind kind, Targets targets, const float* x, int64_t rows, fixed::Alone alone);

// int8 in digits of a word, where bytes do not do (marlin_gemm_words.cpp).
bool multiply_words(Targets targets, const float* x, int64_t rows, fixed::Alone alone);

}  // namespace marlin
