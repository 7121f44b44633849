// marlin_gemm in tiles of bfloat16, for more than a few rows on processors that have them. See amx.hpp.
//
// E2M1 and E4M3 under their scales have at most six significant bits and are one piece. Affine weights are floats: three pieces, or
// where x has 8 bits the nearest bfloat16, which moves them by a fifth of what packing did.
#include "marlin_gemm_amx.hpp"

#include "amx.hpp"
#include "packed_columns.hpp"

#if MARLIN_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace marlin {

bool amx::usable() {
#if MARLIN_AMX
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  return granted;
#else
  return false;
#endif
}

#if MARLIN_AMX
namespace {

using amx::STEP;

// How each format's lines of sixteen columns become pairs of values: emit(pair, first, second), pairs counted from the line's start.
template <class Scales>
struct Nibbles {
  static constexpr bool exact = true;
  static constexpr int64_t WEIGHTS = 128;  // of a line
  static void pairs(const Columns& columns, int64_t line, const Integers* dwords, const auto& emit) {
    constexpr int64_t DWORDS_OF_GROUP = Scales::GROUP / 8;
    const __m512 values = _mm512_mul_ps(_mm512_loadu_ps(E2M1), _mm512_set1_ps(Scales::FACTOR));
    Integers codes{};
    Vector scale{};
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++) {
      const int64_t group = j / DWORDS_OF_GROUP;
      if (j % (4 * DWORDS_OF_GROUP) == 0) codes = columns.four_codes(line * (WEIGHTS / Scales::GROUP) + group);
      if (j % DWORDS_OF_GROUP == 0) scale = Scales::of(codes, group % 4);
#pragma GCC unroll 4
      for (int byte = 0; byte < 4; byte++) {
        // The permutation reads the low four bits of each lane.
        const __m512i lower = _mm512_srli_epi32(__m512i(dwords[j]), 8 * byte), upper = _mm512_srli_epi32(__m512i(dwords[j]), 8 * byte + 4);
        emit(4 * j + byte, Vector(_mm512_permutexvar_ps(lower, values)) * scale, Vector(_mm512_permutexvar_ps(upper, values)) * scale);
      }
    }
  }
};

struct Sixteens {
  static constexpr int64_t GROUP = 16;
  static constexpr float FACTOR = 1 / E4M3_FACTOR;
  static Vector of(Integers codes, int part) { return e4m3_of(codes, part); }
};

struct ThirtyTwos {
  static constexpr int64_t GROUP = 32;
  static constexpr float FACTOR = 1.0f;
  static Vector of(Integers codes, int part) { return e8m0_of(codes, part); }
};

using Nvfp4 = Nibbles<Sixteens>;
using Mxfp4 = Nibbles<ThirtyTwos>;

struct Mxfp8 {
  static constexpr bool exact = true;
  static constexpr int64_t WEIGHTS = 64;
  static void pairs(const Columns& columns, int64_t line, const Integers* dwords, const auto& emit) {
    const Integers codes = columns.four_codes(2 * line);
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++) {
      const Vector scale = e8m0_of(codes, j / 8) * (1 / E4M3_FACTOR);
      const auto value = [&](int part) { return e4m3_of(dwords[j], part) * scale; };
      emit(2 * j, value(0), value(1));
      emit(2 * j + 1, value(2), value(3));
    }
  }
};

template <int BITS>
struct Affine {
  static constexpr bool exact = false;
  static constexpr int64_t WEIGHTS = 512 / BITS, OF_A_DWORD = 32 / BITS;
  static void pairs(const Columns& columns, int64_t line, const Integers* dwords, const auto& emit) {
    const int64_t group_size = columns.group_size();
    Vector scale{}, bias{};
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++) {
      const int64_t weight = line * WEIGHTS + j * OF_A_DWORD;
      if (j == 0 || weight % group_size == 0) columns.floats(weight / group_size, scale, bias);
      const auto value = [&](int part) {
        return converted<Vector>(Integers(_mm512_srli_epi32(__m512i(dwords[j]), BITS * part)) & ((1 << BITS) - 1)) * scale + bias;
      };
#pragma GCC unroll 4
      for (int part = 0; part < OF_A_DWORD; part += 2) emit((j * OF_A_DWORD + part) / 2, value(part), value(part + 1));
    }
  }
};

template <class Format, int PIECES_OF_X, int PIECES_OF_W>
void multiply(Targets targets, const float* x, int64_t rows) {
  constexpr int64_t STEPS_OF_LINE = Format::WEIGHTS / STEP;
  const auto lay_out = [](const Matrix& w, int64_t column, int64_t step, int64_t steps, uint8_t* panel) {
    for (int64_t half = 0; half < 2; half++) {
      const Columns columns(w, column + half * amx::SIDE);
      for (int64_t from = 0; from < steps; from += STEPS_OF_LINE) {
        const int64_t line = (step + from) / STEPS_OF_LINE;
        Integers dwords[LANES];
        columns.line(line * LINE, dwords);
        uint8_t* to = panel + amx::place_of<PIECES_OF_W>(half, from * amx::SIDE);
        Format::pairs(columns, line, dwords, [&](int pair, Vector first, Vector second) __attribute__((always_inline)) {
          amx::split_pairs<PIECES_OF_W, PIECES_OF_W == 1 && !Format::exact>(first, second, to + amx::place_of<PIECES_OF_W>(0, pair));
        });
      }
    }
  };
  amx::multiply<PIECES_OF_X, PIECES_OF_W>(x, rows, targets[0].w.depth, targets, lay_out);
}

template <class Format>
void multiply(Targets targets, const float* x, int64_t rows, bool rounded) {
  if (rounded) return multiply<Format, 1, 1>(targets, x, rows);
  return multiply<Format, 3, Format::exact ? 1 : 3>(targets, x, rows);
}

}  // namespace
#endif

void multiply_amx(Kind kind, Targets targets, const float* x, int64_t rows, bool rounded) {
#if MARLIN_AMX
  switch (kind) {
    case Kind::nvfp4: return multiply<Nvfp4>(targets, x, rows, rounded);
    case Kind::mxfp4: return multiply<Mxfp4>(targets, x, rows, rounded);
    case Kind::mxfp8: return multiply<Mxfp8>(targets, x, rows, rounded);
    case Kind::int4: return multiply<Affine<4>>(targets, x, rows, rounded);
    case Kind::int8: return multiply<Affine<8>>(targets, x, rows, rounded);
  }
#endif
}

}  // namespace marlin
