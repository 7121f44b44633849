// out[M, N] = x[M, K] @ W[N, K]^T for W packed as nvfp4, mxfp4, mxfp8, int4 or int8. K is a multiple of 32.
//
// inputs   x[M, K] T; weight[N, K * BITS / 32] uint32; scales[N, K / GROUP] uint8, or T where AFFINE; zeros: as scales, where AFFINE
// output   out[M, N] T
// template T; BITS 4 or 8; GROUP 16 (scales in E4M3) or 32 (E8M0); AFFINE: codes are whole numbers, times scale plus zero, GROUP
//          is a multiple of 32 and T has 16 bits; ROW_TILES x 16 rows of W and X_TILES x 8 rows of x a block; STAGES of steps
//          whose weights are on their way at once; WARPS of a block; TOGETHER: see cuda_kept.py; X_SHARED: x goes through
//          shared memory; X_TILES is 1 then, and 2 M * K, or 6 M * K for float32, at most 32 KB, with K rounded up to a
//          multiple of 128
// grid     (ceil(N / rows of W) * THREADS, ceil(M / rows of x)), blocks of THREADS = 32 * WARPS
//
// W is the left operand of the matrix units and x^T the right one, so that up to 8 rows of x cost what one costs, and each
// weight is loaded and decoded once for all of them. The order of K within a product is free as long as both operands agree:
// so a lane takes 16 consecutive bytes of a row of W, as one load brings them, and looks up the x that belongs to them.
// The warps of a block share K, and their sums meet in shared memory.
// float32 x is split in three bfloat16 whose sum it is, up to the last bit: each part is a product of its own.
// Splitting takes as long as all the rest, so a block does it once for a few rows (X_SHARED), not once a warp.

  constexpr bool HALF = marlin::is_same<T, __half>;
  constexpr int PARTS = sizeof(T) == 4 ? 3 : 1;
  constexpr int ROWS = 16 * ROW_TILES;
  constexpr int X_ROWS = 8 * X_TILES;
  constexpr int LANE_VALUES = 128 / BITS;                 // of a row of W, in one load of a lane
  constexpr int STEP = 4 * LANE_VALUES;                   // of K, by the four lanes that share a row
  constexpr int GROUPS = LANE_VALUES > GROUP ? LANE_VALUES / GROUP : 1;  // scales that a lane's values have
  using Codes = marlin::Codes<HALF, BITS>;
  constexpr int PAIRS = Codes::PAIRS;
  constexpr int WORD_OF_X = 2 * PAIRS * sizeof(T) / 4;  // words of x that meet one word of W
  constexpr bool X_EARLY = !X_SHARED && X_TILES < 4;    // loaded with the weights; of more there is no room in registers

  // Operands are w * 2^OPERAND_EXPONENT, which keeps weights of any plausible size among the normal numbers of the operand's
  // type; for nvfp4 exactly, since the scale's range is known. Beyond that range a product overflows to infinity.
  constexpr int OPERAND_EXPONENT = AFFINE ? 0 : !HALF ? -26 : GROUP == 16 ? -8 : BITS == 4 ? 4 : 8;
  // mxfp4 as float16: 2^14 and the scale need a product each, since both in one overflow.
  constexpr bool TWO_PRODUCTS = !AFFINE && HALF && BITS == 4 && GROUP == 32;
  static_assert(!AFFINE || (GROUP % 32 == 0 && sizeof(T) == 2));
  constexpr int SCALE_EXPONENT = OPERAND_EXPONENT + (TWO_PRODUCTS ? 0 : Codes::CODE_EXPONENT);

  const int x_count = x_shape[0], depth = x_shape[1], row_count = weight_shape[0];
  const uint32_t last_column = depth - LANE_VALUES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int lane_row = lane / 4, lane_part = lane % 4;
  const int first_row = blockIdx.x * ROWS, first_x = blockIdx.y * X_ROWS;

  __shared__ float partial[WARPS][X_ROWS][ROWS];
  __shared__ __align__(16) uint32_t x_shared[X_SHARED ? 8192 : 1];  // [row][step][word][lane_part][PARTS][PAIRS]

  auto multiply = [&](auto wide) {
    constexpr bool WIDE = decltype(wide)::value;
    float sums[ROW_TILES][X_TILES][4] = {};

    // A lane's part of rows lane_row and lane_row + 8 of each tile; rows after the last one repeat it and are not written.
    const uint32_t* codes[ROW_TILES][2];
    int64_t first_scale[ROW_TILES][2];
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; tile++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int64_t row = min(first_row + tile * 16 + half * 8 + lane_row, row_count - 1);
        codes[tile][half] = weight + row * (depth * BITS / 32);
        first_scale[tile][half] = row * (depth / GROUP);
      }
    }

    const T* x_rows[X_TILES];  // likewise: rows after the last one repeat it
#pragma unroll
    for (int tile = 0; tile < X_TILES; tile++) {
      x_rows[tile] = x + int64_t(min(first_x + tile * 8 + lane_row, x_count - 1)) * depth;
    }

    uint32_t words[STAGES][ROW_TILES][2][4];
    uint32_t scale_codes[STAGES][ROW_TILES][2];
    uint32_t x_words[STAGES][X_TILES][X_EARLY ? LANE_VALUES * sizeof(T) / 4 : 1];
    // Past the last column some other is loaded, and its scale is taken as zero: cheaper than a branch.
    auto load = [&](int stage, uint32_t column) {
      column = min(column, last_column);
      if constexpr (X_EARLY) {
#pragma unroll
        for (int tile = 0; tile < X_TILES; tile++) marlin::load_words<WIDE>(x_rows[tile] + column, x_words[stage][tile]);
      }
#pragma unroll
      for (int tile = 0; tile < ROW_TILES; tile++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          marlin::load_once<WIDE>(codes[tile][half] + column / (32 / BITS), words[stage][tile][half]);
          const int64_t place = first_scale[tile][half] + column / GROUP;
          const uint8_t* from = reinterpret_cast<const uint8_t*>(scales) + place;
          if constexpr (AFFINE) {
            const uint16_t scale = reinterpret_cast<const uint16_t*>(scales)[place];
            scale_codes[stage][tile][half] = scale | uint32_t(reinterpret_cast<const uint16_t*>(zeros)[place]) << 16;
          } else if constexpr (GROUPS == 2 && WIDE) {
            scale_codes[stage][tile][half] = *reinterpret_cast<const uint16_t*>(from);
          } else {
            scale_codes[stage][tile][half] = from[0] | (GROUPS == 2 ? from[GROUPS - 1] << 8 : 0);
          }
        }
      }
    };

    const uint32_t lane_column = warp * STEP + lane_part * LANE_VALUES;
#pragma unroll
    for (int stage = 0; stage < STAGES; stage++) load(stage, lane_column + stage * WARPS * STEP);

    const int steps = (depth + STEP - 1) / STEP;
    constexpr int PIECE = PARTS * PAIRS;
    if constexpr (X_SHARED) {
      for (int i = threadIdx.x; i < x_count * steps * 16; i += WARPS * 32) {
        const int row = i / (steps * 16), column = i / 16 % steps * STEP + i % 4 * LANE_VALUES + i / 4 % 4 * 2 * PAIRS;
        uint32_t pairs[PARTS][PAIRS] = {};
        if (column < depth) {
          uint32_t loaded[WORD_OF_X];
          marlin::load_words<WIDE>(x + int64_t(row) * depth + column, loaded);
          marlin::x_pairs_of<T>(loaded, pairs);
        }
#pragma unroll
        for (int word = 0; word < PIECE; word++) x_shared[i * PIECE + word] = pairs[word / PAIRS][word % PAIRS];
      }
      __syncthreads();
    }

    // Each pass of the inner loop uses what it loaded STAGES steps ago and loads what comes STAGES steps later.
    for (int at = warp * STEP; at < depth; at += STAGES * WARPS * STEP) {
#pragma unroll
      for (int stage = 0; stage < STAGES; stage++) {
        const int first = at + stage * WARPS * STEP;
        if (first >= depth) break;  // the same for all lanes, since a product needs the whole warp
        const uint32_t column = first + lane_part * LANE_VALUES;
        const T* x_here[X_TILES];
#pragma unroll
        for (int tile = 0; tile < X_TILES; tile++) x_here[tile] = x_rows[tile] + min(column, last_column);
        uint32_t factors[ROW_TILES][2][GROUPS];
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; tile++) {
#pragma unroll
          for (int half = 0; half < 2; half++) {
            if constexpr (AFFINE) {
              factors[tile][half][0] = scale_codes[stage][tile][half];
            } else {
              marlin::scale_pairs<HALF, SCALE_EXPONENT>(scale_codes[stage][tile][half], factors[tile][half]);
            }
            if (column > last_column) {
#pragma unroll
              for (int group = 0; group < GROUPS; group++) factors[tile][half][group] = 0;
            }
          }
        }
#pragma unroll
        for (int word = 0; word < 4; word++) {
          // x of the columns whose weights this word holds, in the order in which the codes are decoded.
          uint32_t x_pairs[X_TILES][PARTS][PAIRS];
          if constexpr (X_SHARED) {
            const int step = first / STEP;
            const int row = min(lane_row, x_count - 1);
            const uint32_t* from = x_shared + ((row * steps + step) * 16 + word * 4 + lane_part) * PIECE;
#pragma unroll
            for (int part = 0; part < PARTS; part++) marlin::load_words<true>(from + part * PAIRS, x_pairs[0][part]);
          } else {
#pragma unroll
            for (int tile = 0; tile < X_TILES; tile++) {
              if constexpr (X_EARLY) {
                marlin::x_pairs_of<T>(x_words[stage][tile] + word * WORD_OF_X, x_pairs[tile]);
              } else {
                uint32_t loaded[WORD_OF_X];
                marlin::load_words<WIDE>(x_here[tile] + word * 2 * PAIRS, loaded);
                marlin::x_pairs_of<T>(loaded, x_pairs[tile]);
              }
            }
          }
#pragma unroll
          for (int tile = 0; tile < ROW_TILES; tile++) {
            uint32_t pairs[2][PAIRS];
#pragma unroll
            for (int half = 0; half < 2; half++) {
              const uint32_t factor = factors[tile][half][word * GROUPS / 4];
              if constexpr (AFFINE) {
                marlin::whole_pairs<HALF, BITS>(words[stage][tile][half][word], pairs[half]);
                const uint32_t scale = __byte_perm(factor, 0, 0x1010), zero = __byte_perm(factor, 0, 0x3232);
#pragma unroll
                for (int p = 0; p < PAIRS; p++) pairs[half][p] = marlin::product_plus<HALF>(pairs[half][p], scale, zero);
              } else {
                Codes::decode(words[stage][tile][half][word], pairs[half]);
#pragma unroll
                for (int p = 0; p < PAIRS; p++) {
                  if constexpr (TWO_PRODUCTS) {
                    const float unit = marlin::power_of_two<Codes::CODE_EXPONENT>();
                    pairs[half][p] = marlin::product_of_pairs<HALF>(pairs[half][p], marlin::pair_of<HALF>(unit, unit));
                  }
                  pairs[half][p] = marlin::product_of_pairs<HALF>(pairs[half][p], factor);
                }
              }
            }
#pragma unroll
            for (int p = 0; p < PAIRS; p += 2) {
#pragma unroll
              for (int x_tile = 0; x_tile < X_TILES; x_tile++) {
#pragma unroll
                for (int part = 0; part < PARTS; part++) {
                  marlin::multiply_tiles<HALF>(
                      sums[tile][x_tile], pairs[0][p], pairs[1][p], pairs[0][p + 1], pairs[1][p + 1],
                      x_pairs[x_tile][part][p], x_pairs[x_tile][part][p + 1]);
                }
              }
            }
          }
        }
        if (first + STAGES * WARPS * STEP < depth) load(stage, column + STAGES * WARPS * STEP);
      }
    }

#pragma unroll
    for (int tile = 0; tile < ROW_TILES; tile++) {
#pragma unroll
      for (int x_tile = 0; x_tile < X_TILES; x_tile++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          partial[warp][x_tile * 8 + lane_part * 2 + i % 2][tile * 16 + i / 2 * 8 + lane_row] = sums[tile][x_tile][i];
        }
      }
    }
  };

  if (marlin::aligned_to_16_bytes(x) && marlin::aligned_to_16_bytes(weight) && marlin::aligned_to_16_bytes(scales)) {
    multiply(marlin::Constant<true>{});
  } else {
    multiply(marlin::Constant<false>{});
  }

  // The sums of all warps, each output by one thread, rows of W next to each other as they stand in memory.
  __syncthreads();
  for (int i = threadIdx.x; i < X_ROWS * ROWS; i += WARPS * 32) {
    const int row = first_row + i % ROWS, x_row = first_x + i / ROWS;
    float sum = 0.0f;
#pragma unroll
    for (int other = 0; other < WARPS; other++) sum += partial[other][i / ROWS][i % ROWS];
    if (row < row_count && x_row < x_count) {
      out[int64_t(x_row) * row_count + row] = marlin::from_float<T>(sum * marlin::power_of_two<-OPERAND_EXPONENT>());
    }
  }
