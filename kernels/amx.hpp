// Products in tiles of bfloat16 (Intel's AMX): out[M, N] = x[M, K] @ W[N, K]^T with sums in float32.
//
// A float32 is three bfloat16 exactly, eight bits each (but for subnormals, which tiles take as zero): as many `pieces` of x and of W
// are multiplied as the product needs. Weights of floating-point formats have few bits and are one piece, so three pieces of x give a
// float32 product. One piece of x is 8 bits.
#pragma once
#include <array>

#include "threads.hpp"
#include "targets.hpp"

#if MARLIN_AVX512 && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define MARLIN_AMX 1
#endif

namespace marlin::amx {

// Whether this process may use tiles; asks the system at the first call.
bool usable();

}  // namespace marlin::amx

#if MARLIN_AMX
namespace marlin::amx {

constexpr int64_t SIDE = 16, STEP = 32, TILE_BYTES = 1024;  // a tile: sixteen rows of x, or columns of W, by 32 of the depth
constexpr int64_t WIDTH = 2 * SIDE;                         // columns of a panel
constexpr int64_t ROWS_OF_A_PASS = 512;                     // for which a panel is laid out once

// Pieces of x and of W whose product counts: the others are about the last bit of a float32, and below.
template <int PIECES_OF_X, int PIECES_OF_W>
constexpr bool counts(int x, int w) {
  return x + w < std::max(PIECES_OF_X, PIECES_OF_W);
}

// GCC does not know what the loads of tiles read: it has to be in memory by now.
inline void settle_memory() { asm volatile("" ::: "memory"); }

// The tiles of a thread, while this lives: rows of x in those of sums and of x, all else whole.
class Configuration {
 public:
  explicit Configuration(int64_t rows_of_x) {
    struct {
      uint8_t palette = 1, start = 0, unused[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } tiles;
    static_assert(sizeof(tiles) == 64);
    for (int tile = 0; tile < 8; tile++) tiles.row_bytes[tile] = 64, tiles.rows[tile] = tile < 6 ? rows_of_x : SIDE;
    asm volatile("" ::"r"(&tiles) : "memory");  // all of it, of which GCC thinks that a pointer's size is read
    _tile_loadconfig(&tiles);
  }
  ~Configuration() { _tile_release(); }
  Configuration(const Configuration&) = delete;
};

// Tiles by number: sums 0 to 3 (first rows, then second rows, of two tiles of columns), x 4 and 5, W 6 and 7.
template <int ROW_TILES>
inline void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (ROW_TILES > 1) {
    _tile_zero(2);
    _tile_zero(3);
  }
}

template <int ROW_TILES>
inline void load_sums(const float* from, int64_t stride) {
  settle_memory();
  _tile_loadd(0, from, stride * 4);
  _tile_loadd(1, from + SIDE, stride * 4);
  if constexpr (ROW_TILES > 1) {
    _tile_loadd(2, from + SIDE * stride, stride * 4);
    _tile_loadd(3, from + SIDE * stride + SIDE, stride * 4);
  }
}

template <int ROW_TILES>
inline void store_sums(float* to, int64_t stride) {
  _tile_stored(0, to, stride * 4);
  _tile_stored(1, to + SIDE, stride * 4);
  if constexpr (ROW_TILES > 1) {
    _tile_stored(2, to + SIDE * stride, stride * 4);
    _tile_stored(3, to + SIDE * stride + SIDE, stride * 4);
  }
}

// sums += x [steps, pieces, TILES_LAID tiles, of which ROW_TILES count] @ W [steps, pieces, 2 tiles]
template <int ROW_TILES, int TILES_LAID, int PIECES_OF_X, int PIECES_OF_W>
inline void accumulate(const uint8_t* x, const uint8_t* w, int64_t steps) {
  settle_memory();
  for (int64_t step = 0; step < steps; step++) {
#pragma GCC unroll 3
    for (int piece = 0; piece < PIECES_OF_W; piece++, w += 2 * TILE_BYTES) {
      _tile_loadd(6, w, 64);
      _tile_loadd(7, w + TILE_BYTES, 64);
#pragma GCC unroll 3
      for (int other = 0; other < PIECES_OF_X; other++) {
        if (!counts<PIECES_OF_X, PIECES_OF_W>(other, piece)) continue;
        const uint8_t* rows = x + other * TILES_LAID * TILE_BYTES;
        _tile_loadd(4, rows, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (ROW_TILES > 1) {
          _tile_loadd(5, rows + TILE_BYTES, 64);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      }
    }
    x += PIECES_OF_X * TILES_LAID * TILE_BYTES;
  }
  settle_memory();  // what comes next may overwrite what was read
}

constexpr int32_t UPPER = int32_t(0xffff0000);

inline __m512 upper_bits(__m512 values) { return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(values), _mm512_set1_epi32(UPPER))); }

// Two vectors of values as words: one piece is the nearest bfloat16, of several each is the bits that the one before left.
template <int PIECES>
inline void split_rows(__m512 first, __m512 second, uint8_t* to, int64_t piece_stride) {
  if constexpr (PIECES == 1) {
    const __m512bh words = _mm512_cvtne2ps_pbh(second, first);
    std::memcpy(to, &words, sizeof(words));
  } else {
    alignas(64) static constexpr auto places = [] {
      std::array<int16_t, 32> odd{};
      for (int k = 0; k < 32; k++) odd[k] = int16_t(2 * k + 1);
      return odd;
    }();
    // What is left of an infinity is nothing; zero pieces of affine weights make NaN of it.
    const __mmask16 finite[2] = {_knot_mask16(_mm512_fpclass_ps_mask(first, 0x99)), _knot_mask16(_mm512_fpclass_ps_mask(second, 0x99))};
    for (int piece = 0; piece < PIECES; piece++, to += piece_stride) {
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(_mm512_castps_si512(first), _mm512_load_si512(places.data()), _mm512_castps_si512(second)));
      first = _mm512_maskz_sub_ps(finite[0], first, upper_bits(first));
      second = _mm512_maskz_sub_ps(finite[1], second, upper_bits(second));
    }
  }
}

// Sixteen columns' values of two neighbours of the depth, as dwords of pieces. Values of more bits than the pieces have are rounded to
// the nearest, halves away from zero.
template <int PIECES, bool ROUNDED>
inline __attribute__((always_inline)) void split_pairs(Vector first, Vector second, uint8_t* to) {
  static_assert(PIECES == 1 || !ROUNDED);
  if constexpr (ROUNDED) {
    first = bits_as<Vector>(bits_as<Integers>(first) + 0x8000);
    second = bits_as<Vector>(bits_as<Integers>(second) + 0x8000);
  }
  for (int piece = 0; piece < PIECES; piece++, to += 2 * TILE_BYTES) {
    const __m512i lower = _mm512_srli_epi32(__m512i(first), 16);
    _mm512_store_si512(to, _mm512_mask_mov_epi16(lower, 0xaaaaaaaa, __m512i(second)));
    if (piece + 1 < PIECES) first -= Vector(upper_bits(__m512(first))), second -= Vector(upper_bits(__m512(second)));
  }
}

// Where in a panel depths 2 * pair and 2 * pair + 1 of one half of its columns are: [steps, pieces, halves, 16 pairs, 16 columns].
template <int PIECES>
constexpr int64_t place_of(int64_t half, int64_t pair) {
  return (pair / SIDE * PIECES * 2 + half) * TILE_BYTES + pair % SIDE * 64;
}

// Rows of x as tiles: [blocks, steps, pieces, ROW_TILES, 16 rows, 32 values]; zeros behind the last row and the last value.
template <int PIECES, int ROW_TILES>
void lay_out(const float* x, int64_t rows, int64_t depth, uint8_t* to) {
  constexpr int64_t HIGH = ROW_TILES * SIDE;
  const int64_t blocks = (rows + HIGH - 1) / HIGH, steps = (depth + STEP - 1) / STEP;
  constexpr int64_t WORK_OF_A_VALUE = 2;
  over_threads(blocks * steps, HIGH * STEP * PIECES * WORK_OF_A_VALUE, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; item++) {
      const int64_t row = item / steps * HIGH, k = item % steps * STEP;
      uint8_t* tiles = to + item * PIECES * ROW_TILES * TILE_BYTES;
      for (int64_t m = 0; m < HIGH; m++) {
        const bool there = row + m < rows;
        const float* from = x + (there ? row + m : 0) * depth + k;
        const int64_t left = there ? depth - k : 0;
        const Vector front = left > 0 ? load_some(from, left) : Vector{};
        const Vector back = left > LANES ? load_some(from + LANES, left - LANES) : Vector{};
        split_rows<PIECES>(__m512(front), __m512(back), tiles + m * 64, ROW_TILES * TILE_BYTES);
      }
    }
  });
}

// Up to `ROWS_OF_A_PASS` rows, from row `row` of out on. unpack(w, column, step, steps, panel) lays out two halves of sixteen columns.
template <int PIECES_OF_X, int PIECES_OF_W, int ROW_TILES, class Unpack>
void pass(const float* x, int64_t row, int64_t rows, int64_t depth, Targets targets, const Unpack& unpack) {
  constexpr int64_t HIGH = ROW_TILES * SIDE, MOST_STEPS = PIECES_OF_X == 1 ? 64 : 32, FEW_STEPS = 8;
  const int64_t blocks = (rows + HIGH - 1) / HIGH, steps = (depth + STEP - 1) / STEP, step_bytes = PIECES_OF_X * ROW_TILES * TILE_BYTES;
  // Parts of the depth, whole lines of packed weights each: most rows of one stay in the second cache while all columns pass.
  constexpr int64_t STEPS_OF_LINE = 4;
  const int64_t parts = (steps + MOST_STEPS - 1) / MOST_STEPS;
  const int64_t part_steps = ((steps + parts - 1) / parts + STEPS_OF_LINE - 1) / STEPS_OF_LINE * STEPS_OF_LINE;
  thread_local AlignedBytes kept;
  uint8_t* tiles = kept.of(blocks * steps * step_bytes);
  lay_out<PIECES_OF_X, ROW_TILES>(x + row * depth, rows, depth, tiles);
  over_columns(targets, WIDTH, rows * depth, [&](const Target& target, int64_t first, int64_t last) {
    const Configuration configuration(std::min(rows, SIDE));
    const int64_t columns = target.w.columns, out_stride = columns;
    float* out = target.out + row * out_stride;
    thread_local AlignedBytes kept_panel;
    uint8_t* panel = kept_panel.of(part_steps * PIECES_OF_W * 2 * TILE_BYTES);
    alignas(64) float edge[HIGH * WIDTH];
    // Sums of a block of rows and a panel: from out, and to it.
    const auto place = [&](int64_t block, int64_t tile) { return out + block * HIGH * out_stride + tile * WIDTH; };
    const auto is_whole = [&](int64_t block, int64_t tile) {
      return (ROW_TILES == 1 || (block + 1) * HIGH <= rows) && (tile + 1) * WIDTH <= columns;
    };
    const auto over_edge = [&](int64_t block, int64_t tile, const auto& copy) {
      const int64_t some = std::min(WIDTH, columns - tile * WIDTH);
      for (int64_t m = 0; m < std::min(HIGH, rows - block * HIGH); m++) copy(place(block, tile) + m * out_stride, edge + m * WIDTH, some);
    };
    const auto load = [&](int64_t block, int64_t tile) {
      if (is_whole(block, tile)) return load_sums<ROW_TILES>(place(block, tile), out_stride);
      over_edge(block, tile, [](const float* from, float* to, int64_t some) { std::memcpy(to, from, some * sizeof(float)); });
      load_sums<ROW_TILES>(edge, WIDTH);
    };
    const auto store = [&](int64_t block, int64_t tile) {
      if (is_whole(block, tile)) return store_sums<ROW_TILES>(place(block, tile), out_stride);
      store_sums<ROW_TILES>(edge, WIDTH);
      over_edge(block, tile, [](float* to, const float* from, int64_t some) { std::memcpy(to, from, some * sizeof(float)); });
    };
    // What sums are written to lies a row apart: on its way while they are made.
    const auto ask_for = [&](int64_t block, int64_t tile) {
      for (int64_t m = 0; m < std::min(HIGH, rows - block * HIGH); m++)
        for (int64_t n = 0; n < WIDTH; n += SIDE) __builtin_prefetch(place(block, tile) + m * out_stride + n, 1);
    };
    if (blocks == 1) {  // the sums of a panel stay in tiles
      for (int64_t tile = first; tile < last; tile++) {
        clear_sums<ROW_TILES>();
        for (int64_t step = 0; step < steps; step += FEW_STEPS) {
          const int64_t some = std::min(FEW_STEPS, steps - step);
          unpack(target.w, tile * WIDTH, step, some, panel);
          accumulate<ROW_TILES, ROW_TILES, PIECES_OF_X, PIECES_OF_W>(tiles + step * step_bytes, panel, some);
        }
        store(0, tile);
        finish(target, row, rows, tile * WIDTH, std::min(WIDTH, columns - tile * WIDTH));
      }
      return;
    }
    for (int64_t step = 0; step < steps; step += part_steps) {
      const int64_t some = std::min(part_steps, steps - step);
      for (int64_t tile = first; tile < last; tile++) {
        unpack(target.w, tile * WIDTH, step, some, panel);
        for (int64_t block = 0; block < blocks; block++) {
          ask_for(block, tile);
          if (step) {
            load(block, tile);
          } else {
            clear_sums<ROW_TILES>();
          }
          const uint8_t* own = tiles + (block * steps + step) * step_bytes;
          if (rows - block * HIGH <= SIDE) {  // half of the last block, as 256 bytes and their end leave it
            accumulate<1, ROW_TILES, PIECES_OF_X, PIECES_OF_W>(own, panel, some);
          } else {
            accumulate<ROW_TILES, ROW_TILES, PIECES_OF_X, PIECES_OF_W>(own, panel, some);
          }
          store(block, tile);
          if (step + some == steps)
            finish(target, row + block * HIGH, std::min(HIGH, rows - block * HIGH), tile * WIDTH, std::min(WIDTH, columns - tile * WIDTH));
        }
      }
    }
  });
}

// All targets, over threads.
template <int PIECES_OF_X, int PIECES_OF_W, class Unpack>
void multiply(const float* x, int64_t rows, int64_t depth, Targets targets, const Unpack& unpack) {
  const int64_t passes = (rows + ROWS_OF_A_PASS - 1) / ROWS_OF_A_PASS, HIGH = 2 * SIDE;
  const int64_t at_once = ((rows + passes - 1) / passes + HIGH - 1) / HIGH * HIGH;
  for (int64_t row = 0; row < rows; row += at_once) {
    const int64_t some = std::min(at_once, rows - row);
    const auto run = [&](auto row_tiles) { pass<PIECES_OF_X, PIECES_OF_W, decltype(row_tiles)::value>(x, row, some, depth, targets, unpack); };
    if (some <= SIDE) {
      run(std::integral_constant<int, 1>{});
    } else {
      run(std::integral_constant<int, 2>{});
    }
  }
}

}  // namespace marlin::amx
#endif
