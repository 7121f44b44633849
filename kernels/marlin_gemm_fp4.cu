// out[M, N] = x[M, K] @ W[N, K]^T for W packed as nvfp4, mxfp4 or mxfp8. K is a multiple of 32.
//
// inputs   x[M, K] T; weight[N, K * BITS / 32] uint32; scales[N, K / GROUP] uint8
// output   out[M, N] T
// template T; BITS 4 or 8; GROUP 16 (scales in E4M3) or 32 (E8M0); ROW_TILES x 16 rows of W and X_TILES x 8 rows of x a block
// grid     (ceil(N / rows of W) * THREADS, ceil(M / rows of x)), blocks of THREADS = 256
//
// W is the left operand of the matrix units and x^T the right one, so that up to 8 rows of x cost what one costs, and each
// weight is loaded and decoded once for all of them. The order of K within a product is free as long as both operands agree:
// so a lane takes 16 consecutive bytes of a row of W, as one load brings them, and looks up the x that belongs to them.
// The warps of a block share K, and their sums meet in shared memory.
// float32 x is split in three bfloat16 whose sum it is, up to the last bit: each part is a product of its own.

  constexpr bool HALF = cuda::std::is_same_v<T, __half>;
  constexpr int PARTS = sizeof(T) == 4 ? 3 : 1;
  constexpr int WARPS = 8;
  constexpr int ROWS = 16 * ROW_TILES;
  constexpr int X_ROWS = 8 * X_TILES;
  constexpr int STAGES = 2;                               // steps whose weights are on their way
  constexpr int LANE_VALUES = 128 / BITS;                 // of a row of W, in one load of a lane
  constexpr int STEP = 4 * LANE_VALUES;                   // of K, by the four lanes that share a row
  constexpr int GROUPS = LANE_VALUES > GROUP ? LANE_VALUES / GROUP : 1;  // scales that a lane's values have
  using Codes = marlin::Codes<HALF, BITS>;
  constexpr int PAIRS = Codes::PAIRS;

  // Operands are w * 2^OPERAND_EXPONENT, which keeps weights of any plausible size among the normal numbers of the operand's
  // type; for nvfp4 exactly, since the scale's range is known. Beyond that range a product overflows to infinity.
  constexpr int OPERAND_EXPONENT = !HALF ? -26 : GROUP == 16 ? -8 : BITS == 4 ? 4 : 8;
  // mxfp4 as float16: 2^14 and the scale need a product each, since both in one overflow.
  constexpr bool TWO_PRODUCTS = HALF && BITS == 4 && GROUP == 32;
  constexpr int SCALE_EXPONENT = OPERAND_EXPONENT + (TWO_PRODUCTS ? 0 : Codes::CODE_EXPONENT);

  const int x_count = x_shape[0], depth = x_shape[1], row_count = weight_shape[0];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int lane_row = lane / 4, lane_part = lane % 4;
  const int first_row = blockIdx.x * ROWS, first_x = blockIdx.y * X_ROWS;

  __shared__ float partial[WARPS][X_ROWS][ROWS];

  auto multiply = [&](auto wide) {
    constexpr bool WIDE = decltype(wide)::value;
    float sums[ROW_TILES][X_TILES][4] = {};

    // A lane's part of rows lane_row and lane_row + 8 of each tile; rows after the last one repeat it and are not written.
    const uint32_t* codes[ROW_TILES][2];
    const uint8_t* codes_of_scales[ROW_TILES][2];
#pragma unroll
    for (int tile = 0; tile < ROW_TILES; tile++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int64_t row = min(first_row + tile * 16 + half * 8 + lane_row, row_count - 1);
        codes[tile][half] = weight + row * (depth * BITS / 32);
        codes_of_scales[tile][half] = scales + row * (depth / GROUP);
      }
    }

    const T* x_rows[X_TILES];  // likewise: rows after the last one repeat it
#pragma unroll
    for (int tile = 0; tile < X_TILES; tile++) {
      x_rows[tile] = x + int64_t(min(first_x + tile * 8 + lane_row, x_count - 1)) * depth;
    }

    uint32_t words[STAGES][ROW_TILES][2][4];
    uint8_t scale_codes[STAGES][ROW_TILES][2][GROUPS];
    // Past the last column some other is loaded, and its scale is taken as zero: cheaper than a branch.
    auto load = [&](int stage, int column) {
      column = min(column, depth - LANE_VALUES);
#pragma unroll
      for (int tile = 0; tile < ROW_TILES; tile++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
          marlin::load_words<WIDE>(codes[tile][half] + column * BITS / 32, words[stage][tile][half]);
#pragma unroll
          for (int group = 0; group < GROUPS; group++) {
            scale_codes[stage][tile][half][group] = codes_of_scales[tile][half][column / GROUP + group];
          }
        }
      }
    };

    const int lane_column = warp * STEP + lane_part * LANE_VALUES;
#pragma unroll
    for (int stage = 0; stage < STAGES; stage++) load(stage, lane_column + stage * WARPS * STEP);

    for (int first = warp * STEP; first < depth; first += STAGES * WARPS * STEP) {
#pragma unroll
      for (int stage = 0; stage < STAGES; stage++) {
        if (first + stage * WARPS * STEP >= depth) break;  // the same for all lanes: products need the whole warp
        const int column = first + stage * WARPS * STEP + lane_part * LANE_VALUES;
        const bool real = column < depth;
        const int x_column = min(column, depth - LANE_VALUES);
        uint32_t factors[ROW_TILES][2][GROUPS];
#pragma unroll
        for (int tile = 0; tile < ROW_TILES; tile++) {
#pragma unroll
          for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
              float scale = marlin::scale_of<GROUP == 16>(scale_codes[stage][tile][half][group]);
              scale *= marlin::power_of_two<SCALE_EXPONENT>();
              if (!real) scale = 0.0f;
              factors[tile][half][group] = marlin::pair_of<HALF>(scale, scale);
            }
          }
        }
#pragma unroll
        for (int word = 0; word < 4; word++) {
          // x of the columns whose weights this word holds, in the order in which the codes are decoded.
          uint32_t x_pairs[X_TILES][PARTS][PAIRS];
#pragma unroll
          for (int tile = 0; tile < X_TILES; tile++) {
            uint32_t loaded[2 * PAIRS * sizeof(T) / 4];
            marlin::load_words<WIDE>(x_rows[tile] + x_column + word * 2 * PAIRS, loaded);
#pragma unroll
            for (int p = 0; p < PAIRS; p++) {
              if constexpr (PARTS == 1) {
                x_pairs[tile][0][p] = __byte_perm(loaded[p / 2], loaded[(p + PAIRS) / 2], p % 2 ? 0x7632 : 0x5410);
              } else {
                float first_rest = __uint_as_float(loaded[p]), second_rest = __uint_as_float(loaded[p + PAIRS]);
#pragma unroll
                for (int part = 0; part < PARTS; part++) {
                  x_pairs[tile][part][p] = marlin::pair_of<false>(first_rest, second_rest);
                  first_rest -= __uint_as_float(x_pairs[tile][part][p] << 16);
                  second_rest -= __uint_as_float(x_pairs[tile][part][p] & 0xffff0000u);
                }
              }
            }
          }
#pragma unroll
          for (int tile = 0; tile < ROW_TILES; tile++) {
            uint32_t pairs[2][PAIRS];
#pragma unroll
            for (int half = 0; half < 2; half++) {
              Codes::decode(words[stage][tile][half][word], pairs[half]);
              const uint32_t factor = factors[tile][half][word * GROUPS / 4];
#pragma unroll
              for (int p = 0; p < PAIRS; p++) {
                if constexpr (TWO_PRODUCTS) {
                  const float unit = marlin::power_of_two<Codes::CODE_EXPONENT>();
                  pairs[half][p] = marlin::product_of_pairs<HALF>(pairs[half][p], marlin::pair_of<HALF>(unit, unit));
                }
                pairs[half][p] = marlin::product_of_pairs<HALF>(pairs[half][p], factor);
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
        load(stage, column + STAGES * WARPS * STEP);
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

  if (marlin::aligned_to_16_bytes(x) && marlin::aligned_to_16_bytes(weight)) {
    multiply(cuda::std::true_type{});
  } else {
    multiply(cuda::std::false_type{});
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
