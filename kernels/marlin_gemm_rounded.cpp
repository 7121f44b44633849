// marlin_gemm with activations of 8 bits: each 32 values of a row of x become whole numbers under a scale of their own, so that
// their products with the codes of weights are sums of whole numbers, four a lane and instruction where the processor has it.
//
// Few rows, three at a time: the bytes of a packed row are taken as they lie; a lane adds up neighbours. More rows: tiles of
// columns are unpacked into bytes, one column a lane, and all rows of x pass over them. Both give the same bits: whole sums of a unit are
// exact in any order, and what they are worth is added up in one order, as CLASSES sums over each CLASSES-th unit and then their sum.
#include "marlin_gemm_rounded.hpp"

#include <bit>
#include <cmath>
#include <stdexcept>
#include <type_traits>

#include "packed_lines.hpp"
#include "targets.hpp"
#include "whole_weights.hpp"

namespace marlin {

namespace {

constexpr int64_t BLOCK = 32;  // values of x under one scale
constexpr int64_t CLASSES = DWORDS;

// A dword of x for every lane.
inline Bytes four_of(const int8_t* from) {
  int32_t four;
  std::memcpy(&four, from, sizeof(four));
  return bits_as<Bytes>(Integers{} + four);
}

// Each format: UNIT, weights whose whole sums are scaled together; their scales, of sixteen units of a row and of one unit of sixteen
// columns, times FACTOR.
struct Nvfp4 : WholeFloat4 {
  static constexpr int64_t UNIT = 16;
  static constexpr float FACTOR = 0.5f / E4M3_FACTOR;
  explicit Nvfp4(const Matrix&) {}

  static Vector of_units(const Packed& row, int64_t unit, int64_t count) { return e4m3_of_groups(row, unit, count); }
  static Vector of_columns(Integers codes, int part) { return e4m3_of(codes, part); }
};

struct Mxfp4 : WholeFloat4 {
  static constexpr int64_t UNIT = 32;
  static constexpr float FACTOR = 0.5f;
  explicit Mxfp4(const Matrix&) {}

  static Vector of_units(const Packed& row, int64_t unit, int64_t count) { return e8m0_of_groups(row, unit, count); }
  static Vector of_columns(Integers codes, int part) { return e8m0_of(codes, part); }
};

// Groups of any number of units. What the biases add comes from the sums of x over each group.
template <class Codes>
struct Affine : Codes {
  static constexpr int64_t UNIT = 32;
  explicit Affine(const Matrix& w) : units_of_group(w.group_size / UNIT) {
    for (int lane = 0; lane < LANES; lane++) spread[lane] = int32_t(lane / units_of_group);
  }

  Vector of_units(const Packed& row, int64_t unit, int64_t count) const {
    if (units_of_group == 1) return load_some(row.scales + unit, count);
    const float* from = row.scales + unit / units_of_group;
    const int64_t groups = (std::min<int64_t>(count, LANES) + units_of_group - 1) / units_of_group;
#if MARLIN_AVX512
    return Vector(_mm512_permutexvar_ps(__m512i(spread), __m512(load_some(from, groups))));
#elif MARLIN_AVX2
    const __m256 some = _mm256_maskload_ps(from, first_lanes(groups));
    return {_mm256_permutevar8x32_ps(some, __m256i(spread.low)), _mm256_permutevar8x32_ps(some, __m256i(spread.high))};
#else
    Vector scales{};
    for (int lane = 0; lane < LANES; lane++) scales[lane] = spread[lane] < groups ? from[spread[lane]] : 0.0f;
    return scales;
#endif
  }

  int64_t units_of_group;
  Integers spread;
};

using Int4 = Affine<WholeInt4>;
using Int8 = Affine<WholeInt8>;

// Thirty-two bytes, each eight of them as four even ones and four odd ones: so do nibbles come apart.
inline void even_then_odd(int8_t* bytes) {
  typedef int8_t Codes __attribute__((vector_size(32)));
  Codes codes, ordered;
  std::memcpy(&codes, bytes, sizeof(codes));
#if MARLIN_SHUFFLES
  ordered = __builtin_shufflevector(codes, codes, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15, 16, 18, 20, 22, 17, 19, 21,
                                    23, 24, 26, 28, 30, 25, 27, 29, 31);
#else
  for (int k = 0; k < 32; k++) ordered[k] = codes[k / 8 * 8 + k % 4 * 2 + k % 8 / 4];
#endif
  std::memcpy(bytes, &ordered, sizeof(ordered));
}

// Rows of x as whole numbers. Memory stays with the thread for its next product.
struct Rounded {
  int64_t units = 0;             // of a row: as many as there are, and to whole vectors of them
  std::vector<int8_t> codes;     // of rows and units, in the order in which packed weights meet them
  std::vector<float> scales;     // [rows, units], times FACTOR
  std::vector<int32_t> starts;   // [rows, units]: what takes the offset of the weights back
  std::vector<float> group_sums; // [rows, groups]: of what the numbers stand for, for biases
};

// One block: codes of x[0 .. count), the scale, and the sums of both halves where `sums` is given.
inline void round_block(const float* x, int64_t count, int8_t* codes, float* scale, int32_t* sums) {
  constexpr float TINY = 0x1p-120f;  // below, a scale's inverse would overflow: zeros
  const Vector parts[2] = {load_some(x, count), count > LANES ? load_some(x + LANES, count - LANES) : Vector{}};
  // As whole numbers magnitudes are in the same order, with infinities and NaN above all: they become the scale.
  const Integers magnitudes[2] = {bits_as<Integers>(parts[0]) & 0x7fffffff, bits_as<Integers>(parts[1]) & 0x7fffffff};
  const Integers larger = chosen(magnitudes[0] > magnitudes[1], magnitudes[0], magnitudes[1]);
  const int32_t bits = marlin::largest(larger);
  float largest;
  std::memcpy(&largest, &bits, sizeof(largest));
  const float inverse = largest >= TINY ? 127.0f / largest : 0.0f;
  *scale = largest >= TINY || largest != largest ? largest / 127.0f : 0.0f;
  for (int part = 0; part < 2; part++) {
    const Integers whole = nearest<Integers>(parts[part] * inverse);
    int32_t lanes[LANES];
    store_as(whole, lanes);
    for (int lane = 0; lane < LANES; lane++) codes[LANES * part + lane] = int8_t(lanes[lane]);
    if (sums) sums[part] = int32_t(sum(converted<Vector>(whole)));
  }
}

// Each row of x. Units BY_CLASS: those of a class side by side, [class, unit, UNIT]. Else as packed lines meet them, [line, halves of a byte, REGISTER].
template <class Format, bool BY_CLASS>
void round_rows(const float* x, int64_t rows, const Matrix& w, Rounded& rounded) {
  constexpr int64_t UNIT = Format::UNIT, WORK_OF_A_VALUE = 8;
  const int64_t depth = w.depth, there = (depth + BLOCK - 1) / BLOCK * BLOCK / UNIT, units = rounded.units = (there + LANES - 1) / LANES * LANES;
  const auto grow = [](auto& memory, int64_t count) {
    if (int64_t(memory.size()) < count) memory.resize(count);
  };
  grow(rounded.codes, rows * units * UNIT);
  grow(rounded.scales, rows * units);
  if (Format::OFFSET != 0) grow(rounded.starts, rows * units);
  const int64_t groups = w.groups(), blocks_of_group = std::max<int64_t>(1, w.group_size / BLOCK);
  if (Format::affine) grow(rounded.group_sums, rows * groups);
  over_threads(rows, depth * WORK_OF_A_VALUE, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; m++) {
      const auto put = [&](int64_t unit, const int8_t* codes, float scale, int32_t sum) {
        const int64_t place = m * units + (BY_CLASS ? unit % CLASSES * (units / CLASSES) + unit / CLASSES : unit);
        if constexpr (BY_CLASS) {
          std::memcpy(rounded.codes.data() + place * UNIT, codes, UNIT);
        } else {
          constexpr int64_t HALVES = Format::nibbles ? 2 : 1;
          for (int64_t dword = 0; dword < UNIT / 4; dword++) {
            const int64_t lane = (place * UNIT / 4 + dword) / HALVES, half = dword % HALVES;
            std::memcpy(rounded.codes.data() + (lane / DWORDS * HALVES + half) * REGISTER + lane % DWORDS * 4, codes + 4 * dword, 4);
          }
        }
        rounded.scales[place] = scale;
        if (Format::OFFSET != 0) rounded.starts[place] = sum * -Format::OFFSET;
      };
      float group_sum = 0.0f;
      for (int64_t block = 0; block * BLOCK < depth; block++) {
        int8_t codes[BLOCK];
        float scale;
        int32_t sums[2];
        round_block(x + m * depth + block * BLOCK, depth - block * BLOCK, codes, &scale, Format::affine || Format::OFFSET != 0 ? sums : nullptr);
        if (Format::nibbles) even_then_odd(codes);
        if constexpr (UNIT == BLOCK) {
          put(block, codes, scale * Format::FACTOR, sums[0] + sums[1]);
        } else {
          for (int half = 0; half < 2; half++) put(2 * block + half, codes + half * UNIT, scale * Format::FACTOR, sums[half]);
        }
        if constexpr (Format::affine) {
          group_sum += scale * float(sums[0] + sums[1]);
          if ((block + 1) % blocks_of_group == 0) rounded.group_sums[m * groups + block / blocks_of_group] = std::exchange(group_sum, 0.0f);
        }
      }
      const int8_t zeros[UNIT] = {};
      for (int64_t unit = there; unit < units; unit++) put(unit, zeros, 0.0f, 0);
    }
  });
}

// ---- few rows: lanes along the depth

// Neighbours of two registers added up, for the `level`-th time: in the end a lane is a unit, in an order that `in_order` mends.
inline __attribute__((always_inline)) RegisterIntegers neighbours([[maybe_unused]] int level, RegisterIntegers first, RegisterIntegers second) {
#if MARLIN_AVX512
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30), odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
  const auto lanes = [&](__m512i places) { return RegisterIntegers(_mm512_permutex2var_epi32(__m512i(first), places, __m512i(second))); };
  return lanes(even) + lanes(odd);
#elif MARLIN_AVX2
  // Twice within the halves of a register, and then those.
  const __m256i a = __m256i(first), b = __m256i(second);
  if (level < 2) return RegisterIntegers(_mm256_hadd_epi32(a, b));
  return RegisterIntegers(_mm256_permute2x128_si256(a, b, 0x20)) + RegisterIntegers(_mm256_permute2x128_si256(a, b, 0x31));
#else
  RegisterIntegers sums;
  for (int64_t lane = 0; lane < DWORDS / 2; lane++) {
    sums[lane] = first[2 * lane] + first[2 * lane + 1];
    sums[DWORDS / 2 + lane] = second[2 * lane] + second[2 * lane + 1];
  }
  return sums;
#endif
}

template <int LEVELS>
inline __attribute__((always_inline)) RegisterIntegers in_order(RegisterIntegers units) {
#if MARLIN_AVX2
  if constexpr (LEVELS == 1) return RegisterIntegers(_mm256_permute4x64_epi64(__m256i(units), 0xd8));
  if constexpr (LEVELS == 2) return RegisterIntegers(_mm256_permutevar8x32_epi32(__m256i(units), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
#endif
  return units;
}

// Part of a vector, as a register.
inline __attribute__((always_inline)) RegisterFloats register_of(const auto& values, int64_t part) {
  if constexpr (IS_PAIR<std::remove_cvref_t<decltype(values)>>) {
    constexpr int64_t OF_A_HALF = sizeof(values.low) / REGISTER;
    return part < OF_A_HALF ? register_of(values.low, part) : register_of(values.high, part - OF_A_HALF);
  } else {
    return values;
  }
}

template <class Format, int ROWS, int TOGETHER>
inline void together(const Format& format, const Matrix& w, const Rounded& rounded, int64_t m0, float* out, int64_t n0, int64_t there,
                     int64_t groups, int64_t ahead) {
  constexpr int64_t HALVES = Format::nibbles ? 2 : 1, LINES = Format::UNIT / (4 * HALVES);  // that have a register of units
  constexpr int LEVELS = std::countr_zero(uint64_t(LINES));
  const int64_t units = rounded.units, stride = units * Format::UNIT, units_there = w.depth / Format::UNIT;
  const auto* x = reinterpret_cast<const uint8_t*>(rounded.codes.data()) + m0 * stride;
  Packed rows[TOGETHER];
  rows_of<TOGETHER>(w, n0, there, groups, rows);
  RegisterFloats sums[TOGETHER][ROWS] = {};
  // Whole sums of a register of units of a row of weights, from this line on: what two lines have is joined as soon as both are there.
  const auto units_of = [&](const uint8_t* weight, int64_t line, auto all, RegisterIntegers* totals) __attribute__((always_inline)) {
    RegisterIntegers waiting[LEVELS + 1][ROWS];
    const auto add = [&](int64_t own_line, int number) __attribute__((always_inline)) {
      const uint8_t* from = weight + own_line * REGISTER;
      const int64_t left = w.row_bytes - own_line * REGISTER;
      if (all) __builtin_prefetch(from + ahead);
      const RegisterBytes packed = all ? load_as<RegisterBytes>(from) : load_first(from, left);
      const Whole<RegisterBytes> weights = unpack<Format>(packed);
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; m++) {
        const uint8_t* codes = x + m * stride + own_line * HALVES * REGISTER;
        RegisterIntegers total{};
        if (!all && left <= 0) {  // behind the row
        } else if constexpr (Format::nibbles) {
          const RegisterBytes own[2] = {load_as<RegisterBytes>(codes), load_as<RegisterBytes>(codes + REGISTER)}, both[2] = {weights.first, weights.second};
          total = dot_of_two(total, both, own);
        } else {
          total = dot<false>(total, weights.first, load_as<RegisterBytes>(codes));
        }
        int level = 0;
#pragma GCC unroll 4
        for (; number >> level & 1; level++) total = neighbours(level, waiting[level][m], total);
        waiting[level][m] = total;
      }
    };
    [&]<int... NUMBERS>(std::integer_sequence<int, NUMBERS...>) __attribute__((always_inline)) {
      (add(line + NUMBERS, NUMBERS), ...);
    }(std::make_integer_sequence<int, LINES>{});
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; m++) totals[m] = in_order<LEVELS>(waiting[LEVELS][m]);
  };
  // Sixteen units from `unit` on.
  const auto step = [&](int64_t unit, auto all) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int n = 0; n < TOGETHER; n++) {
      const Vector scales = format.of_units(rows[n], unit, all ? LANES : units_there - unit);
#pragma GCC unroll 4
      for (int64_t part = 0; part < LANES / DWORDS; part++) {
        const int64_t first = unit + part * DWORDS;
        if (!all && first >= units_there) break;
        RegisterIntegers totals[ROWS];
        if (all || first + DWORDS <= units_there) {
          units_of(rows[n].weight, first / DWORDS * LINES, std::true_type{}, totals);
        } else {
          units_of(rows[n].weight, first / DWORDS * LINES, std::false_type{}, totals);
        }
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; m++) {
          const int64_t place = (m0 + m) * units + first;
          if constexpr (Format::OFFSET != 0) totals[m] += load_as<RegisterIntegers>(rounded.starts.data() + place);
          sums[n][m] += converted<RegisterFloats>(totals[m]) * (register_of(scales, part) * load_as<RegisterFloats>(rounded.scales.data() + place));
        }
      }
    }
  };
  int64_t unit = 0;
  for (; unit + LANES <= units_there; unit += LANES) step(unit, std::true_type{});
  if (unit < units) step(unit, std::false_type{});
#pragma GCC unroll 4
  for (int n = 0; n < TOGETHER; n++) {
    if (n >= there) break;
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; m++) {
      if constexpr (Format::affine) {
        for (int64_t g = 0; g < groups; g += LANES) {
          const Vector biases = load_some(rows[n].biases + g, groups - g), of_x = load_some(rounded.group_sums.data() + (m0 + m) * groups + g, groups - g);
#pragma GCC unroll 4
          for (int64_t part = 0; part < LANES / DWORDS; part++) sums[n][m] += register_of(biases, part) * register_of(of_x, part);
        }
      }
      out[(m0 + m) * w.columns + n0 + n] = sum(sums[n][m]);
    }
  }
}

// Three rows at a time, of as many columns as the second cache holds: weights come from memory once.
template <class Format>
void few_rows(Targets targets, const float* x, int64_t rows) {
  constexpr int64_t MOST_ROWS = 3, BYTES_IN_CACHE = 1 << 17, WHOLE_TURNS = 4;
  thread_local Rounded kept_rounded;
  Rounded& rounded = kept_rounded;
  const Matrix& any = targets[0].w;
  round_rows<Format, false>(x, rows, any, rounded);
  const Format format(any);
  const int64_t groups = any.groups(), parts = (rows + MOST_ROWS - 1) / MOST_ROWS, ahead = any.bytes_ahead(WHOLE_TURNS);
  over_columns(targets, 1, rows * any.depth, [&](const Target& target, int64_t first, int64_t last) {
    const int64_t at_once = parts == 1 ? last - first : std::max(WHOLE_TURNS, BYTES_IN_CACHE / any.row_bytes / WHOLE_TURNS * WHOLE_TURNS);
    for (int64_t start = first; start < last; start += at_once) {
      for (int64_t part = 0; part < parts; part++) {
        const int64_t m = rows * part / parts;
        for_few_rows<MOST_ROWS>(rows * (part + 1) / parts - m, [&](auto own) {
#if MARLIN_AVX512
          constexpr int TOGETHER = own == 1 ? 4 : 2;
#else
          constexpr int TOGETHER = 2;  // as many unpacked weights as sixteen registers have room for
#endif
          by_columns<TOGETHER>(start, std::min(last, start + at_once), [&](int64_t n, int64_t there) {
            together<Format, own, TOGETHER>(format, target.w, rounded, m, target.out, n, there, groups, ahead);
          });
        });
      }
    }
    finish(target, 0, rows, first, last - first);
  });
}

// ---- more rows: lanes are columns

#if MARLIN_AVX512
constexpr int WIDE = 2;          // vectors of columns in a tile
constexpr int ROWS_AT_ONCE = 6;  // of x: twelve sums of floats and twelve of whole numbers fit 32 registers
constexpr int FEWEST_ROWS = 3;   // of such a part, where parts are as equal as can be
#else
constexpr int WIDE = 1, ROWS_AT_ONCE = 4;  // whole numbers in eight registers of 16; the floats' sums wait in the first cache
constexpr int FEWEST_ROWS = 2;
#endif
constexpr int64_t TILE = WIDE * LANES;

// All of a tile's columns: four weights of each column a vector, scales of units and biases of groups, those of a class side by side. The
// second cache holds it.
template <class Format>
class Panel {
 public:
  static constexpr int64_t STEPS = Format::UNIT / 4;
  using Tile = Vector[WIDE];

  Panel(const Matrix& w, int64_t units) : of_class(units / CLASSES), groups_of_class((w.groups() + CLASSES - 1) / CLASSES) {
    thread_local AlignedBytes kept;
    uint8_t* memory = kept.of(units * (STEPS * sizeof(Bytes[WIDE]) + sizeof(Tile)) + groups_of_class * CLASSES * sizeof(Tile));
    weights = reinterpret_cast<Bytes(*)[WIDE]>(memory);
    scales = reinterpret_cast<Tile*>(memory + units * STEPS * sizeof(Bytes[WIDE]));
    biases = scales + units;
  }

  int64_t of_class, groups_of_class;
  Bytes (*weights)[WIDE];  // [units, STEPS]
  Tile *scales, *biases;

  void unpack(const Matrix& w, int64_t column) {
    constexpr int64_t DWORDS_OF_UNIT = Format::UNIT * (Format::nibbles ? 4 : 8) / 32;
    const int64_t units = w.depth / Format::UNIT;
    for (int c = 0; c < WIDE; c++) {
      const Columns columns(w, column + c * LANES);
      for (int64_t first = 0; first < units; first += LANES / DWORDS_OF_UNIT) {
        Integers dwords[LANES];
        columns.line(first * DWORDS_OF_UNIT * 4, dwords);
        for (int64_t j = 0; j < LANES && first + j / DWORDS_OF_UNIT < units; j++) {
          Bytes(*to)[WIDE] = weights + place(first + j / DWORDS_OF_UNIT) * STEPS + j % DWORDS_OF_UNIT * (STEPS / DWORDS_OF_UNIT);
          const Whole<Bytes> whole = marlin::unpack<Format>(bits_as<Bytes>(dwords[j]));
          to[0][c] = whole.first;
          if constexpr (Format::nibbles) to[1][c] = whole.second;
        }
      }
      if constexpr (Format::affine) {
        const int64_t units_of_group = w.group_size / Format::UNIT;
        for (int64_t group = 0; group < w.groups(); group++) {
          Vector scale;
          columns.floats(group, scale, biases[group % CLASSES * groups_of_class + group / CLASSES][c]);
          for (int64_t unit = group * units_of_group; unit < (group + 1) * units_of_group; unit++) scales[place(unit)][c] = scale;
        }
      } else {
        for (int64_t first = 0; first < units; first += 4) {
          const Integers codes = columns.four_codes(first);
          for (int part = 0; part < 4 && first + part < units; part++) scales[place(first + part)][c] = Format::of_columns(codes, part);
        }
      }
    }
  }

 private:
  int64_t place(int64_t unit) const { return unit % CLASSES * of_class + unit / CLASSES; }
};

// The sum of each class, in the order in which `sum` adds up the lanes of a register.
template <int ROWS>
inline void add_classes(Vector (*sums)[ROWS][WIDE]) {
#if MARLIN_AVX512 || MARLIN_AVX2
  for (int64_t half = CLASSES / 2; half > 0; half /= 2)
    for (int64_t own = 0; own < half; own++)
      for (int m = 0; m < ROWS; m++)
        for (int c = 0; c < WIDE; c++) sums[own][m][c] += sums[own + half][m][c];
#else
  for (int64_t own = 1; own < CLASSES; own++)
    for (int m = 0; m < ROWS; m++)
      for (int c = 0; c < WIDE; c++) sums[0][m][c] += sums[own][m][c];
#endif
}

// ROWS rows of x from m0 on.
template <class Format, int ROWS>
void rows_of_tile(const Panel<Format>& panel, const Rounded& x, int64_t m0, const Matrix& w, float* out, int64_t columns) {
  constexpr int64_t UNIT = Format::UNIT, STEPS = UNIT / 4;
  const int64_t units = w.depth / UNIT, groups = w.groups();
  const int8_t* all_codes = x.codes.data() + m0 * x.units * UNIT;
  const float* all_scales = x.scales.data() + m0 * x.units;
  const int32_t* all_starts = x.starts.data() + m0 * x.units;
  Vector sums[CLASSES][ROWS][WIDE];
  for (int64_t own = 0; own < CLASSES; own++) {
    Vector of_class[ROWS][WIDE] = {};
    const int64_t first = own * panel.of_class, last = first + std::max<int64_t>(0, (units - own + CLASSES - 1) / CLASSES);
    for (int64_t unit = first; unit < last; unit++) {
      Integers totals[ROWS][WIDE];
      for (int m = 0; m < ROWS; m++)
        for (int c = 0; c < WIDE; c++) totals[m][c] = Integers{} + (Format::OFFSET ? all_starts[m * x.units + unit] : 0);
      for (int64_t step = 0; step < STEPS; step++) {
        const Bytes* weights = panel.weights[unit * STEPS + step];
        const int8_t* codes = all_codes + unit * UNIT + 4 * step;
        for (int m = 0; m < ROWS; m++) {
          const Bytes four = four_of(codes + m * x.units * UNIT);
          for (int c = 0; c < WIDE; c++) totals[m][c] = dot<Format::nibbles>(totals[m][c], weights[c], four);
        }
      }
      for (int m = 0; m < ROWS; m++) {
        const Vector scale = splat(all_scales[m * x.units + unit]);
        for (int c = 0; c < WIDE; c++) of_class[m][c] += converted<Vector>(totals[m][c]) * (panel.scales[unit][c] * scale);
      }
    }
    if constexpr (Format::affine)
      for (int64_t g = own; g < groups; g += CLASSES)
        for (int m = 0; m < ROWS; m++)
          for (int c = 0; c < WIDE; c++)
            of_class[m][c] += panel.biases[own * panel.groups_of_class + g / CLASSES][c] * x.group_sums[(m0 + m) * groups + g];
    for (int m = 0; m < ROWS; m++)
      for (int c = 0; c < WIDE; c++) sums[own][m][c] = of_class[m][c];
  }
  add_classes<ROWS>(sums);
  for (int m = 0; m < ROWS; m++)
    for (int c = 0; c * LANES < columns; c++) store_some(sums[0][m][c], out + m * w.columns + c * LANES, columns - c * LANES);
}

template <class Format>
void many_rows(Targets targets, const float* x, int64_t rows) {
  const Matrix& any = targets[0].w;
  thread_local Rounded kept_rounded;
  Rounded& rounded = kept_rounded;
  round_rows<Format, true>(x, rows, any, rounded);
  const int64_t parts = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
  over_columns(targets, TILE, rows * any.depth, [&](const Target& target, int64_t first, int64_t last) {
    const Matrix& w = target.w;
    Panel<Format> panel(w, rounded.units);
    for (int64_t tile = first; tile < last; tile++) {
      const int64_t column = tile * TILE, columns = std::min(TILE, w.columns - column);
      panel.unpack(w, column);
      for (int64_t part = 0; part < parts; part++) {
        // Parts as equal as can be: a part of few rows loads as many weights as a whole one.
        const int64_t m = rows * part / parts;
        for_few_rows<ROWS_AT_ONCE, FEWEST_ROWS>(rows * (part + 1) / parts - m, [&](auto own) {
          rows_of_tile<Format, own>(panel, rounded, m, w, target.out + m * w.columns + column, columns);
        });
      }
      finish(target, 0, rows, column, columns);
    }
  });
}

// body(Format) of a kind whose weights are whole numbers.
template <class Body>
void with_format(Kind kind, const Body& body) {
  switch (kind) {
    case Kind::nvfp4: return body.template operator()<Nvfp4>();
    case Kind::mxfp4: return body.template operator()<Mxfp4>();
    case Kind::int4: return body.template operator()<Int4>();
    case Kind::int8: return body.template operator()<Int8>();
    default: throw std::invalid_argument("this format's weights are no whole numbers");
  }
}

}  // namespace

void multiply_rounded_lines(Kind kind, Targets targets, const float* x, int64_t rows) {
  with_format(kind, [&]<class Format>() { few_rows<Format>(targets, x, rows); });
}

void multiply_rounded_columns(Kind kind, Targets targets, const float* x, int64_t rows) {
  if (rows < FEWEST_ROWS) return multiply_rounded_lines(kind, targets, x, rows);
  with_format(kind, [&]<class Format>() { many_rows<Format>(targets, x, rows); });
}

void round_to_8_bits(const float* x, int64_t rows, int64_t depth, std::vector<float>& to) {
  constexpr int64_t WORK_OF_A_VALUE = 8;
  if (int64_t(to.size()) < rows * depth) to.resize(rows * depth);
  float* out = to.data();
  over_threads(rows, depth * WORK_OF_A_VALUE, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; m++) {
      for (int64_t k = 0; k < depth; k += BLOCK) {
        int8_t codes[BLOCK];
        float scale;
        const int64_t count = std::min(BLOCK, depth - k);
        round_block(x + m * depth + k, count, codes, &scale, nullptr);
        for (int64_t n = 0; n < count; n++) out[m * depth + k + n] = float(codes[n]) * scale;
      }
    }
  });
}

}  // namespace marlin
