// Which way of multiplying a product takes. Choices come from Python, measured on this machine or shipped for its class of processor.
#include "ways.hpp"

#include <array>
#include <limits>
#include <stdexcept>

#include "amx.hpp"
#include "marlin_gemm_rounded.hpp"
#include "product_tiles.hpp"
#include "threads.hpp"
#include "whole_numbers.hpp"

namespace marlin {

namespace {

constexpr std::array<const char*, 7> NAMES{"fixed", "lines", "registers", "panels", "tiles", "whole_lines", "whole_columns"};
constexpr int64_t ANY = std::numeric_limits<int64_t>::max();

// [kind, 16 or 8 bits, small or large]; until Python says otherwise one row is in fixed point and many in panels.
Choices (&table())[5][2][2] {
  static Choices choices[5][2][2];
  return choices;
}

bool is_here(Way way, Kind kind, bool rounded) {
  switch (way) {
    case Way::fixed: return kind != Kind::mxfp8;
#if MARLIN_AVX512
    case Way::lines: return kind != Kind::int8;
#else
    case Way::lines: return kind == Kind::mxfp8;
#endif
    case Way::tiles: return amx::usable();
    case Way::whole_lines:
    case Way::whole_columns: return rounded;
    default: return true;
  }
}

}  // namespace

std::vector<Way> ways_here(Kind kind, bool rounded) {
  std::vector<Way> here;
  for (int way = 0; way < int(NAMES.size()); way++)
    if (is_here(Way(way), kind, rounded)) here.push_back(Way(way));
  return here;
}

Way way_of(Kind kind, const Matrix& w, int64_t rows, bool rounded) {
  // Whole numbers give the same bits both ways.
  if (exact_rows() && !rounded) return kind == Kind::mxfp8 ? Way::lines : Way::fixed;
  for (const auto& [most, way] : table()[int(kind)][rounded][w.columns * w.depth > MOST_SMALL_WEIGHTS])
    if (rows <= most && is_here(way, kind, rounded) && (!exact_rows() || multiplies_whole_numbers(way))) return way;
  if (rounded) return rows <= 3 ? Way::whole_lines : Way::whole_columns;
  return rows == 1 && kind != Kind::mxfp8 ? Way::fixed : rows <= 4 && is_here(Way::lines, kind, rounded) ? Way::lines : rows <= 16 ? Way::registers : Way::panels;
}

std::string processor_class() {
#if MARLIN_AVX512
  if (amx::usable()) return "amx";
#if MARLIN_VNNI
  return "avx512_vnni";
#else
  return "avx512";
#endif
#elif MARLIN_AVX2
  return "avx2";
#elif MARLIN_NEON
  return "neon";
#else
  return "portable";
#endif
}

std::vector<std::string> way_names(Kind kind, int activation_bits) {
  std::vector<std::string> names;
  for (Way way : ways_here(kind, activation_bits == 8 && has_whole_weights(kind))) names.push_back(NAMES[int(way)]);
  return names;
}

std::string chosen_way(Kind kind, int64_t columns, int64_t depth, int64_t group_size, int64_t rows, int activation_bits) {
  Matrix w{};
  w.columns = columns, w.depth = depth, w.group_size = group_size;
  return NAMES[int(way_of(kind, w, rows, activation_bits == 8 && has_whole_weights(kind)))];
}

void set_ways(Kind kind, int activation_bits, bool large, const std::vector<std::pair<int64_t, std::string>>& choices) {
  Choices own;
  for (const auto& [most, name] : choices) {
    const auto found = std::find(NAMES.begin(), NAMES.end(), name);
    if (found == NAMES.end()) throw std::invalid_argument("no way of multiplying is called " + name);
    own.emplace_back(most > 0 ? most : ANY, Way(found - NAMES.begin()));
  }
  table()[int(kind)][activation_bits == 8 && has_whole_weights(kind)][large] = std::move(own);
}

}  // namespace marlin
