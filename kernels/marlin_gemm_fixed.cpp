// marlin_gemm in fixed point by products of bytes: out[M, N] = x[M, K] @ W[N, K]^T in float32. All formats of whole weights, but int8 on x86
// without VNNI, whose products fit no 16 bits (marlin_gemm_words.cpp).
//
// Three signed digits of a byte, of which each meets all weights of a packed register in one or two instructions: a lane's products of all
// digits fit 32 bits together, so that it is converted and scaled once. With VNNI that is a quarter less than products of floats take.
#include "marlin_gemm_fixed.hpp"

#include "fixed_point.hpp"
#include "packed_lines.hpp"
#include "whole_weights.hpp"

namespace marlin {

namespace {

constexpr int64_t DIGITS = 3;

// Read once: GCC would read what several instructions take anew for each.
#if MARLIN_AVX512 || MARLIN_AVX2
#define KEEP_IN_REGISTER(values) asm("" : "+v"(values))
#else
#define KEEP_IN_REGISTER(values)
#endif

// Each format: weights under the scale of their GROUP; BITS of x, so that no sum of a lane is beyond 32. scales(row, group, count): sixteen
// groups', of which `count` are there. Biases meet the sums of x over each group; CENTRE has moved from codes to them.
struct Float4 : WholeFloat4 {
  static constexpr int BITS = 23, CENTRE = 0;
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

template <int64_t GROUP_SIZE>
struct Int4 : WholeInt4 {
  static constexpr int64_t GROUP = GROUP_SIZE;
  static constexpr int BITS = 23, CENTRE = 0;
  static Vector scales(const Packed& row, int64_t group, int64_t count) { return load_some(row.scales + group, count); }
};

template <int64_t GROUP_SIZE>
struct Int8 : WholeInt8 {
  static constexpr int64_t GROUP = GROUP_SIZE;
  static constexpr int BITS = 22, CENTRE = 128, OFFSET = WholeInt8::OFFSET + CENTRE;  // from -128 to 127
  static Vector scales(const Packed& row, int64_t group, int64_t count) { return load_some(row.scales + group, count); }
};

template <class Format>
struct Way {
#if MARLIN_AVX512
  static constexpr int COLUMNS = 4, ROWS = 4;
#else
  static constexpr int COLUMNS = 2, ROWS = 4;
#endif
  static constexpr int64_t HALVES = Format::nibbles ? 2 : 1, WEIGHTS = REGISTER * HALVES, OF_A_LANE = WEIGHTS / DWORDS;  // of a packed line
  static constexpr int64_t LINES = LANES * Format::GROUP / WEIGHTS;                                                     // that sixteen scales serve
  static constexpr int64_t RECORD = (DIGITS * HALVES + (Format::OFFSET != 0)) * REGISTER;                               // of a line of x

  // Rows of x by lines: digits [rows, lines, 3, halves, bytes] and, behind those of a line, what OFFSET takes from its lanes; what a whole
  // number is worth, [rows, groups]; and the sums of groups.
  struct Laid {
    AlignedBytes records;
    std::vector<float> units, sums;
    int64_t lines = 0, groups = 0;

    void resize(const Matrix& w, int64_t rows) {
      lines = (w.row_bytes + REGISTER - 1) / REGISTER, groups = w.groups();
      records.of(rows * lines * RECORD);
      units.resize(std::max<size_t>(units.size(), rows * groups));
      if (Format::affine) sums.resize(std::max<size_t>(sums.size(), rows * groups));
    }
    uint8_t* row(int64_t m) { return records.data() + m * lines * RECORD; }
    const uint8_t* row(int64_t m) const { return records.data() + m * lines * RECORD; }
  };

  static bool lay_out(const float* x, const Matrix& w, Laid& laid, int64_t m);
  template <int ROWS, int TOGETHER>
  static void together(const Matrix& w, const Laid& laid, int64_t m0, float* out, int64_t n0, int64_t there, int64_t groups, int64_t ahead);
};

// ---- x as digits

typedef uint8_t Sixteen __attribute__((vector_size(16)));

// Digits of sixteen whole numbers, each a byte in its place of the lower three; digit and half of a packed byte have a register each.
template <int64_t HALVES>
inline void store_digits(const Integers& whole, uint8_t* to) {
  const Integers bytes = (whole + 0x808080) ^ 0x808080;  // what a byte lacks to its sign goes to the next
#if MARLIN_AVX512 && defined(__AVX512VBMI__)
  alignas(64) static constexpr auto order = [] {
    std::array<uint8_t, 64> from{};
    for (int n = 0; n < 64; n++) from[n] = uint8_t(n % (16 / HALVES) * 4 * HALVES + n / (16 / HALVES) % HALVES * 4 + n / 16);
    return from;
  }();
  const __m512i ordered = _mm512_permutexvar_epi8(_mm512_load_si512(order.data()), __m512i(bytes));
  const Sixteen digits[DIGITS] = {Sixteen(_mm512_castsi512_si128(ordered)), Sixteen(_mm512_extracti32x4_epi32(ordered, 1)),
                                  Sixteen(_mm512_extracti32x4_epi32(ordered, 2))};
#elif MARLIN_SHUFFLES
  Sixteen fours[4], pairs[4];
  store_as(bytes, fours);
  for (Sixteen& four : fours)
    four = HALVES == 2 ? __builtin_shufflevector(four, four, 0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15)
                       : __builtin_shufflevector(four, four, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int n = 0; n < 2; n++) {
    pairs[n] = __builtin_shufflevector(fours[2 * n], fours[2 * n + 1], 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    pairs[2 + n] = __builtin_shufflevector(fours[2 * n], fours[2 * n + 1], 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  }
  Sixteen digits[DIGITS] = {__builtin_shufflevector(pairs[0], pairs[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
                            __builtin_shufflevector(pairs[0], pairs[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31),
                            __builtin_shufflevector(pairs[2], pairs[3], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)};
  if constexpr (HALVES == 2)
    for (Sixteen& digit : digits) digit = __builtin_shufflevector(digit, digit, 0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
#else
  Sixteen digits[DIGITS];
  for (int digit = 0; digit < DIGITS; digit++)
    for (int n = 0; n < LANES; n++) digits[digit][n % HALVES * 8 + n / HALVES] = uint8_t(bytes[n] >> (8 * digit));
#endif
  for (int64_t digit = 0; digit < DIGITS; digit++) {
    const auto* from = reinterpret_cast<const uint8_t*>(&digits[digit]);
    for (int64_t half = 0; half < HALVES; half++) std::memcpy(to + (digit * HALVES + half) * REGISTER, from + 16 / HALVES * half, 16 / HALVES);
  }
}

// sums + the products of a packed line and a digit of x.
template <int64_t HALVES>
inline __attribute__((always_inline)) RegisterIntegers dot_of_line(RegisterIntegers sums, const RegisterBytes* weights, const RegisterBytes* x) {
  if constexpr (HALVES == 2) {
    return dot_of_two(sums, weights, x);
  } else {
    return dot<false>(sums, weights[0], x[0]);
  }
}

template <class Format>
bool Way<Format>::lay_out(const float* x, const Matrix& w, Laid& laid, int64_t m) {
  constexpr int64_t VECTORS = Format::GROUP / LANES, OF_A_LINE = WEIGHTS / LANES;
  // A largest value just below a power of two has no room for digits with a sign: it counts as that power.
  constexpr int32_t CARRY = 0x10200;
  const int64_t groups = laid.groups;
  uint8_t* records = laid.row(m);
  float* units = laid.units.data() + m * groups;
  const auto put = [&](int64_t vector, const Integers& whole) {
    store_digits<HALVES>(whole, records + vector / OF_A_LINE * RECORD + vector % OF_A_LINE * (LANES / HALVES));
  };
  bool all_fit = true;
  fixed::Sizes sizes;
  for (int64_t group = 0; group < groups; group++) {
    const float* from = x + group * Format::GROUP;
    const int32_t exponent = fixed::exponent_of<Format::GROUP, CARRY>(from, &sizes);
    const bool fits = fixed::fits(exponent);
    all_fit &= fits;
    units[group] = fits ? fixed::worth<Format::BITS>(exponent) * Format::FACTOR : 0.0f;
    const float factor = fits ? fixed::to_whole<Format::BITS>(exponent) : 0.0f;
    for (int64_t v = 0; v < VECTORS; v++) put(group * VECTORS + v, fits ? nearest<Integers>(load(from + v * LANES) * factor) : Integers{});
  }
  for (int64_t vector = groups * VECTORS; vector < laid.lines * OF_A_LINE; vector++) put(vector, Integers{});
  if constexpr (Format::OFFSET != 0) {
    const RegisterBytes one = RegisterBytes{} + uint8_t(1), ones[2] = {one, one};
    for (int64_t line = 0; line < laid.lines; line++) {
      uint8_t* digits = records + line * RECORD;
      RegisterIntegers total{};
      for (int64_t digit = DIGITS - 1; digit >= 0; digit--) {
        const uint8_t* from = digits + digit * HALVES * REGISTER;
        const RegisterBytes own[2] = {load_as<RegisterBytes>(from), load_as<RegisterBytes>(from + (HALVES - 1) * REGISTER)};
        total = dot_of_line<HALVES>(total << 8, ones, own);
      }
      store_as(total * -Format::OFFSET, digits + DIGITS * HALVES * REGISTER);
    }
  }
  if (Format::affine) fixed::sum_groups<Format::GROUP>(x, groups, laid.sums.data() + m * groups);
  return all_fit && sizes.are_kept(units, groups, Format::FACTOR);
}

// ---- products

// Scales of sixteen groups, handed out by lines.
template <class Way, int64_t GROUP>
struct Scales {
#if MARLIN_AVX512
  Vector values;
  __attribute__((always_inline)) void set(const Vector& scales) { values = scales; }
  __attribute__((always_inline)) RegisterFloats of(int64_t line) const {
    alignas(64) static constexpr auto places = [] {
      std::array<int32_t, Way::LINES * LANES> from{};
      for (int64_t n = 0; n < Way::LINES * LANES; n++) from[n] = int32_t(n * Way::OF_A_LANE / GROUP);
      return from;
    }();
    return Vector(_mm512_permutexvar_ps(_mm512_load_si512(places.data() + line * LANES), __m512(values)));
  }
#else
  float values[LANES + DWORDS];  // and what a register reads beyond
  __attribute__((always_inline)) void set(const Vector& scales) { store(scales, values); }
  __attribute__((always_inline)) RegisterFloats of(int64_t line) const {
    constexpr int64_t LANES_OF_GROUP = GROUP / Way::OF_A_LANE;
    const float* from = values + line * Way::WEIGHTS / GROUP;
    if constexpr (LANES_OF_GROUP < DWORDS) return spread<LANES_OF_GROUP>(from);
    return splat_as<RegisterFloats>(*from);
  }
#endif
};

// ROWS rows of x from m0 on by TOGETHER columns from n0 on.
template <class Format>
template <int ROWS, int TOGETHER>
void Way<Format>::together(const Matrix& w, const Laid& laid, int64_t m0, float* out, int64_t n0, int64_t there, int64_t groups, int64_t ahead) {
  const int64_t lines = laid.lines, stride = lines * RECORD;
  const uint8_t* x = laid.row(m0);
  const float* units = laid.units.data() + m0 * groups;
  Packed rows[TOGETHER];
  rows_of<TOGETHER>(w, n0, there, groups, rows);
  RegisterFloats sums[ROWS][TOGETHER] = {};
  const auto each = [](auto body) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int n = 0; n < TOGETHER; n++) body(n);
  };
  // As many lines as sixteen scales serve, digit by digit: what waits for what is as far apart as the registers allow.
  const auto step = [&](int64_t first, auto all) __attribute__((always_inline)) {
    const int64_t group = first * WEIGHTS / Format::GROUP, count = all ? LANES : groups - group;
    Scales<Way, Format::GROUP> scales[ROWS][TOGETHER];
    each([&](int n) __attribute__((always_inline)) {
      const Vector own = Format::scales(rows[n], group, count);
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; m++) scales[m][n].set(own * load_some(units + m * groups + group, count));
    });
    for (int64_t line = first; line < (all ? first + LINES : lines); line++) {
      RegisterBytes weights[TOGETHER][2];
      each([&](int n) __attribute__((always_inline)) {
        const uint8_t* from = rows[n].weight + line * REGISTER;
        __builtin_prefetch(from + ahead);
        RegisterBytes packed = all ? load_as<RegisterBytes>(from) : load_first(from, w.row_bytes - line * REGISTER);
        KEEP_IN_REGISTER(packed);  // packed rows lie across the lines of the cache
        const auto whole = unpack<Format>(packed);
        weights[n][0] = whole.first;
        if constexpr (HALVES == 2) weights[n][1] = whole.second;
      });
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; m++) {
        const uint8_t* digits = x + m * stride + line * RECORD;
        // One row has too few sums under way to wait for a chain of all three digits: the lowest goes on its own.
        constexpr bool APART = ROWS == 1;
        RegisterIntegers totals[TOGETHER] = {}, lowest[TOGETHER];
        const auto add = [&](RegisterIntegers* to, int64_t digit) __attribute__((always_inline)) {
          RegisterBytes own[2];
          for (int64_t half = 0; half < HALVES; half++) {
            own[half] = load_as<RegisterBytes>(digits + (digit * HALVES + half) * REGISTER);
            KEEP_IN_REGISTER(own[half]);
          }
          each([&](int n) __attribute__((always_inline)) { to[n] = dot_of_line<HALVES>(to[n], weights[n], own); });
        };
        const auto up_a_digit = [&] { each([&](int n) __attribute__((always_inline)) { totals[n] = totals[n] << 8; }); };
        each([&](int n) __attribute__((always_inline)) {
          lowest[n] = Format::OFFSET ? load_as<RegisterIntegers>(digits + DIGITS * HALVES * REGISTER) : RegisterIntegers{};
        });
        add(totals, 2);
        if (APART) add(lowest, 0);
        up_a_digit();
        add(totals, 1);
        up_a_digit();
        if (!APART) add(totals, 0);
        each([&](int n) __attribute__((always_inline)) {
          if (APART || Format::OFFSET) totals[n] += lowest[n];
          sums[m][n] += converted<RegisterFloats>(totals[n]) * scales[m][n].of(line - first);
        });
      }
    }
  };
  const int64_t inside = w.row_bytes / REGISTER / LINES * LINES;
  for (int64_t first = 0; first < inside; first += LINES) step(first, std::true_type{});
  if (inside < lines) step(inside, std::false_type{});
#pragma GCC unroll 4
  for (int m = 0; m < ROWS; m++) {
    if constexpr (Format::affine) {
      for (int64_t g = 0; g < groups; g += LANES) {
        const Vector of_x = load_some(laid.sums.data() + (m0 + m) * groups + g, groups - g);
        each([&](int n) {
          const Vector biases = load_some(rows[n].biases + g, groups - g) + load_some(rows[n].scales + g, groups - g) * float(Format::CENTRE);
          sums[m][n] += fixed::folded(biases * of_x);
        });
      }
    }
    each([&](int n) {
      if (n < there) out[(m0 + m) * w.columns + n0 + n] = sum(sums[m][n]);
    });
  }
}

template <int64_t GROUP_SIZE>
using WayOfInt4 = Way<Int4<GROUP_SIZE>>;
template <int64_t GROUP_SIZE>
using WayOfInt8 = Way<Int8<GROUP_SIZE>>;

}  // namespace

bool multiply_fixed(Kind kind, Targets targets, const float* x, int64_t rows, fixed::Alone alone) {
  const int64_t group_size = targets[0].w.group_size;
  const auto affine = [&](auto way) { fixed::multiply<decltype(way)>(kind, targets, x, rows, alone); };
  switch (kind) {
    case Kind::nvfp4: return fixed::multiply<Way<Nvfp4>>(kind, targets, x, rows, alone), true;
    case Kind::mxfp4: return fixed::multiply<Way<Mxfp4>>(kind, targets, x, rows, alone), true;
    case Kind::int4: return fixed::by_group_size<WayOfInt4>(group_size, affine);
#if MARLIN_PAIRS_OF_BYTES
    case Kind::int8: return multiply_words(targets, x, rows, alone);
#else
    case Kind::int8: return fixed::by_group_size<WayOfInt8>(group_size, affine);
#endif
    default: return false;
  }
}

}  // namespace marlin
