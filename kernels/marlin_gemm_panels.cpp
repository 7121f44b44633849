// marlin_gemm for many rows of x: out[M, N] = x[M, K] @ W[N, K]^T in float32. Packed weights are decoded once into the panels of a dense
// product, whose tiles all rows pass. A panel is turned while it is packed, an eighth of what a dense product has to turn.
#include "marlin_gemm_panels.hpp"

#include "decode.hpp"
#include "product_tiles.hpp"
#include "targets.hpp"
#include "whole_numbers.hpp"

namespace marlin {

#if MARLIN_TILES
namespace {

using tiles::DEPTH;
using tiles::WIDTH;

// Each format: BITS of a weight; value<part>(dwords), weight number `part` of the dwords of sixteen columns, times FACTOR; GROUP, where it
// does not depend on the matrix; scales(codes, part), of sixteen columns out of four codes of each.
struct Float4 {
  static constexpr int BITS = 4;
  static constexpr bool affine = false;
#if MARLIN_AVX512
  static constexpr float FACTOR = 1.0f;
  template <int PART>
  static __attribute__((always_inline)) Vector value(const Integers& dwords) {
    // The permutation reads the low four bits of each lane.
    return Vector(_mm512_permutexvar_ps(_mm512_srli_epi32(__m512i(dwords), 4 * PART), _mm512_loadu_ps(E2M1)));
  }
#else
  static constexpr float FACTOR = 0x1p-25f;
  alignas(16) static constexpr uint8_t TABLE[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, 255, 254, 253, 252, 250, 248, 244};  // doubled
  template <int PART>
  static __attribute__((always_inline)) Vector value(const Integers& dwords) {
    // Looked up in the uppermost byte, where it has its sign; code 0 below it is nothing.
    const auto half = [](__m256i own) {
      const __m256i moved = PART == 7 ? _mm256_srli_epi32(own, 4) : _mm256_slli_epi32(own, 24 - 4 * PART);
      const __m256i upper = _mm256_and_si256(moved, _mm256_set1_epi32(0x0f000000));
      return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(TABLE))), upper));
    };
    return {half(__m256i(dwords.low)), half(__m256i(dwords.high))};
  }
#endif
};

struct Nvfp4 : Float4 {
  static constexpr int64_t GROUP = 16;
  static Vector scales(const Integers& codes, int part) { return e4m3_of(codes, part) * (FACTOR / E4M3_FACTOR); }
};

struct Mxfp4 : Float4 {
  static constexpr int64_t GROUP = 32;
  static Vector scales(const Integers& codes, int part) { return e8m0_of(codes, part) * FACTOR; }
};

struct Mxfp8 {
  static constexpr int BITS = 8;
  static constexpr bool affine = false;
  static constexpr int64_t GROUP = 32;
  static Vector scales(const Integers& codes, int part) { return e8m0_of(codes, part); }
  template <int PART>
  static __attribute__((always_inline)) Vector value(const Integers& dwords) {
    // The fields of a float whose exponent is 120 too small: what a scale cannot always take up as well.
    return bits_as<Vector>(((dwords << (24 - 8 * PART)) >> 4) & int32_t(0x87f00000)) * 0x1p120f;
  }
};

template <int BITS_OF_WEIGHT>
struct Affine {
  static constexpr int BITS = BITS_OF_WEIGHT;
  static constexpr bool affine = true;
  static constexpr int64_t GROUP = 32;  // or a multiple
  template <int PART>
  static __attribute__((always_inline)) Vector value(const Integers& dwords) {
    return converted<Vector>((dwords >> (BITS * PART)) & ((1 << BITS) - 1));
  }
};

// panel[count, WIDTH] = columns column .. column + WIDTH - 1 from k on; whole vectors of columns, those behind the last are the last.
template <class Format>
void decode(const Matrix& w, int64_t column, int64_t k, int64_t count, float* panel) {
  constexpr int64_t OF_A_DWORD = 32 / Format::BITS, WEIGHTS = LANES * OF_A_DWORD, DWORDS_OF_GROUP = Format::GROUP / OF_A_DWORD;
  const int64_t vectors = std::min<int64_t>(tiles::MOST_VECTORS, (w.columns - column + LANES - 1) / LANES);
  for (int64_t vector = 0; vector < vectors; vector++) {
    const Columns columns(w, column + vector * LANES);
    for (int64_t inside = 0; inside < count; inside += WEIGHTS) {
      const int64_t start = k + inside, dwords_there = std::min(LANES, int((count - inside) / OF_A_DWORD));
      Integers dwords[LANES], codes{};
      Vector scale{}, bias{};
      columns.line(start * Format::BITS / 8, dwords);
      float* to = panel + inside * WIDTH + vector * LANES;
      for (int64_t j = 0; j < dwords_there; j++) {
        if (j % DWORDS_OF_GROUP == 0) {
          const int64_t weight = start + j * OF_A_DWORD;
          if constexpr (Format::affine) {
            if (j == 0 || weight % w.group_size == 0) columns.floats(weight / w.group_size, scale, bias);
          } else {
            const int64_t part = j / DWORDS_OF_GROUP % 4;
            if (part == 0) codes = columns.four_codes(weight / Format::GROUP);
            scale = Format::scales(codes, int(part));
          }
        }
        const auto put = [&]<int PART>(std::integral_constant<int, PART>) __attribute__((always_inline)) {
          Vector value = Format::template value<PART>(dwords[j]) * scale;
          if constexpr (Format::affine) value += bias;
          store(value, to + PART * WIDTH);
        };
        [&]<int... PARTS>(std::integer_sequence<int, PARTS...>) __attribute__((always_inline)) {
          (put(std::integral_constant<int, PARTS>{}), ...);
        }(std::make_integer_sequence<int, OF_A_DWORD>{});
        to += OF_A_DWORD * WIDTH;
      }
    }
  }
}

// x as its panels meet it: [blocks of rows, parts of the depth, rows, DEPTH]. Rows far apart share too few places of the caches.
const float* lay_out(const float* x, int64_t rows, int64_t depth, int64_t rows_at_once) {
  thread_local AlignedBytes kept;
  const int64_t parts = (depth + DEPTH - 1) / DEPTH;
  auto* to = reinterpret_cast<float*>(kept.of(rows * parts * DEPTH * sizeof(float)));
  over_threads(rows, depth, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; m++) {
      const int64_t block = m / rows_at_once * rows_at_once, count = std::min(rows_at_once, rows - block);
      for (int64_t part = 0; part < parts; part++)
        std::memcpy(to + (block * parts + part * count + m - block) * DEPTH, x + m * depth + part * DEPTH,
                    std::min(DEPTH, depth - part * DEPTH) * sizeof(float));
    }
  });
  return to;
}

template <class Format>
void multiply(Targets targets, const float* x, int64_t rows) {
  const int64_t depth = targets[0].w.depth, parts = (depth + DEPTH - 1) / DEPTH;
  const int64_t blocks = (rows + tiles::ROWS_OF_A_COPY - 1) / tiles::ROWS_OF_A_COPY, at_once = (rows + blocks - 1) / blocks;
  const bool copied = parts > 2;
  const float* laid = copied ? lay_out(x, rows, depth, at_once) : x;
  over_columns(targets, WIDTH, rows * depth, [&](const Target& target, int64_t first, int64_t last) {
    const Matrix& w = target.w;
    alignas(64) float panel[DEPTH * WIDTH];
    for (int64_t m = 0; m < rows; m += at_once) {
      const int64_t count = std::min(at_once, rows - m);
      for (int64_t tile = first; tile < last; tile++) {
        const int64_t column = tile * WIDTH, columns = std::min(WIDTH, w.columns - column);
        for (int64_t part = 0; part < parts; part++) {
          const int64_t some = std::min(DEPTH, depth - part * DEPTH);
          decode<Format>(w, column, part * DEPTH, some, panel);
          const Strided from = copied ? Strided{laid + (m * parts + part * count) * DEPTH, DEPTH} : Strided{x + m * depth + part * DEPTH, depth};
          tiles::pass(from, {panel, WIDTH}, target.out + m * w.columns + column, w.columns, count, columns,
                      some, part > 0, tiles::Ahead({nullptr, 0}, 0, 0));
        }
        finish(target, m, count, column, columns);
      }
    }
  });
}

}  // namespace

bool multiply_panels(Kind kind, Targets targets, const float* x, int64_t rows) {
  switch (kind) {
    case Kind::nvfp4: return multiply<Nvfp4>(targets, x, rows), true;
    case Kind::mxfp4: return multiply<Mxfp4>(targets, x, rows), true;
    case Kind::mxfp8: return multiply<Mxfp8>(targets, x, rows), true;
    case Kind::int4: return multiply<Affine<4>>(targets, x, rows), true;
    case Kind::int8: return multiply<Affine<8>>(targets, x, rows), true;
  }
  return false;
}
#else
bool multiply_panels(Kind, Targets, const float*, int64_t) { return false; }
#endif

}  // namespace marlin
