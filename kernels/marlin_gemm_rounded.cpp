// marlin_gemm with activations of 8 bits: each 32 values of a row of x become whole numbers under a scale of their own, so that
// their products with the codes of weights are sums of whole numbers, four a lane and instruction where the processor has it.
//
// One row to three: each packed row is read once, its bytes as they lie; a lane adds up neighbours. More rows: tiles of
// columns are unpacked into bytes that stay in the first cache, one column a lane, and all rows of x pass over them.
#include "marlin_gemm_rounded.hpp"

#include <cmath>
#include <stdexcept>
#include <type_traits>

#include "threads.hpp"
#include "packed_columns.hpp"
#include "packed_lines.hpp"
#include "targets.hpp"
#include "whole_numbers.hpp"

namespace marlin {

namespace {

constexpr int64_t BLOCK = 32;  // values of x under one scale

// A dword of x for every lane.
inline Bytes four_of(const int8_t* from) {
  int32_t four;
  std::memcpy(&four, from, sizeof(four));
  return bits_as<Bytes>(Integers{} + four);
}

// sums[i] + the products of bytes 4i .. 4i+3. Bytes of weights are unsigned with VNNI, and signed without; SMALL ones are below
// 32 and both. Bytes of x are signed, and never -128.
template <bool SMALL, class Numbers, class Codes>
inline __attribute__((always_inline)) Numbers dot(const Numbers& sums, const Codes& weights, const Codes& x) {
  if constexpr (IS_PAIR<Numbers>) {
    return {dot<SMALL>(sums.low, weights.low, x.low), dot<SMALL>(sums.high, weights.high, x.high)};
  } else {
#if MARLIN_VNNI
    return add_quads(sums, weights, x);
#elif MARLIN_AVX512
    // Two products fit 16 bits: 2 * 128 * 127 at most. An unsigned and a signed factor: the sign moves over to x.
    const __mmask64 negative = _mm512_movepi8_mask(__m512i(weights));
    const __m512i signed_x = SMALL ? __m512i(x) : _mm512_mask_sub_epi8(__m512i(x), negative, _mm512_setzero_si512(), __m512i(x));
    const __m512i pairs = _mm512_maddubs_epi16(SMALL ? __m512i(weights) : _mm512_abs_epi8(__m512i(weights)), signed_x);
    return sums + Numbers(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#elif MARLIN_AVX2
    // As above.
    const __m256i pairs = SMALL ? _mm256_maddubs_epi16(__m256i(weights), __m256i(x))
                                : _mm256_maddubs_epi16(_mm256_abs_epi8(__m256i(weights)), _mm256_sign_epi8(__m256i(x), __m256i(weights)));
    return sums + Numbers(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#elif MARLIN_NEON
    const int8x16_t w = int8x16_t(weights), values = int8x16_t(x);
#if defined(__ARM_FEATURE_DOTPROD)
    return Numbers(vdotq_s32(int32x4_t(sums), w, values));
#else
    const int32x4_t lower = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(values)));
    const int32x4_t upper = vpaddlq_s16(vmull_s8(vget_high_s8(w), vget_high_s8(values)));
    return Numbers(vaddq_s32(int32x4_t(sums), vpaddq_s32(lower, upper)));
#endif
#else
    Numbers totals = sums;
    for (size_t lane = 0; lane < sizeof(sums) / sizeof(int32_t); lane++)
      for (size_t part = 0; part < 4; part++) totals[lane] += int8_t(weights[4 * lane + part]) * int8_t(x[4 * lane + part]);
    return totals;
#endif
  }
}

// How each format's bytes become whole numbers. The number that a code stands for is its byte less OFFSET, under the scale of
// its group times FACTOR. UNIT: weights whose whole sums are scaled together.
struct FourBits {
  static constexpr bool nibbles = true, affine = false;
  static constexpr int OFFSET = 12;  // E2M1 doubled runs from -12 to 12
  static constexpr uint8_t TABLE[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
};

struct Nvfp4 : FourBits, E4m3Scales {
  static constexpr int64_t UNIT = 16;
  static constexpr float FACTOR = 0.5f / E4M3_FACTOR;
  explicit Nvfp4(const Matrix&) {}

  // Sixteen columns' scales of the group whose codes are the bytes number `part` of dwords.
  static Vector of_columns(Integers codes, int part) { return e4m3_of(codes, part); }
};

struct Mxfp4 : FourBits, E8m0Scales {
  static constexpr int64_t UNIT = 32;
  static constexpr float FACTOR = 0.5f;
  explicit Mxfp4(const Matrix&) {}

  static Vector of_columns(Integers codes, int part) { return e8m0_of(codes, part); }
};

// What the biases add comes from the sums of x over each group.
struct Affine : FloatScales {
  static constexpr bool affine = true;
  static constexpr int64_t UNIT = 32;
  static constexpr float FACTOR = 1.0f;
  using FloatScales::FloatScales;
};

struct Int4 : Affine {
  static constexpr bool nibbles = true;
  static constexpr int OFFSET = 0;
  static constexpr uint8_t TABLE[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  explicit Int4(const Matrix& w) : Affine(w, 2 * LINE) {}
};

struct Int8 : Affine {
  static constexpr bool nibbles = false;
#if MARLIN_VNNI
  static constexpr int OFFSET = 0;
  static constexpr uint8_t FLIP = 0;
#else
  static constexpr int OFFSET = -128;  // as signed bytes
  static constexpr uint8_t FLIP = 128;
#endif
  explicit Int8(const Matrix& w) : Affine(w, LINE) {}
};

// Weights of a vector of packed bytes: with nibbles the even ones and the odd ones, else all of them, in `first`.
struct Whole {
  Bytes first, second;
};

template <class Format>
inline __attribute__((always_inline)) Whole unpack(const Bytes& packed) {
  if constexpr (!Format::nibbles) {
    return {packed ^ Format::FLIP, packed};
  } else if constexpr (Format::affine) {
    return {packed & 15, packed >> 4};
  } else {
#if MARLIN_AVX512 && defined(__AVX512VBMI__)
    return {looked_up(Format::TABLE, packed), looked_up(Format::TABLE, Bytes(_mm512_srli_epi16(__m512i(packed), 4)))};
#else
    return {looked_up(Format::TABLE, packed & 15), looked_up(Format::TABLE, packed >> 4)};
#endif
  }
}

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
  int64_t blocks = 0;           // of a row
  std::vector<int8_t> codes;    // [rows, blocks, 32], in the order in which weights come apart
  std::vector<float> scales;    // [rows, blocks]
  std::vector<int32_t> sums;    // [rows, 2 * blocks] of sixteen codes each, where they are asked for
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

template <class Format>
void round_rows(const float* x, int64_t rows, int64_t depth, bool with_sums, Rounded& rounded) {
  const int64_t blocks = rounded.blocks = (depth + BLOCK - 1) / BLOCK;
  const auto grow = [](auto& memory, int64_t count) {
    if (int64_t(memory.size()) < count) memory.resize(count);
  };
  grow(rounded.codes, rows * blocks * BLOCK);
  grow(rounded.scales, rows * blocks);
  grow(rounded.sums, with_sums ? 2 * rows * blocks : 0);
  constexpr int64_t WORK_OF_A_VALUE = 8;
  over_threads(rows, depth * WORK_OF_A_VALUE, [&](int64_t first, int64_t last) {
    for (int64_t block = first * blocks; block < last * blocks; block++) {
      const int64_t row = block / blocks, k = block % blocks * BLOCK;
      int8_t* codes = rounded.codes.data() + block * BLOCK;
      round_block(x + row * depth + k, depth - k, codes, &rounded.scales[block], with_sums ? &rounded.sums[2 * block] : nullptr);
      if (Format::nibbles) even_then_odd(codes);
    }
  });
}

// The sum of x over each group of an affine format, [rows, groups].
std::vector<float> sums_of_groups(const Rounded& rounded, int64_t rows, const Matrix& w) {
  const int64_t groups = w.groups(), blocks_of_group = w.group_size / BLOCK;
  std::vector<float> sums(rows * groups);
  for (int64_t m = 0; m < rows; m++)
    for (int64_t g = 0; g < groups; g++) {
      const int64_t first = m * rounded.blocks + g * blocks_of_group;
      for (int64_t block = first; block < first + blocks_of_group; block++)
        sums[m * groups + g] += rounded.scales[block] * float(rounded.sums[2 * block] + rounded.sums[2 * block + 1]);
    }
  return sums;
}

// ---- one row to three: lanes along the depth

// What a vector of packed bytes meets of a row of x.
struct Meeting {
  Bytes first, second;  // as `Whole`
  Integers start;       // what takes the offset of the weights back
  Vector scale;
};

// The even lanes of two vectors, and the odd ones.
inline void apart(const Integers& first, const Integers& second, Integers& even, Integers& odd) {
#if MARLIN_AVX512 && MARLIN_SHUFFLES
  even = __builtin_shufflevector(first, second, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  odd = __builtin_shufflevector(first, second, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
  int32_t lanes[2 * LANES], evens[LANES], odds[LANES];
  store_as(first, lanes);
  store_as(second, lanes + LANES);
  for (int lane = 0; lane < LANES; lane++) evens[lane] = lanes[2 * lane], odds[lane] = lanes[2 * lane + 1];
  even = load_as<Integers>(evens);
  odd = load_as<Integers>(odds);
#endif
}

template <class Format>
void lay_out(const Rounded& rounded, int64_t rows, int64_t lines, std::vector<Meeting>& meetings) {
  constexpr int64_t CODES = Format::nibbles ? 2 * LINE : LINE, LANES_OF_BLOCK = LANES * BLOCK / CODES;
  if (int64_t(meetings.size()) < rows * lines) meetings.resize(rows * lines);
  for (int64_t m = 0; m < rows; m++) {
    const int8_t* codes = rounded.codes.data() + m * rounded.blocks * BLOCK;
    const float* scales = rounded.scales.data() + m * rounded.blocks;
    for (int64_t line = 0; line < lines; line++) {
      Meeting& meeting = meetings[m * lines + line];
      const int64_t left = rounded.blocks * BLOCK - line * CODES;
      Integers dwords[2];
      dwords[0] = bits_as<Integers>(load_bytes(reinterpret_cast<const uint8_t*>(codes + line * CODES), left));
      if constexpr (Format::nibbles) {
        dwords[1] = left > LINE ? bits_as<Integers>(load_bytes(reinterpret_cast<const uint8_t*>(codes + line * CODES + LINE), left - LINE)) : Integers{};
        Integers even, odd;
        apart(dwords[0], dwords[1], even, odd);
        meeting.first = bits_as<Bytes>(even), meeting.second = bits_as<Bytes>(odd);
      } else {
        meeting.first = bits_as<Bytes>(dwords[0]);
      }
      if constexpr (Format::OFFSET != 0) {
        const Bytes ones = Bytes{} + uint8_t(1);
        Integers total = dot<true>(Integers{}, ones, meeting.first);
        if constexpr (Format::nibbles) total = dot<true>(total, ones, meeting.second);
        meeting.start = total * -Format::OFFSET;
      }
      const int64_t block = line * CODES / BLOCK;
      for (int lane = 0; lane < LANES; lane++) {
        const int64_t own = block + lane / LANES_OF_BLOCK;
        meeting.scale[lane] = own < rounded.blocks ? scales[own] * Format::FACTOR : 0.0f;
      }
    }
  }
}

template <class Format, int ROWS, int TOGETHER>
inline void together(const Format& format, const Matrix& w, const Meeting* meetings, const float* group_sums, float* out, int64_t n0,
                     int64_t groups, int64_t ahead) {
  constexpr int64_t WEIGHTS = Format::nibbles ? 2 * LINE : LINE;
  const int64_t lines = (w.row_bytes + LINE - 1) / LINE, whole = w.row_bytes / LINE;
  Packed rows[TOGETHER];
  for (int n = 0; n < TOGETHER; n++) rows[n] = w.row(n0 + n, groups);
  Sums sums[TOGETHER][ROWS] = {};
  const auto step = [&](int64_t line, bool all) __attribute__((always_inline)) {
    Whole weights[TOGETHER];
    Vector scales[TOGETHER];
    for (int n = 0; n < TOGETHER; n++) {
      const uint8_t* from = rows[n].weight + line * LINE;
      __builtin_prefetch(from + ahead);
      weights[n] = unpack<Format>(all ? load_bytes(from) : load_bytes(from, w.row_bytes - line * LINE));
      scales[n] = format.of_lanes(rows[n], line, all ? LANES : groups - line * WEIGHTS / w.group_size);
    }
    for (int m = 0; m < ROWS; m++) {
      const Meeting& meeting = meetings[m * lines + line];
      for (int n = 0; n < TOGETHER; n++) {
        Integers total = Format::OFFSET ? meeting.start : Integers{};
        total = dot<Format::nibbles>(total, weights[n].first, meeting.first);
        if constexpr (Format::nibbles) total = dot<true>(total, weights[n].second, meeting.second);
        add_products(sums[n][m], converted<Vector>(total), scales[n] * meeting.scale);
      }
    }
  };
  for (int64_t line = 0; line < whole; line++) step(line, true);
  if (whole < lines) step(whole, false);
  for (int n = 0; n < TOGETHER; n++) {
    for (int m = 0; m < ROWS; m++) {
      if constexpr (Format::affine)
        for (int64_t g = 0; g < groups; g += LANES)
          add_products(sums[n][m], load_some(rows[n].biases + g, groups - g), load_some(group_sums + m * groups + g, groups - g));
      out[m * w.columns + n0 + n] = sum(sums[n][m]);
    }
  }
}

template <class Format, int ROWS>
void few_rows(Targets targets, const float* x) {
#if MARLIN_AVX512
  constexpr int TOGETHER = ROWS == 1 ? 4 : 2;
#else
  constexpr int TOGETHER = 2;  // as many unpacked weights as sixteen registers have room for
#endif
  thread_local Rounded kept_rounded;
  thread_local std::vector<Meeting> kept_meetings;
  Rounded& rounded = kept_rounded;
  std::vector<Meeting>& meetings = kept_meetings;
  const Matrix& any = targets[0].w;
  round_rows<Format>(x, ROWS, any.depth, Format::affine, rounded);
  lay_out<Format>(rounded, ROWS, (any.row_bytes + LINE - 1) / LINE, meetings);
  const std::vector<float> group_sums = Format::affine ? sums_of_groups(rounded, ROWS, any) : std::vector<float>{};
  const Format format(any);
  const int64_t groups = any.groups(), ahead = any.bytes_ahead(TOGETHER);
  over_columns(targets, 1, ROWS * any.depth, [&](const Target& target, int64_t first, int64_t last) {
    by_columns<TOGETHER>(first, last, [&](auto some, int64_t n) {
      together<Format, ROWS, some>(format, target.w, meetings.data(), group_sums.data(), target.out, n, groups, ahead);
    });
    finish(target, 0, ROWS, first, last - first);
  });
}

// ---- more rows: lanes are columns

constexpr int64_t CHUNK = 256;  // of the depth, unpacked at a time: 8 KB for a tile; two threads of a core share the first cache
#if MARLIN_AVX512
constexpr int WIDE = 2;          // vectors of columns in a tile
constexpr int ROWS_AT_ONCE = 6;  // of x: twelve sums of floats and twelve of whole numbers fit 32 registers
#else
constexpr int WIDE = 1, ROWS_AT_ONCE = 4;  // whole numbers in eight registers of 16; the floats' sums wait in the first cache
#endif
constexpr int64_t TILE = WIDE * LANES;

// A chunk of a tile's columns: four weights of each column a vector, and the scales and biases of its groups.
template <class Format>
struct Panel {
  Bytes weights[CHUNK / 4][WIDE];
  Vector scales[CHUNK / Format::UNIT][WIDE];
  Vector biases[CHUNK / BLOCK][WIDE];
};

template <class Format>
void unpack_panel(const Matrix& w, int64_t column, int64_t k, int64_t count, Panel<Format>& panel) {
  constexpr int64_t WEIGHTS = Format::nibbles ? 2 * LINE : LINE;
  const int64_t first_byte = Format::nibbles ? k / 2 : k;
  for (int c = 0; c < WIDE; c++) {
    const Columns columns(w, column + c * LANES);
    for (int64_t line = 0; line * WEIGHTS < count; line++) {
      Integers dwords[LANES];
      columns.line(first_byte + line * LINE, dwords);
      for (int j = 0; j < LANES; j++) {
        const Whole whole = unpack<Format>(bits_as<Bytes>(dwords[j]));
        if constexpr (Format::nibbles) {
          panel.weights[2 * (line * LANES + j)][c] = whole.first;
          panel.weights[2 * (line * LANES + j) + 1][c] = whole.second;
        } else {
          panel.weights[line * LANES + j][c] = whole.first;
        }
      }
    }
    const int64_t units = (count + BLOCK - 1) / BLOCK * BLOCK / Format::UNIT;
    if constexpr (Format::affine) {
      const int64_t group = k / w.group_size, units_of_group = w.group_size / Format::UNIT;
      for (int64_t g = 0; g * units_of_group < units; g++) {
        Vector scale;
        columns.floats(group + g, scale, panel.biases[g][c]);
        for (int64_t unit = 0; unit < units_of_group; unit++) panel.scales[g * units_of_group + unit][c] = scale;
      }
    } else {
      const int64_t first = k / Format::UNIT, there = columns.groups() - first;
      for (int64_t unit = 0; unit < units; unit += 4) {
        const Integers codes = columns.four_codes(first + unit);
        for (int part = 0; part < 4 && unit + part < units; part++)
          panel.scales[unit + part][c] = unit + part < there ? Format::of_columns(codes, part) : Vector{};
      }
    }
  }
}

// What a panel meets: rows of x from some column on.
struct Rows {
  const int8_t* codes;        // [rows, codes_stride]
  const float* scales;        // [rows, stride of blocks], times FACTOR
  const int32_t* starts;      // [rows, 2 * stride]: what takes the offset of the weights back, for each sixteen codes
  const float* group_sums;    // [rows, groups], for biases
  int64_t blocks, groups;     // strides
};

template <class Format, int ROWS>
void rows_of_tile(const Panel<Format>& panel, const Rows& x, float* out, int64_t out_stride, int64_t columns, int64_t count, int64_t panel_groups,
                  bool add) {
  constexpr int64_t UNITS = BLOCK / Format::UNIT, STEPS = Format::UNIT / 4;
  const int64_t blocks = (count + BLOCK - 1) / BLOCK;
  Vector sums[ROWS][WIDE] = {};
  for (int64_t block = 0; block < blocks; block++) {
    for (int64_t half = 0; half < UNITS; half++) {
      const int64_t unit = block * UNITS + half;
      Integers totals[ROWS][WIDE];
      for (int m = 0; m < ROWS; m++) {
        int32_t start = 0;
        if constexpr (Format::OFFSET != 0) start = x.starts[2 * (m * x.blocks + block) + half];
        for (int c = 0; c < WIDE; c++) totals[m][c] = Integers{} + start;
      }
      for (int64_t step = 0; step < STEPS; step++) {
        const Bytes* weights = panel.weights[unit * STEPS + step];
        const int8_t* codes = x.codes + 4 * (unit * STEPS + step);
        for (int m = 0; m < ROWS; m++) {
          const Bytes four = four_of(codes + m * x.blocks * BLOCK);
          for (int c = 0; c < WIDE; c++) totals[m][c] = dot<Format::nibbles>(totals[m][c], weights[c], four);
        }
      }
      for (int m = 0; m < ROWS; m++) {
        const Vector scale = splat(x.scales[m * x.blocks + block]);
        for (int c = 0; c < WIDE; c++) sums[m][c] += converted<Vector>(totals[m][c]) * (panel.scales[unit][c] * scale);
      }
    }
  }
  if constexpr (Format::affine)
    for (int64_t g = 0; g < panel_groups; g++)
      for (int m = 0; m < ROWS; m++)
        for (int c = 0; c < WIDE; c++) sums[m][c] += panel.biases[g][c] * x.group_sums[m * x.groups + g];
  for (int m = 0; m < ROWS; m++) {
    for (int c = 0; c * LANES < columns; c++) {
      float* to = out + m * out_stride + c * LANES;
      store_some(add ? sums[m][c] + load_some(to, columns - c * LANES) : sums[m][c], to, columns - c * LANES);
    }
  }
}

template <class Format>
void many_rows(Targets targets, const float* x, int64_t rows) {
  const Matrix& any = targets[0].w;
  thread_local Rounded kept_rounded;
  Rounded& rounded = kept_rounded;
  round_rows<Format>(x, rows, any.depth, Format::affine || Format::OFFSET != 0, rounded);
  const int64_t groups = any.groups(), blocks = rounded.blocks;
  const std::vector<float> group_sums = Format::affine ? sums_of_groups(rounded, rows, any) : std::vector<float>{};
  for (int64_t block = 0; block < rows * blocks; block++) rounded.scales[block] *= Format::FACTOR;
  if constexpr (Format::OFFSET != 0) {
    for (int64_t block = 0; block < rows * blocks; block++) {
      int32_t* sums = &rounded.sums[2 * block];
      if (Format::UNIT == BLOCK) sums[0] += sums[1];
      sums[0] *= -Format::OFFSET, sums[1] *= -Format::OFFSET;
    }
  }
  const int64_t parts = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
  over_columns(targets, TILE, rows * any.depth, [&](const Target& target, int64_t first, int64_t last) {
    const Matrix& w = target.w;
    float* out = target.out;
    Panel<Format> panel;
    for (int64_t tile = first; tile < last; tile++) {
      const int64_t column = tile * TILE, columns = std::min(TILE, w.columns - column);
      for (int64_t k = 0; k < w.depth; k += CHUNK) {
        const int64_t count = std::min(CHUNK, w.depth - k), panel_groups = count / w.group_size;
        unpack_panel<Format>(w, column, k, count, panel);
        for (int64_t part = 0; part < parts; part++) {
          // Parts as equal as can be: a part of few rows loads as many weights as a whole one.
          const int64_t m = rows * part / parts, own = rows * (part + 1) / parts - m;
          const Rows here{rounded.codes.data() + m * blocks * BLOCK + k, rounded.scales.data() + m * blocks + k / BLOCK,
                          rounded.sums.data() + 2 * (m * blocks + k / BLOCK), Format::affine ? &group_sums[m * groups + k / w.group_size] : nullptr,
                          blocks, groups};
          const auto run = [&](auto count_of_rows) {
            rows_of_tile<Format, decltype(count_of_rows)::value>(panel, here, out + m * w.columns + column, w.columns, columns, count,
                                                                 panel_groups, k > 0);
          };
          switch (own) {
            case 1: run(std::integral_constant<int, 1>{}); break;
            case 2: run(std::integral_constant<int, 2>{}); break;
            case 3: run(std::integral_constant<int, 3>{}); break;
#if MARLIN_AVX512
            case 4: run(std::integral_constant<int, 4>{}); break;
            case 5: run(std::integral_constant<int, 5>{}); break;
#endif
            default: run(std::integral_constant<int, ROWS_AT_ONCE>{});
          }
        }
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
  with_format(kind, [&]<class Format>() {
    switch (rows) {
      case 1: return few_rows<Format, 1>(targets, x);
      case 2: return few_rows<Format, 2>(targets, x);
      default: return few_rows<Format, 3>(targets, x);
    }
  });
}

void multiply_rounded_columns(Kind kind, Targets targets, const float* x, int64_t rows) {
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
