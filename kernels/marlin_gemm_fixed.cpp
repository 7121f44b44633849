// marlin_gemm in fixed point by products of bytes (VNNI and VBMI): out[M, N] = x[M, K] @ W[N, K]^T in float32.
//
// Four signed digits of a byte, sixty-four products an instruction. A product of floats costs each sixteen weights a lookup and a
// multiplication; for one row this costs a third less.
#include "marlin_gemm_fixed.hpp"

#include "packed_lines.hpp"

#if MARLIN_VNNI_BYTES
namespace marlin {

namespace {

constexpr int64_t DIGITS = 4;

// Each format: HALVES, what a packed byte holds; weights are their codes, or TABLE's numbers less OFFSET, times FACTOR and the scale of
// their GROUP. scales(row, group, count): sixteen groups', of which `count` are there. Biases meet the sums of x over each group.
struct Float4 {
  static constexpr int64_t HALVES = 2;
  static constexpr bool affine = false;
  static constexpr int32_t OFFSET = 64;
  alignas(16) static constexpr uint8_t TABLE[16] = {64, 65, 66, 67, 68, 70, 72, 76, 64, 63, 62, 61, 60, 58, 56, 52};
};

struct Nvfp4 : Float4 {
  static constexpr int64_t GROUP = 16;
  static constexpr float FACTOR = 0.5f / E4M3_FACTOR;
  static Vector scales(const Packed& row, int64_t group, int64_t count) { return e4m3_of_groups(row, group, count); }
};

struct Mxfp4 : Float4 {
  static constexpr int64_t GROUP = 32;
  static constexpr float FACTOR = 0.5f;
  static Vector scales(const Packed& row, int64_t group, int64_t count) { return e8m0_of_groups(row, group, count); }
};

template <int BITS, int64_t GROUP_SIZE>
struct Affine {
  static constexpr int64_t HALVES = 8 / BITS, GROUP = GROUP_SIZE;
  static constexpr bool affine = true;
  static constexpr int32_t OFFSET = 0;
  static constexpr float FACTOR = 1.0f;
  alignas(16) static constexpr uint8_t TABLE[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  static Vector scales(const Packed& row, int64_t group, int64_t count) { return load_some(row.scales + group, count); }
};

template <class Format>
constexpr int64_t WEIGHTS = LINE * Format::HALVES;  // of a line

// Rows of x by lines: digits [rows, lines, 4, halves, 64 bytes]; what OFFSET adds to the sums of lanes, in the upper two and the lower two
// digits, [rows, lines, 2, lanes]; what 2^16 is worth, by groups; and the sums of groups.
template <class Format>
struct Laid {
  AlignedBytes digits, offsets;
  std::vector<float> units, sums;
  int64_t lines = 0, groups = 0;

  void resize(const Matrix& w, int64_t rows) {
    lines = (w.row_bytes + LINE - 1) / LINE, groups = w.groups();
    digits.of(rows * digit_bytes());
    offsets.of(rows * offset_bytes());
    units.resize(std::max<size_t>(units.size(), rows * groups));
    if (Format::affine) sums.resize(std::max<size_t>(sums.size(), rows * groups));
  }
  int64_t digit_bytes() const { return lines * DIGITS * Format::HALVES * LINE; }
  int64_t offset_bytes() const { return lines * 2 * LINE; }
};

// Whole numbers of two lanes of nibbles, and what OFFSET adds to the sums of their products: -OFFSET times their own sum. That has to
// be a multiple of 256, for accumulators start from it in the digits above the lowest, [2, lanes]. So sums are made multiples of four:
// one or two of the eight numbers move by one.
template <int32_t OFFSET>
inline __m512i with_offsets(__m512i whole, int32_t* to) {
  static_assert(OFFSET == 64);
  __m512i sums = _mm512_add_epi32(whole, _mm512_shuffle_i64x2(whole, whole, 0xb1));
  sums = _mm512_add_epi32(sums, _mm512_shuffle_epi32(sums, _MM_PERM_BADC));
  sums = _mm512_add_epi32(sums, _mm512_shuffle_epi32(sums, _MM_PERM_CDAB));
  const auto constant = [](int32_t value) { return _mm512_set1_epi32(value); };
  const __m512i over = _mm512_sub_epi32(_mm512_and_si512(_mm512_add_epi32(sums, constant(2)), constant(3)), constant(2));
  const __m512i offsets = _mm512_srai_epi32(_mm512_sub_epi32(over, sums), 2);  // 256ths
  constexpr __mmask16 FIRSTS = 0x0101;
  const auto store = [&](__m512i digits, int32_t* there) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(there), _mm512_castsi512_si128(_mm512_maskz_compress_epi32(FIRSTS, digits)));
  };
  store(_mm512_srai_epi32(offsets, 16), to);
  store(_mm512_and_si512(offsets, constant(0xffff)), to + LANES);
  // Shares of `over` by quads: (over + 0) / 8, .. (over + 7) / 8, rounded down, add up to it.
  const __m512i steps = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7);
  return _mm512_sub_epi32(whole, _mm512_srai_epi32(_mm512_add_epi32(over, steps), 3));
}

// Row m of those that are laid out. False where a group has another size, infinite or not a number.
template <class Format>
bool lay_out(const float* x, const Matrix& w, Laid<Format>& laid, int64_t m) {
  constexpr int64_t VECTORS = Format::GROUP / LANES, OF_A_LINE = WEIGHTS<Format> / LANES, HALVES = Format::HALVES;
  const int64_t groups = laid.groups, lines = laid.lines;
  uint8_t* digits = laid.digits.data() + m * laid.digit_bytes();
  auto* offsets = reinterpret_cast<int32_t*>(laid.offsets.data() + m * laid.offset_bytes());
  // The bytes of sixteen numbers by digit, half of a packed byte and place: eight quads of four bytes, or of eight, of which each goes to
  // a row of 64 bytes of its own, or two to one.
  alignas(64) static constexpr auto order = [] {
    std::array<uint8_t, 64> from{};
    for (int n = 0; n < 64; n++) from[n] = uint8_t(n % (16 / HALVES) * 4 * HALVES + n / (16 / HALVES) % HALVES * 4 + n / 16);
    return from;
  }();
  const __m512i quads = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i places = HALVES == 2 ? _mm512_slli_epi64(quads, 6)
                                     : _mm512_add_epi64(_mm512_slli_epi64(_mm512_srli_epi64(quads, 1), 6),
                                                        _mm512_slli_epi64(_mm512_and_si512(quads, _mm512_set1_epi64(1)), 3));
  const __m512i carries = _mm512_set1_epi32(0x808080);
  const auto put = [&](int64_t vector, __m512i whole) {
    const int64_t line = vector / OF_A_LINE, inside = vector % OF_A_LINE;
    if constexpr (Format::OFFSET != 0) whole = with_offsets<Format::OFFSET>(whole, offsets + line * 2 * LANES + inside * 2);
    // Signed digits: what a byte lacks to its sign goes to the next.
    const __m512i signed_bytes = _mm512_xor_si512(_mm512_add_epi32(whole, carries), carries);
    const __m512i ordered = _mm512_permutexvar_epi8(_mm512_load_si512(order.data()), signed_bytes);
    _mm512_i64scatter_epi64(digits + line * DIGITS * HALVES * LINE + inside * (16 / HALVES), places, ordered, 1);
  };
  bool all_fit = true;
  for (int64_t group = 0; group < groups; group++) {
    const float* from = x + group * Format::GROUP;
    const int32_t exponent = fixed::exponent_of<Format::GROUP>(from);
    const bool fits = fixed::fits(exponent);
    all_fit &= fits;
    laid.units[m * groups + group] = fits ? fixed::worth<16>(exponent) * Format::FACTOR : 0.0f;
    const Vector factor = splat(fits ? fixed::to_whole(exponent) : 0.0f);
    for (int64_t v = 0; v < VECTORS; v++) {
      const __m512i whole = _mm512_cvtps_epi32(__m512(load(from + v * LANES) * factor));
      put(group * VECTORS + v, fits ? whole : _mm512_setzero_si512());
    }
  }
  for (int64_t vector = groups * VECTORS; vector < lines * OF_A_LINE; vector++) put(vector, _mm512_setzero_si512());
  if (Format::affine) fixed::sum_groups<Format::GROUP>(x, groups, laid.sums.data() + m * groups);
  return all_fit;
}

// ROWS rows of x from m0 on by TOGETHER columns from n0 on.
template <class Format, int ROWS, int TOGETHER>
void together(const Matrix& w, const Laid<Format>& laid, int64_t m0, float* out, int64_t n0, int64_t groups, int64_t ahead) {
  constexpr int64_t HALVES = Format::HALVES, LINES = LANES * Format::GROUP / WEIGHTS<Format>;  // that sixteen scales serve
  const int64_t lines = laid.lines;
  alignas(64) static constexpr auto spread = [] {  // of sixteen scales over the lanes of each line
    std::array<int32_t, LINES * LANES> from{};
    for (int64_t n = 0; n < LINES * LANES; n++) from[n] = int32_t(n * WEIGHTS<Format> / LANES / Format::GROUP);
    return from;
  }();
  const __m512i table = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(Format::TABLE)));
  Packed rows[TOGETHER];
  for (int n = 0; n < TOGETHER; n++) rows[n] = w.row(n0 + n, groups);
  Vector sums[ROWS][TOGETHER] = {};
  const auto each = [](auto body) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int n = 0; n < TOGETHER; n++) body(n);
  };
  // As many lines as sixteen scales serve, stage by stage: what waits for what is as far apart as the registers allow.
  const auto step = [&](int64_t first, auto all) __attribute__((always_inline)) {
    const int64_t group = first * WEIGHTS<Format> / Format::GROUP, count = all ? LANES : groups - group;
    Vector scales[ROWS][TOGETHER];
    each([&](int n) __attribute__((always_inline)) {
      const Vector own = Format::scales(rows[n], group, count);
#pragma GCC unroll 2
      for (int m = 0; m < ROWS; m++) scales[m][n] = own * load_some(laid.units.data() + (m0 + m) * groups + group, count);
    });
    for (int64_t line = first; line < (all ? first + LINES : lines); line++) {
      __m512i weights[HALVES][TOGETHER];
      each([&](int n) __attribute__((always_inline)) {
        const uint8_t* from = rows[n].weight + line * LINE;
        __builtin_prefetch(from + ahead);
        __m512i bytes = all ? __m512i(load_bytes(from)) : __m512i(load_bytes(from, w.row_bytes - line * LINE));
        asm("" : "+v"(bytes));  // read once: GCC would twice, and packed rows lie across the lines of the cache
        if constexpr (HALVES == 2) {
          // The table repeats: of an index the lower four bits count.
          weights[0][n] = _mm512_permutexvar_epi8(bytes, table);
          weights[1][n] = _mm512_permutexvar_epi8(_mm512_srli_epi32(bytes, 4), table);
        } else {
          weights[0][n] = bytes;
        }
      });
      const __m512i lanes = _mm512_load_si512(spread.data() + (line - first) * LANES);
#pragma GCC unroll 2
      for (int m = 0; m < ROWS; m++) {
        const uint8_t* digits = laid.digits.data() + (m0 + m) * laid.digit_bytes() + line * DIGITS * HALVES * LINE;
        const uint8_t* offsets = laid.offsets.data() + (m0 + m) * laid.offset_bytes() + line * 2 * LINE;
        __m512i upper[TOGETHER], lower[TOGETHER];
        each([&](int n) __attribute__((always_inline)) {
          upper[n] = Format::OFFSET ? _mm512_load_si512(offsets) : _mm512_setzero_si512();
          lower[n] = Format::OFFSET ? _mm512_load_si512(offsets + LINE) : _mm512_setzero_si512();
        });
        const auto add_products = [&](__m512i* totals, int digit) __attribute__((always_inline)) {
#pragma GCC unroll 2
          for (int half = 0; half < HALVES; half++) {
            const __m512i values = _mm512_load_si512(digits + (digit * HALVES + half) * LINE);
            each([&](int n) __attribute__((always_inline)) { totals[n] = _mm512_dpbusd_epi32(totals[n], weights[half][n], values); });
          }
        };
        const auto up_a_digit = [&](__m512i* totals) __attribute__((always_inline)) {
          each([&](int n) __attribute__((always_inline)) { totals[n] = _mm512_slli_epi32(totals[n], 8); });
        };
        add_products(upper, 3);
        add_products(lower, 1);
        up_a_digit(upper);
        up_a_digit(lower);
        add_products(upper, 2);
        add_products(lower, 0);
        each([&](int n) __attribute__((always_inline)) {
          const Vector both = Vector(_mm512_cvtepi32_ps(upper[n])) + Vector(_mm512_cvtepi32_ps(lower[n])) * 0x1p-16f;
          sums[m][n] += both * Vector(_mm512_permutexvar_ps(lanes, __m512(scales[m][n])));
        });
      }
    }
  };
  const int64_t inside = w.row_bytes / LINE / LINES * LINES;
  for (int64_t first = 0; first < inside; first += LINES) step(first, std::true_type{});
  if (inside < lines) step(inside, std::false_type{});
#pragma GCC unroll 2
  for (int m = 0; m < ROWS; m++) {
    if constexpr (Format::affine) {
      for (int64_t g = 0; g < groups; g += LANES) {
        const Vector of_x = load_some(laid.sums.data() + (m0 + m) * groups + g, groups - g);
        each([&](int n) { sums[m][n] += load_some(rows[n].biases + g, groups - g) * of_x; });
      }
    }
    each([&](int n) { out[(m0 + m) * w.columns + n0 + n] = sum(sums[m][n]); });
  }
}

template <class Format>
struct Way {
  static constexpr int COLUMNS = 4;
  using Laid = marlin::Laid<Format>;
  static bool lay_out(const float* x, const Matrix& w, Laid& laid, int64_t m) { return marlin::lay_out<Format>(x, w, laid, m); }
  template <int ROWS, int TOGETHER>
  static void together(const Matrix& w, const Laid& laid, int64_t m0, float* out, int64_t n0, int64_t groups, int64_t ahead) {
    marlin::together<Format, ROWS, TOGETHER>(w, laid, m0, out, n0, groups, ahead);
  }
};

template <int64_t GROUP_SIZE>
using WayOfInt4 = Way<Affine<4, GROUP_SIZE>>;
template <int64_t GROUP_SIZE>
using WayOfInt8 = Way<Affine<8, GROUP_SIZE>>;

}  // namespace

bool multiply_fixed(Kind kind, Targets targets, const float* x, int64_t rows, fixed::Alone alone) {
  const int64_t group_size = targets[0].w.group_size;
  const auto affine = [&](auto way) { fixed::multiply<decltype(way)>(kind, targets, x, rows, alone); };
  switch (kind) {
    case Kind::nvfp4: return fixed::multiply<Way<Nvfp4>>(kind, targets, x, rows, alone), true;
    case Kind::mxfp4: return fixed::multiply<Way<Mxfp4>>(kind, targets, x, rows, alone), true;
    case Kind::int4: return fixed::by_group_size<WayOfInt4>(group_size, affine);
    case Kind::int8: return fixed::by_group_size<WayOfInt8>(group_size, affine);
    default: return false;
  }
}

}  // namespace marlin
#endif
