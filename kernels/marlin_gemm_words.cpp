// marlin_gemm in fixed point by products of words: out[M, N] = x[M, K] @ W[N, K]^T in float32, for int8 on x86 without VNNI.
//
// Two digits of fourteen bits, whose products with whole weights fit two a dword. A packed line of bytes is taken a byte of each word at
// a time, so that a shift or a mask is all there is between memory and multiplication.
#include "marlin_gemm_fixed.hpp"

#include "fixed_point.hpp"
#include "packed_lines.hpp"
#include "whole_weights.hpp"

#if MARLIN_PAIRS_OF_BYTES
namespace marlin {

namespace {

constexpr int DIGIT = 14;  // bits

// Weights are the bytes number `part` of a register of packed words, times the scale of their GROUP. Biases meet the sums of x over each.
template <int64_t GROUP_SIZE>
struct Int8 {
  static constexpr int64_t GROUP = GROUP_SIZE;
  static Vector scales(const Packed& row, int64_t group, int64_t count) { return load_some(row.scales + group, count); }
  template <int PART>
  static __attribute__((always_inline)) RegisterWords part(RegisterWords packed) {
    return PART ? packed >> 8 : packed & 255;
  }
};

template <class Format>
struct Way {
#if MARLIN_AVX512
  static constexpr int COLUMNS = 4, ROWS = 2;
#else
  static constexpr int COLUMNS = 2, ROWS = 2;  // as many sums as there are registers
#endif
  static constexpr int64_t WEIGHTS = REGISTER, PARTS = 2, BITS = 28;                            // of a line, of a word, of x
  static constexpr int64_t LANES_OF_GROUP = Format::GROUP / (WEIGHTS / DWORDS);                 // of one line, or of several
  static constexpr int64_t SPAN = std::max<int64_t>(1, LANES_OF_GROUP / DWORDS);                // lines under one scale
  static constexpr int64_t LINES_OF_SCALES = LANES * Format::GROUP / WEIGHTS;                   // that sixteen scales serve
  static constexpr int64_t UNITS_OF_LINE = LANES_OF_GROUP < DWORDS ? DWORDS / LANES_OF_GROUP : 1;  // groups, or a part of one

  // Rows of x by lines: [rows, lines, parts, two digits, words]; what 2^14 is worth, by groups; and the sums of groups.
  struct Laid {
    AlignedBytes words;
    std::vector<float> units, sums;
    int64_t lines = 0, groups = 0;

    void resize(const Matrix& w, int64_t rows) {
      lines = (w.row_bytes + REGISTER - 1) / REGISTER;
      groups = lines * UNITS_OF_LINE / SPAN;
      words.of(rows * lines * PARTS * 2 * REGISTER);
      units.resize(std::max<size_t>(units.size(), rows * groups));
      sums.resize(std::max<size_t>(sums.size(), rows * w.groups()));
    }
    int16_t* row(int64_t m) { return reinterpret_cast<int16_t*>(words.data()) + m * lines * PARTS * REGISTER; }
    const uint8_t* row(int64_t m) const { return words.data() + m * lines * PARTS * 2 * REGISTER; }
  };

  static bool lay_out(const float* x, const Matrix& w, Laid& laid, int64_t m) {
    constexpr int64_t GROUP = Format::GROUP, WORDS = REGISTER / 2;
    const int64_t groups = w.groups();
    int16_t* to = laid.row(m);
    float* units = laid.units.data() + m * laid.groups;
    bool fitting = true;
    alignas(64) int16_t digits[2][std::max(WEIGHTS, GROUP)];  // in the order of the depth
    for (int64_t k = 0; k < laid.lines * WEIGHTS; k += std::max(WEIGHTS, GROUP)) {
      for (int64_t inside = 0; inside < std::max(WEIGHTS, GROUP); inside += GROUP) {
        const int64_t group = (k + inside) / GROUP;
        const int32_t exponent = group < groups ? exponent_of(x, group) : fixed::LEAST_EXPONENT;
        const bool there = group < groups && fixed::fits(exponent);
        fitting &= group >= groups || there;
        const float factor = there ? fixed::to_whole<BITS>(exponent) : 0.0f;
        if (group < laid.groups) units[group] = there ? fixed::worth<BITS, DIGIT>(exponent) : 0.0f;
        for (int64_t v = 0; v < GROUP; v += LANES) {
          const Integers whole = there ? nearest<Integers>(load(x + group * GROUP + v) * factor) : Integers{};
          const Integers upper = (whole + (1 << (DIGIT - 1))) >> DIGIT;
          store_words(upper, digits[0] + inside + v);
          store_words(whole - (upper << DIGIT), digits[1] + inside + v);
        }
      }
      for (int64_t line = 0; line < std::max(WEIGHTS, GROUP) / WEIGHTS && k / WEIGHTS + line < laid.lines; line++)
        for (int64_t part = 0; part < PARTS; part++)
          for (int64_t digit = 0; digit < 2; digit++, to += WORDS)
            for (int64_t n = 0; n < WORDS; n++) to[n] = digits[digit][line * WEIGHTS + n * PARTS + part];
    }
    fixed::sum_groups<GROUP>(x, groups, laid.sums.data() + m * groups);
    return fitting;
  }

  static int32_t exponent_of(const float* x, int64_t group) { return fixed::exponent_of<Format::GROUP>(x + group * Format::GROUP); }

  template <int ROWS, int TOGETHER>
  static void together(const Matrix& w, const Laid& laid, int64_t m0, float* out, int64_t n0, int64_t there, int64_t groups, int64_t ahead) {
    const int64_t whole_lines = w.row_bytes / REGISTER;
    Packed rows[TOGETHER];
    rows_of<TOGETHER>(w, n0, there, groups, rows);
    const uint8_t* x[ROWS];
    const float* units[ROWS];
    for (int m = 0; m < ROWS; m++) x[m] = laid.row(m0 + m), units[m] = laid.units.data() + (m0 + m) * laid.groups;
    RegisterFloats sums[TOGETHER][ROWS] = {};
    float scales[TOGETHER][ROWS][LANES + DWORDS];  // times what 2^14 is worth; and what a register reads beyond
    // SPAN lines from `line` on, whose scales begin at `place` of those at hand.
    const auto step = [&](int64_t line, int64_t place, auto all) __attribute__((always_inline)) {
      RegisterIntegers upper[TOGETHER][ROWS] = {}, lower[TOGETHER][ROWS] = {};
      for (int64_t span = 0; span < SPAN; span++) {
        RegisterWords packed[TOGETHER];
#pragma GCC unroll 4
        for (int n = 0; n < TOGETHER; n++) {
          const uint8_t* from = rows[n].weight + (line + span) * REGISTER;
          __builtin_prefetch(from + ahead);
          if constexpr (all) {
            packed[n] = load_as<RegisterWords>(from);
          } else {
            uint8_t bytes[REGISTER] = {};
            std::memcpy(bytes, from, w.row_bytes - line * REGISTER);
            packed[n] = load_as<RegisterWords>(bytes);
          }
        }
        const auto add = [&]<int PART>(std::integral_constant<int, PART>) __attribute__((always_inline)) {
          RegisterWords weights[TOGETHER];
#pragma GCC unroll 4
          for (int n = 0; n < TOGETHER; n++) weights[n] = Format::template part<PART>(packed[n]);
#pragma GCC unroll 2
          for (int m = 0; m < ROWS; m++) {
            const uint8_t* digits = x[m] + ((line + span) * PARTS + PART) * 2 * REGISTER;
            const auto high = load_as<RegisterWords>(digits), low = load_as<RegisterWords>(digits + REGISTER);
#pragma GCC unroll 4
            for (int n = 0; n < TOGETHER; n++) {
              upper[n][m] = add_pairs(upper[n][m], weights[n], high);
              lower[n][m] = add_pairs(lower[n][m], weights[n], low);
            }
          }
        };
        add(std::integral_constant<int, 0>{});
        add(std::integral_constant<int, 1>{});
      }
#pragma GCC unroll 2
      for (int m = 0; m < ROWS; m++) {
#pragma GCC unroll 4
        for (int n = 0; n < TOGETHER; n++) {
          const float* own = scales[n][m] + place;
          const RegisterFloats scale = UNITS_OF_LINE > 1 ? spread<std::min(LANES_OF_GROUP, DWORDS)>(own) : splat_as<RegisterFloats>(*own);
          const RegisterFloats both = converted<RegisterFloats>(upper[n][m]) + converted<RegisterFloats>(lower[n][m]) * (1.0f / (1 << DIGIT));
          sums[n][m] += both * scale;
        }
      }
    };
    for (int64_t first = 0; first < laid.lines; first += LINES_OF_SCALES) {
      const int64_t group = first * WEIGHTS / Format::GROUP, last = std::min(first + LINES_OF_SCALES, whole_lines);
#pragma GCC unroll 4
      for (int n = 0; n < TOGETHER; n++) {
        const Vector own = Format::scales(rows[n], group, groups - group);
        for (int m = 0; m < ROWS; m++) store(own * load_some(units[m] + group, groups - group), scales[n][m]);
      }
      int64_t line = first, place = 0;
      for (; line < last; line += SPAN, place += UNITS_OF_LINE) step(line, place, std::true_type{});
      if constexpr (SPAN == 1)
        if (line < laid.lines && line < first + LINES_OF_SCALES) step(line, place, std::false_type{});
    }
    for (int n = 0; n < TOGETHER && n < there; n++) {
      for (int m = 0; m < ROWS; m++) {
        Vector biases{};
        for (int64_t g = 0; g < groups; g += LANES)
          biases += load_some(rows[n].biases + g, groups - g) * load_some(laid.sums.data() + (m0 + m) * groups + g, groups - g);
        out[(m0 + m) * w.columns + n0 + n] = sum(sums[n][m] + fixed::folded(biases));
      }
    }
  }
};

template <int64_t GROUP_SIZE>
using WayOfInt8 = Way<Int8<GROUP_SIZE>>;

}  // namespace

bool multiply_words(Targets targets, const float* x, int64_t rows, fixed::Alone alone) {
  return fixed::by_group_size<WayOfInt8>(targets[0].w.group_size,
                                         [&](auto way) { fixed::multiply<decltype(way)>(Kind::int8, targets, x, rows, alone); });
}

}  // namespace marlin
#endif
