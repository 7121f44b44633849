// Products of a few rows of x with weights dense or packed, each weight read and decoded once for all rows of a tile.
//
// A simdgroup has some rows of W, and all rows of x of its tile. Its lanes take pieces of PIECE values along the depth in turn, so
// that they read a row of W side by side; a piece of W is decoded to registers and multiplied with the same piece of every row of
// x. The lanes' sums meet once, at the end. x is whatever has `load(row, piece, values)`: rows as they stand, rows that are
// normalised on the way, or rows that the threadgroup has made itself. Arithmetic is float32 from one rounding to the next.

namespace marlin {

enum Kind { DENSE, NVFP4, MXFP4, MXFP8, INT4, INT8 };
enum NormKind { NO_NORM, RMSNORM, LAYERNORM, VARIANCE };
enum Activation { SILU, GELU, GELU_TANH, RELU };

// W[rows, depth] of one layer. A piece of a row is `values` times its scale; of int4 and int8, its zero is added to each.
template <typename T, int KIND, int GROUP>
struct Weights {
  static constant constexpr bool AFFINE = KIND == INT4 || KIND == INT8;
  static constant constexpr int WORDS = KIND == MXFP8 || KIND == INT8 ? 2 : 1;  // of a piece

  const device uint32_t* words;
  const device metal::conditional_t<AFFINE, T, uint8_t>* scales;
  const device T* zeros;

  METAL_FUNC void load(int row, int piece, int depth, thread float (&values)[PIECE], thread float& scale, thread float& zero) const {
    const device uint32_t* from = words + (int64_t(row) * (depth / PIECE) + piece) * WORDS;
    const int64_t group = int64_t(row) * (depth / GROUP) + piece * PIECE / GROUP;
    const uint first = from[0], second = from[WORDS - 1];
    MARLIN_UNROLL
    for (int p = 0; p < 4; p++) {
      if (KIND == INT4) {
        values[p] = float(first >> (4 * p) & 15);
        values[p + 4] = float(first >> (4 * p + 16) & 15);
      } else if (KIND == INT8) {
        values[p] = float(first >> (8 * p) & 255);
        values[p + 4] = float(second >> (8 * p) & 255);
      } else if (KIND == MXFP8) {
        const float2 two = from_e4m3_pair(p < 2 ? first : second, p % 2);
        values[p / 2 * 4 + p % 2] = two.x;
        values[p / 2 * 4 + p % 2 + 2] = two.y;
      } else {
        const float2 two = from_e2m1_pair(first, p);
        values[p] = two.x;
        values[p + 4] = two.y;
      }
    }
    const float number = float(scales[group]);
    scale = AFFINE ? number : KIND == NVFP4 ? from_e4m3(uint(number)) : from_e8m0(uint(number));
    if (AFFINE) zero = float(zeros[group]);
  }
};

template <typename T, int GROUP>
struct Weights<T, DENSE, GROUP> {
  const device T* words;
  const device uint8_t* scales;
  const device T* zeros;
  static constant constexpr bool AFFINE = false;

  METAL_FUNC void load(int row, int piece, int depth, thread float (&values)[PIECE], thread float& scale, thread float& zero) const {
    const device T* from = words + int64_t(row) * depth + piece * PIECE;
    MARLIN_UNROLL
    for (int i = 0; i < PIECE; i++) values[i] = float(from[i]);
    scale = 1.0f;
  }
};

// Sets the Weights of a layer to arrays of a kernel, which are named after it.
#define MARLIN_WEIGHTS(weights, layer)   \
  weights.words = layer##_words;         \
  weights.scales = layer##_scales;       \
  weights.zeros = layer##_zeros;

// Rows of x as they stand in memory, `first` and on; a tile's rows beyond `last` repeat it.
template <typename T>
struct PlainRows {
  const device T* rows;
  int width, first, last;

  METAL_FUNC void load(int row, int piece, thread float (&values)[PIECE]) const {
    const device T* from = rows + int64_t(metal::min(first + row, last)) * width + piece * PIECE;
    MARLIN_UNROLL
    for (int i = 0; i < PIECE; i++) values[i] = float(from[i]);
  }
};

// The same, normalised as they are read.
template <typename T, int NORM, int TILE>
struct NormedRows {
  PlainRows<T> plain;
  const device T* gains;
  float mean[TILE], inverse[TILE];

  // What all rows need to be normalised, by all simdgroups of the threadgroup: `left` has 2 * simdgroups * TILE floats.
  METAL_FUNC void measure(float eps, threadgroup float* left, int simdgroup, int simdgroups, int lane) {
    if (NORM == NO_NORM) return;
    MARLIN_UNROLL
    for (int row = 0; row < TILE; row++) mean[row] = 0.0f;
    if (NORM != RMSNORM) {
      add_up(left, false, simdgroup, simdgroups, lane);
      threadgroup_barrier(mem_flags::mem_threadgroup);
      MARLIN_UNROLL
      for (int row = 0; row < TILE; row++) {
        for (int each = 0; each < simdgroups; each++) mean[row] += left[each * TILE + row];
        mean[row] /= plain.width;
      }
      left += simdgroups * TILE;
    }
    add_up(left, true, simdgroup, simdgroups, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    MARLIN_UNROLL
    for (int row = 0; row < TILE; row++) {
      float squares = 0.0f;
      for (int each = 0; each < simdgroups; each++) squares += left[each * TILE + row];
      inverse[row] = metal::rsqrt(squares / plain.width + eps);
      if (NORM == VARIANCE) mean[row] = 0.0f;
    }
  }

  // This simdgroup's share of the sums of each row, or of the squares of what is off its mean.
  METAL_FUNC void add_up(threadgroup float* left, bool squares, int simdgroup, int simdgroups, int lane) const {
    MARLIN_UNROLL
    for (int row = 0; row < TILE; row++) {
      float sum = 0.0f;
      for (int piece = simdgroup * 32 + lane; piece < plain.width / PIECE; piece += simdgroups * 32) {
        float values[PIECE];
        plain.load(row, piece, values);
        MARLIN_UNROLL
        for (int i = 0; i < PIECE; i++) sum += squares ? (values[i] - mean[row]) * (values[i] - mean[row]) : values[i];
      }
      sum = metal::simd_sum(sum);
      if (lane == 0) left[simdgroup * TILE + row] = sum;
    }
  }

  METAL_FUNC void load(int row, int piece, thread float (&values)[PIECE]) const {
    plain.load(row, piece, values);
    if (NORM == NO_NORM) return;
    MARLIN_UNROLL
    for (int i = 0; i < PIECE; i++) values[i] = (values[i] - mean[row]) * inverse[row] * float(gains[piece * PIECE + i]);
  }
};

// Rows that the threadgroup has made itself.
struct SharedRows {
  const threadgroup float* rows;
  int width;

  METAL_FUNC void load(int row, int piece, thread float (&values)[PIECE]) const {
    MARLIN_UNROLL
    for (int i = 0; i < PIECE; i++) values[i] = rows[row * width + piece * PIECE + i];
  }
};

// sums[i][r] = row i of x with row `rows[r]` of W, to all lanes of the simdgroup.
template <int TILE, int ROWS, typename X, typename W>
METAL_FUNC void multiply(
    thread const X& x, thread const W& weights, thread const int (&rows)[ROWS], int depth, int lane,
    thread float (&sums)[TILE][ROWS]) {
  MARLIN_UNROLL
  for (int row = 0; row < TILE; row++) {
    MARLIN_UNROLL
    for (int r = 0; r < ROWS; r++) sums[row][r] = 0.0f;
  }
  for (int piece = lane; piece < depth / PIECE; piece += 32) {
    float values[ROWS][PIECE], scale[ROWS], zero[ROWS];
    MARLIN_UNROLL
    for (int r = 0; r < ROWS; r++) weights.load(rows[r], piece, depth, values[r], scale[r], zero[r]);
    MARLIN_UNROLL
    for (int row = 0; row < TILE; row++) {
      float own[PIECE], total = 0.0f;
      x.load(row, piece, own);
      MARLIN_UNROLL
      for (int i = 0; i < PIECE; i++) total += own[i];
      MARLIN_UNROLL
      for (int r = 0; r < ROWS; r++) {
        float product = 0.0f;
        MARLIN_UNROLL
        for (int i = 0; i < PIECE; i++) product += own[i] * values[r][i];
        sums[row][r] += W::AFFINE ? product * scale[r] + total * zero[r] : product * scale[r];
      }
    }
  }
  MARLIN_UNROLL
  for (int row = 0; row < TILE; row++) {
    MARLIN_UNROLL
    for (int r = 0; r < ROWS; r++) sums[row][r] = metal::simd_sum(sums[row][r]);
  }
}

// The sum that a lane is to write: number `lane` of all, in order; 0 for lanes beyond them.
template <int TILE, int ROWS>
METAL_FUNC float own_sum(thread const float (&sums)[TILE][ROWS], int lane) {
  float own = 0.0f;
  MARLIN_UNROLL
  for (int row = 0; row < TILE; row++) {
    MARLIN_UNROLL
    for (int r = 0; r < ROWS; r++) own = lane == row * ROWS + r ? sums[row][r] : own;
  }
  return own;
}

// Of the products of all rows of x with `ROWS` rows of W, the first one and on, the one that a lane is to write: see own_sum. Rows
// beyond the last of W repeat it.
template <int TILE, int ROWS, typename X, typename W>
METAL_FUNC float own_product(thread const X& x, thread const W& weights, int first_row, int out_rows, int depth, int lane) {
  int rows[ROWS];
  MARLIN_UNROLL
  for (int r = 0; r < ROWS; r++) rows[r] = metal::min(first_row + r, out_rows - 1);
  float sums[TILE][ROWS];
  multiply<TILE, ROWS>(x, weights, rows, depth, lane, sums);
  return own_sum<TILE, ROWS>(sums, lane);
}

METAL_FUNC float erf(float x) {  // which Metal has not; by a series of Numerical Recipes, 1.2e-7 off at most
  const float t = 1.0f / (1.0f + 0.5f * metal::abs(x));
  const float series = -1.26551223f + t * (1.00002368f + t * (0.37409196f + t * (0.09678418f + t * (-0.18628806f
      + t * (0.27886807f + t * (-1.13520398f + t * (1.48851587f + t * (-0.82215223f + t * 0.17087277f))))))));
  const float rest = t * metal::exp(-x * x + series);
  return x >= 0.0f ? 1.0f - rest : rest - 1.0f;
}

METAL_FUNC float activated(float x, int kind) {
  if (kind == SILU) return x / (1.0f + metal::exp(-x));
  if (kind == GELU) return 0.5f * x * (1.0f + erf(x * 0.70710678f));
  if (kind == GELU_TANH) return 0.5f * x * (1.0f + metal::precise::tanh(0.79788456f * (x + 0.044715f * x * x * x)));
  return metal::max(x, 0.0f);
}

}  // namespace marlin
