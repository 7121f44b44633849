// The ways of multiplying packed weights, and which one a product takes: a table by format, activation bits, size and rows.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "marlin_gemm.hpp"

namespace marlin {

enum class Way {
  fixed,      // whole numbers out of x, digits of it exactly: rows two at a time
  lines,      // up to four rows at a time: sums of a packed line before its scales
  registers,  // decoded in registers for up to eight rows at a time
  panels,     // decoded once, into the panels of a dense product
  tiles,      // bfloat16 in tiles (AMX)
  whole_lines,    // x rounded to 8 bits; up to three rows at a time, lanes along the depth
  whole_columns,  // x rounded to 8 bits; lanes are columns
};

// With x rounded to 8 bits the last two ways multiply whole numbers; the others take what the numbers stand for.
constexpr bool multiplies_whole_numbers(Way way) { return way == Way::whole_lines || way == Way::whole_columns; }

// Up to so many rows, this way.
using Choices = std::vector<std::pair<int64_t, Way>>;

// Matrices of more weights are `large`: the second cache does not hold them.
constexpr int64_t MOST_SMALL_WEIGHTS = 1 << 20;

// The way of a product. Where rows have to be exact it is the same for any number of them.
Way way_of(Kind kind, const Matrix& w, int64_t rows, bool rounded);

// What this processor has for a format, the fastest of one row first.
std::vector<Way> ways_here(Kind kind, bool rounded);

// For bindings: names instead of numbers. `processor_class` names the row of shipped choices that this build takes.
std::string processor_class();
std::vector<std::string> way_names(Kind kind, int activation_bits);
std::string chosen_way(Kind kind, int64_t columns, int64_t depth, int64_t group_size, int64_t rows, int activation_bits);
void set_ways(Kind kind, int activation_bits, bool large, const std::vector<std::pair<int64_t, std::string>>& choices);

}  // namespace marlin
