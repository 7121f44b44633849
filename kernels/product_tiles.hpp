// Matrix products in tiles of registers, for processors with AVX-512 or AVX2. Others have OpenBLAS.
//
// A tile is up to six rows of `a` by four vectors of columns: its sums stay in registers over the whole depth, and ten values
// are read for 24 products of vectors (what bounds OpenBLAS's kernels here is reading, not multiplying). `b` comes as a panel,
// [depth, 64] in one piece, which stays in the first cache while all rows of `a` pass it.
#pragma once
#include <type_traits>

#include "threads.hpp"
#include "linear.hpp"

#if MARLIN_AVX512 || MARLIN_AVX2
#define MARLIN_TILES 1
namespace marlin::tiles {

#if MARLIN_AVX512
constexpr int MOST_ROWS = 6, MOST_VECTORS = 4;  // of a tile: 24 sums, four vectors of b and a value of a fill the registers
constexpr int64_t DEPTH = 128;                  // of a panel: 32 KiB
#else
constexpr int MOST_ROWS = 6, MOST_VECTORS = 1;  // twelve registers of sums, two of b and one of a
constexpr int64_t DEPTH = 256;                  // of a panel: 16 KiB
#endif
constexpr int64_t WIDTH = MOST_VECTORS * LANES;  // columns of a panel
constexpr int64_t ROWS_OF_A_COPY = 384;          // fewer, and b is turned oftener; more, and the copy leaves the second cache

// out[ROWS, columns] (+)= a[ROWS, depth] @ panel[depth, VECTORS * 16]; the last vector has the columns that are left.
template <int ROWS, int VECTORS>
void tile(Strided a, Strided panel, float* out, int64_t out_stride, int64_t columns, int64_t depth, bool adding) {
  // What is added to lies a page apart: on its way while the sums are made.
  for (int m = 0; m < ROWS && adding; m++)
    for (int n = 0; n < VECTORS; n++) __builtin_prefetch(out + m * out_stride + n * LANES, 1);
  Vector sums[ROWS][VECTORS] = {};
  const float* b = panel.data;
  for (int64_t start = 0; start < depth; start += LANES) {
    const int64_t end = std::min<int64_t>(start + LANES, depth);
    // The rows of the next tile: several short ones at once are more than the processor foresees.
    for (int m = 0; m < ROWS; m++) __builtin_prefetch(a.data + (ROWS + m) * a.stride + start);
    for (int64_t k = start; k < end; k++, b += panel.stride) {
      Vector values[VECTORS];
#pragma GCC unroll 4
      for (int n = 0; n < VECTORS; n++) values[n] = load(b + n * LANES);
#pragma GCC unroll 6
      for (int m = 0; m < ROWS; m++) {
        const Vector value = splat(a.data[m * a.stride + k]);
#pragma GCC unroll 4
        for (int n = 0; n < VECTORS; n++) sums[m][n] += value * values[n];
      }
    }
  }
  const int64_t last = columns - (VECTORS - 1) * LANES;
#pragma GCC unroll 6
  for (int m = 0; m < ROWS; m++) {
#pragma GCC unroll 4
    for (int n = 0; n < VECTORS; n++) {
      float* to = out + m * out_stride + n * LANES;
      const int64_t count = n + 1 < VECTORS ? LANES : last;
      store_some(adding ? sums[m][n] + load_some(to, count) : sums[m][n], to, count);
    }
  }
}

// What the next panel will be made of, asked for a little with each tile: its rows are too short for the processor to guess.
class Ahead {
 public:
  Ahead(Strided b, int64_t rows, int64_t depth) : b_(b), rows_(rows), depth_(depth) {}
  void ask(int64_t part, int64_t parts) const {
    constexpr int64_t LINE = 16;
    const int64_t lines = (depth_ + LINE - 1) / LINE, all = rows_ * lines;
    for (int64_t line = all * part / parts; line < all * (part + 1) / parts; line++)
      __builtin_prefetch(b_.data + line / lines * b_.stride + line % lines * LINE, 0, 2);
  }

 private:
  Strided b_;
  int64_t rows_, depth_;
};

// Any number of rows of `a`, in tiles as equal as can be.
template <int VECTORS>
void tiles_of_rows(Strided a, Strided panel, float* out, int64_t out_stride, int64_t rows, int64_t columns, int64_t depth, bool adding,
                   const Ahead& ahead) {
  const int64_t count = (rows + MOST_ROWS - 1) / MOST_ROWS;
  for (int64_t part = 0; part < count; part++) {
    ahead.ask(part, count);
    const int64_t first = rows * part / count;
    const Strided from{a.data + first * a.stride, a.stride};
    float* to = out + first * out_stride;
    switch (rows * (part + 1) / count - first) {
      case 1: tile<1, VECTORS>(from, panel, to, out_stride, columns, depth, adding); break;
      case 2: tile<2, VECTORS>(from, panel, to, out_stride, columns, depth, adding); break;
      case 3: tile<3, VECTORS>(from, panel, to, out_stride, columns, depth, adding); break;
      case 4: tile<4, VECTORS>(from, panel, to, out_stride, columns, depth, adding); break;
      case 5: tile<5, VECTORS>(from, panel, to, out_stride, columns, depth, adding); break;
      default: tile<6, VECTORS>(from, panel, to, out_stride, columns, depth, adding); break;
    }
  }
}

inline void pass(Strided a, Strided panel, float* out, int64_t out_stride, int64_t rows, int64_t columns, int64_t depth, bool adding,
                 const Ahead& ahead) {
  if constexpr (MOST_VECTORS == 1) return tiles_of_rows<1>(a, panel, out, out_stride, rows, columns, depth, adding, ahead);
  switch ((columns + LANES - 1) / LANES) {
    case 1: return tiles_of_rows<1>(a, panel, out, out_stride, rows, columns, depth, adding, ahead);
    case 2: return tiles_of_rows<2>(a, panel, out, out_stride, rows, columns, depth, adding, ahead);
    case 3: return tiles_of_rows<3>(a, panel, out, out_stride, rows, columns, depth, adding, ahead);
    default: return tiles_of_rows<4>(a, panel, out, out_stride, rows, columns, depth, adding, ahead);
  }
}

#if MARLIN_AVX512
// Sixteen rows of sixteen floats, turned: four rounds in which pairs of vectors trade halves.
inline void transpose(__m512 (&row)[LANES]) {
  __m512 pairs[LANES], fours[LANES];
  for (int n = 0; n < LANES; n += 2) {
    pairs[n] = _mm512_unpacklo_ps(row[n], row[n + 1]);
    pairs[n + 1] = _mm512_unpackhi_ps(row[n], row[n + 1]);
  }
  for (int n = 0; n < LANES; n += 4) {
    for (int half = 0; half < 2; half++) {
      const __m512d one = _mm512_castps_pd(pairs[n + half]), other = _mm512_castps_pd(pairs[n + 2 + half]);
      fours[n + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(one, other));
      fours[n + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(one, other));
    }
  }
  // fours[4 * q + c] has columns c, 4 + c, 8 + c, 12 + c of rows 4q .. 4q + 3, a quarter each.
  for (int c = 0; c < 4; c++) {
    const __m512 low = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0x44), high = _mm512_shuffle_f32x4(fours[c], fours[4 + c], 0xee);
    const __m512 low2 = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0x44), high2 = _mm512_shuffle_f32x4(fours[8 + c], fours[12 + c], 0xee);
    row[c] = _mm512_shuffle_f32x4(low, low2, 0x88);
    row[4 + c] = _mm512_shuffle_f32x4(low, low2, 0xdd);
    row[8 + c] = _mm512_shuffle_f32x4(high, high2, 0x88);
    row[12 + c] = _mm512_shuffle_f32x4(high, high2, 0xdd);
  }
}

// panel[depth, WIDTH] = b[columns, depth]^T; whole vectors of columns, of which those that are not there are zeros.
inline void turn(Strided b, float* panel, int64_t columns, int64_t depth) {
  for (int64_t start = 0; start < columns; start += LANES) {
    const int64_t some = std::min<int64_t>(LANES, columns - start);
    for (int64_t k = 0; k < depth; k += LANES) {
      const int64_t left = std::min<int64_t>(LANES, depth - k);
      const __mmask16 mask = __mmask16((1u << left) - 1);
      const float* from = b.data + start * b.stride + k;
      __m512 row[LANES];
      for (int n = 0; n < LANES; n++) row[n] = _mm512_maskz_loadu_ps(n < some ? mask : 0, from + n * b.stride);
      transpose(row);
      float* to = panel + k * WIDTH + start;
      if (left == LANES) {
        for (int n = 0; n < LANES; n++) _mm512_storeu_ps(to + n * WIDTH, row[n]);
      } else {
        for (int n = 0; n < left; n++) _mm512_storeu_ps(to + n * WIDTH, row[n]);
      }
    }
  }
}
#else
// Eight rows of eight floats, turned.
inline void transpose(__m256 (&row)[8]) {
  __m256 pairs[8], fours[8];
  for (int n = 0; n < 8; n += 2) {
    pairs[n] = _mm256_unpacklo_ps(row[n], row[n + 1]);
    pairs[n + 1] = _mm256_unpackhi_ps(row[n], row[n + 1]);
  }
  for (int n = 0; n < 8; n += 4) {
    for (int half = 0; half < 2; half++) {
      fours[n + 2 * half] = _mm256_shuffle_ps(pairs[n + half], pairs[n + 2 + half], 0x44);
      fours[n + 2 * half + 1] = _mm256_shuffle_ps(pairs[n + half], pairs[n + 2 + half], 0xee);
    }
  }
  for (int c = 0; c < 4; c++) {
    row[c] = _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x20);
    row[4 + c] = _mm256_permute2f128_ps(fours[c], fours[4 + c], 0x31);
  }
}

// panel[depth, WIDTH] = b[columns, depth]^T; whole vectors of columns, of which those that are not there are zeros.
inline void turn(Strided b, float* panel, int64_t columns, int64_t depth) {
  constexpr int64_t SIDE = 8;
  for (int64_t start = 0; start < LANES; start += SIDE) {
    for (int64_t k = 0; k < depth; k += SIDE) {
      const int64_t left = std::min(SIDE, depth - k);
      const __m256i there = first_lanes(left);
      __m256 row[SIDE];
      for (int n = 0; n < SIDE; n++) {
        const float* from = b.data + (start + n) * b.stride + k;
        row[n] = start + n >= columns ? _mm256_setzero_ps() : left == SIDE ? _mm256_loadu_ps(from) : _mm256_maskload_ps(from, there);
      }
      transpose(row);
      for (int n = 0; n < left; n++) _mm256_storeu_ps(panel + (k + n) * WIDTH + start, row[n]);
    }
  }
}
#endif

// out[rows, columns] = a[rows, depth] @ b[columns, depth]^T.
inline void product(Strided a, Strided b, float* out, int64_t out_stride, int64_t rows, int64_t columns, int64_t depth) {
  alignas(64) float panel[DEPTH * WIDTH];
  thread_local std::vector<float> copy;
  const bool copied = depth > 2 * DEPTH;  // rows far apart share too few places of the caches
  const int64_t blocks = (rows + ROWS_OF_A_COPY - 1) / ROWS_OF_A_COPY;
  const int64_t parts = (depth + DEPTH - 1) / DEPTH, part_depth = ((depth + parts - 1) / parts + LANES - 1) / LANES * LANES;
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t m = rows * block / blocks, some_rows = rows * (block + 1) / blocks - m;
    const float* from = a.data + m * a.stride;
    if (copied) {  // [parts, rows, part_depth]
      if (int64_t(copy.size()) < some_rows * parts * part_depth) copy.resize(some_rows * parts * part_depth);
      float* to = copy.data();
      for (int64_t k = 0; k < depth; k += part_depth)
        for (int64_t row = 0; row < some_rows; row++, to += part_depth)
          std::memcpy(to, from + row * a.stride + k, std::min(part_depth, depth - k) * sizeof(float));
    }
    for (int64_t n = 0; n < columns; n += WIDTH) {
      const int64_t some_columns = std::min(WIDTH, columns - n);
      for (int64_t k = 0; k < depth; k += part_depth) {
        const int64_t some_depth = std::min(part_depth, depth - k);
        const Strided part = copied ? Strided{copy.data() + k * some_rows, part_depth} : Strided{from + k, a.stride};
        turn({b.data + n * b.stride + k, b.stride}, panel, some_columns, some_depth);
        const bool last = k + part_depth >= depth;
        const int64_t next = last ? n + WIDTH : n, next_k = last ? 0 : k + part_depth;
        const Ahead ahead({b.data + next * b.stride + next_k, b.stride}, std::clamp<int64_t>(columns - next, 0, WIDTH),
                          std::min(part_depth, depth - next_k));
        pass(part, {panel, WIDTH}, out + m * out_stride + n, out_stride, some_rows, some_columns, some_depth, k > 0, ahead);
      }
    }
  }
}

// out[rows, columns] += a[rows, depth] @ b[depth, columns]: b is a panel as it lies, but for a vector that is not whole.
inline void add_product(Strided a, Strided b, float* out, int64_t out_stride, int64_t rows, int64_t columns, int64_t depth) {
  alignas(64) float panel[DEPTH * WIDTH];
  for (int64_t n = 0; n < columns; n += WIDTH) {
    const int64_t some_columns = std::min(WIDTH, columns - n);
    for (int64_t k = 0; k < depth; k += DEPTH) {
      const int64_t some_depth = std::min(DEPTH, depth - k);
      Strided part{b.data + k * b.stride + n, b.stride};
      if (some_columns % LANES) {
        for (int64_t row = 0; row < some_depth; row++)
          for (int64_t c = 0; c < some_columns; c += LANES)
            store(load_some(part.data + row * b.stride + c, some_columns - c), panel + row * WIDTH + c);
        part = {panel, WIDTH};
      }
      pass({a.data + k, a.stride}, part, out + n, out_stride, rows, some_columns, some_depth, true, Ahead({nullptr, 0}, 0, 0));
    }
  }
}

}  // namespace marlin::tiles
#endif
