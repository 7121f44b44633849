// Products in fixed point, whose sums of whole numbers are exact: what all ways of multiplying them share.
//
// A group of x becomes whole numbers under a power of two, and these a few signed digits. Codes of weights stand for small whole numbers
// (all but mxfp8's), so that digits and weights add up exactly, in any order; sums of a lane are scaled and added up in the order of the
// depth. So a row comes out the same whichever rows are beside it.
#pragma once
#include <bit>
#include <cmath>
#include <vector>

#include "targets.hpp"
#include "whole_numbers.hpp"

namespace marlin::fixed {

// Largest values of a group between 2^-96 and 2^64, which leave room for scales on either side.
constexpr int32_t LEAST_EXPONENT = 127 - 96, MOST_EXPONENT = 127 + 63;

// How large the values of a row are, most of them: the mean of their exponents, which a few large ones hardly move.
struct Sizes {
  Integers exponents{}, counts{};

  void add(const Integers& magnitudes) {
    const Integers own = magnitudes >> 23;
    exponents += own;
    counts += chosen(own > 0, Integers{} + 1, Integers{});
  }

  // Whether whole numbers of these groups' units are so fine that rounding errs by less than 2^-15 of such a value, RMS. Beside values a
  // hundred times larger in many groups, or a thousand times in one, they are not.
  bool are_kept(const float* units, int64_t groups, float factor) const {
    constexpr float COARSEST = 0x1p-15f;
    const float count = sum(converted<Vector>(counts));
    if (count == 0.0f) return true;
    const float per_value = std::exp2(126.5f - sum(converted<Vector>(exponents)) / count) / factor;  // mantissas are 2^0.5 in the middle
    Vector squares{};
    for (int64_t group = 0; group < groups; group += LANES) {
      const Vector unit = load_some(units + group, groups - group) * per_value;
      squares += unit * unit;
    }
    return sum(squares) <= COARSEST * COARSEST * float(groups);
  }
};

// The exponent, as its bits are, of the largest of GROUP values plus CARRY units in its last place; that of values that are all zero is
// the least.
template <int64_t GROUP, int32_t CARRY = 0>
inline int32_t exponent_of(const float* from, Sizes* sizes = nullptr) {
  Integers most{};
  for (int64_t k = 0; k < GROUP; k += LANES) {
    const Integers magnitudes = bits_as<Integers>(load(from + k)) & 0x7fffffff;
    most = chosen(magnitudes > most, magnitudes, most);
    if (sizes) sizes->add(magnitudes);
  }
  const int32_t value = largest(most);
  return value == 0 ? LEAST_EXPONENT : (value + CARRY) >> 23;
}

inline bool fits(int32_t exponent) { return exponent >= LEAST_EXPONENT && exponent <= MOST_EXPONENT; }

// What values are multiplied by, so that the largest is below 2^BITS.
template <int BITS>
inline float to_whole(int32_t exponent) {
  return std::bit_cast<float>((253 + BITS - exponent) << 23);
}
// What 2^DROPPED of such a whole number is worth.
template <int BITS, int DROPPED = 0>
inline float worth(int32_t exponent) {
  return std::bit_cast<float>((exponent - (BITS - 1) + DROPPED) << 23);
}

// The sum of x over each group, which biases of affine formats meet.
template <int64_t GROUP>
inline void sum_groups(const float* x, int64_t groups, float* sums) {
  for (int64_t group = 0; group < groups; group++) {
    Vector total{};
    for (int64_t k = 0; k < GROUP; k += LANES) total += load(x + group * GROUP + k);
    sums[group] = sum(total);
  }
}

// The lanes of a vector on top of each other, as many as a register holds.
inline RegisterFloats folded(const auto& values) {
  if constexpr (std::is_same_v<std::remove_cvref_t<decltype(values)>, RegisterFloats>) {
    return values;
  } else {
    return folded(values.low + values.high);
  }
}

// A row that does not fit is left to `alone`.
using Alone = void (*)(Kind kind, Targets targets, const float* x);

// Way has: Laid, which holds rows of x as digits; lay_out(x, w, laid, row), false where a group has another size, infinite or not a number;
// together<ROWS, COLUMNS>(w, laid, first row, out, first column, how many are there, groups, ahead), whose sums are in registers.
template <class Way>
void multiply(Kind kind, Targets targets, const float* x, int64_t rows, Alone alone) {
  constexpr int64_t COLUMNS = Way::COLUMNS, ROWS = Way::ROWS, BYTES_IN_CACHE = 1 << 18, WORK_OF_A_VALUE = 4;
  const Matrix& any = targets[0].w;
  thread_local typename Way::Laid kept;
  thread_local std::vector<uint8_t> kept_fitting;
  typename Way::Laid& laid = kept;
  std::vector<uint8_t>& fitting = kept_fitting;
  const int64_t groups = any.groups(), ahead = any.bytes_ahead(COLUMNS);
  const int64_t at_once = std::clamp<int64_t>(BYTES_IN_CACHE / (4 * any.depth) / ROWS * ROWS, ROWS, std::max(rows, ROWS));
  laid.resize(any, std::min(rows, at_once));
  fitting.assign(rows, 1);
  for (int64_t start = 0; start < rows; start += at_once) {
    const int64_t count = std::min(at_once, rows - start), parts = (count + ROWS - 1) / ROWS;
    over_threads(count, any.depth * WORK_OF_A_VALUE, [&](int64_t first, int64_t last) {
      for (int64_t m = first; m < last; m++) fitting[start + m] = Way::lay_out(x + (start + m) * any.depth, any, laid, m);
    });
    over_columns(targets, 1, count * any.depth, [&](const Target& target, int64_t first, int64_t last) {
      float* out = target.out + start * target.w.columns;
      by_columns<COLUMNS>(first, last, [&](int64_t n, int64_t there) {
        // Parts as equal as can be: a part of few rows decodes as many weights as a whole one.
        for (int64_t part = 0; part < parts; part++) {
          const int64_t m = count * part / parts;
          for_few_rows<ROWS>(count * (part + 1) / parts - m,
                             [&](auto own) { Way::template together<own, COLUMNS>(target.w, laid, m, out, n, there, groups, ahead); });
        }
      });
      finish(target, start, count, first, last - first);
    });
  }
  for (int64_t m = 0; m < rows; m++) {
    if (fitting[m]) continue;
    std::vector<Target> own(targets.begin(), targets.end());
    for (Target& target : own) target.out += m * target.w.columns;
    alone(kind, own, x + m * any.depth);
  }
}

// body(Way of this group size) for affine formats; false where there is none.
template <template <int64_t> class Way, class Body>
bool by_group_size(int64_t group_size, const Body& body) {
  switch (group_size) {
    case 32: return body(Way<32>{}), true;
    case 64: return body(Way<64>{}), true;
    case 128: return body(Way<128>{}), true;
    default: return false;
  }
}

}  // namespace marlin::fixed
