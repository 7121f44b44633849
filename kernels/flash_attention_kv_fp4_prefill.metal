// One launch of an attention of many rows of queries over keys and values that stand in pages, packed (nvfp4, mxfp8) or dense:
// up to three pages, one after the other. attention_combine joins what several launches have seen; one alone is the result.
//
// A threadgroup has 32 rows of queries, 8 a simdgroup. All its threads decode KEYS keys, and as many values, to threadgroup memory;
// there they are operands of 8 x 8 matrix products. bfloat holds any number of the packed formats as it is. A lane holds two numbers
// of a matrix, side by side, both of the row that is the lane's own (MLX's steel kernels have the same map of lanes).
//
// inputs   as flash_attention_kv_fp4; sizes[13] int32 with 0 for rows a split
// outputs  parts[1, batch, heads, rows, HEAD_DIM] OUT, divided by the weights where FINAL
//          stats[1, batch, heads, rows, 2] float32: peak and weight
// template OUT; K_TYPE, K_BITS, V_TYPE, V_BITS: uint32 in 4 or 8 bits, or a float type; K_TILE, V_TILE: bfloat for packed ones,
//          else the same float type; HEAD_DIM, a multiple of 8; KEYS, a multiple of 8; FINAL
// grid     (ceil(heads / kv_heads * rows / 32) * 128, kv_heads, batch) threads

  constexpr int ROWS = 32, THREADS = 128, PIECES = HEAD_DIM / marlin::PIECE, COLUMNS = HEAD_DIM / 8, BLOCKS = KEYS / 8;
  constexpr int STRIDE = HEAD_DIM + 8;  // of rows in threadgroup memory, so that neighbouring rows lie in other banks
  const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup, thread_of_group = simdgroup * 32 + lane;
  const int heads = sizes[0], kv_heads = sizes[1], rows = sizes[2], total = sizes[3], window = sizes[7];
  const bool causal = sizes[6] != 0;
  const int shared_rows = heads / kv_heads * rows;  // that see the same keys
  const int kv_head = threadgroup_position_in_grid.y, batch = threadgroup_position_in_grid.z;
  const int64_t base_row = (int64_t(batch) * heads + kv_head * (heads / kv_heads)) * rows;  // of the queries
  const int first_row = threadgroup_position_in_grid.x * ROWS, last_row = metal::min(first_row + ROWS, shared_rows) - 1;

  // This lane's row of the simdgroup's matrices, and the first of its two columns.
  const int matrix_row = (lane / 4 & 4) + lane / 2 % 4, matrix_column = (lane / 4 & 2) * 2 + lane % 2 * 2;
  const int own_row = first_row + simdgroup * 8 + matrix_row, row = metal::min(own_row, last_row);

  // What this lane's row sees, and bounds of what any row of the threadgroup sees.
  const int first_real = sizes[8] ? left_padding[batch] : 0, end_real = sizes[9] ? metal::min(lengths[batch], total) : total;
  const marlin::Interval seen = marlin::sight(total - rows + row % rows, first_real, end_real, causal, window);
  const bool one_head = first_row / rows == last_row / rows;
  const int lowest = total - rows + (one_head ? first_row % rows : 0), highest = one_head ? total - rows + last_row % rows : total - 1;
  const int reach_low = marlin::sight(lowest, first_real, end_real, causal, window).low;
  const int reach_high = marlin::sight(highest, first_real, end_real, causal, window).high;

  metal::simdgroup_matrix<float, 8, 8> query[COLUMNS], sum[COLUMNS];
  MARLIN_UNROLL
  for (int c = 0; c < COLUMNS; c++) {
    MARLIN_UNROLL
    for (int e = 0; e < 2; e++) {
      const float value = float(queries[(base_row + row) * HEAD_DIM + c * 8 + matrix_column + e]);
      query[c].thread_elements()[e] = value * (factor[0] * marlin::LOG2_E);
      sum[c].thread_elements()[e] = 0.0f;
    }
  }
  float peak = marlin::NOTHING_SEEN, weight = 0.0f;  // weight: of this lane's columns only, until the end

  threadgroup K_TILE key_tile[KEYS * STRIDE];
  threadgroup V_TILE value_tile[KEYS * STRIDE];
  int base = sizes[4];
  for (int page = 0; page < 3; page++) {
    marlin::Rows<K_TYPE, K_BITS> keys;
    marlin::Rows<V_TYPE, V_BITS> values;
    if (page == 0) {
      MARLIN_HEAD(keys, batch, kv_head, keys_0, keys_0_strides, key_scales_0, key_scales_0_strides)
      MARLIN_HEAD(values, batch, kv_head, values_0, values_0_strides, value_scales_0, value_scales_0_strides)
    } else if (page == 1) {
      MARLIN_HEAD(keys, batch, kv_head, keys_1, keys_1_strides, key_scales_1, key_scales_1_strides)
      MARLIN_HEAD(values, batch, kv_head, values_1, values_1_strides, value_scales_1, value_scales_1_strides)
    } else {
      MARLIN_HEAD(keys, batch, kv_head, keys_2, keys_2_strides, key_scales_2, key_scales_2_strides)
      MARLIN_HEAD(values, batch, kv_head, values_2, values_2_strides, value_scales_2, value_scales_2_strides)
    }
    const int first = metal::max(reach_low - base, 0), end = metal::min(reach_high - base, sizes[10 + page]);
    for (int start = first; start < end; start += KEYS) {
      // All simdgroups are done with the keys and values that stand there.
      threadgroup_barrier(mem_flags::mem_threadgroup);
      for (int n = thread_of_group; n < KEYS * PIECES; n += THREADS) {
        const int key = metal::min(start + n / PIECES, end - 1), to = n / PIECES * STRIDE + n % PIECES * marlin::PIECE;
        float numbers[marlin::PIECE];
        const float key_factor = keys.template load<false>(key, n % PIECES, numbers);
        MARLIN_UNROLL
        for (int i = 0; i < marlin::PIECE; i++) key_tile[to + i] = K_TILE(numbers[i] * key_factor);
        const float value_factor = values.template load<false>(key, n % PIECES, numbers);
        MARLIN_UNROLL
        for (int i = 0; i < marlin::PIECE; i++) value_tile[to + i] = V_TILE(numbers[i] * value_factor);
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);

      metal::simdgroup_matrix<float, 8, 8> score[BLOCKS], operand;
      float highest_score = peak;
      MARLIN_UNROLL
      for (int b = 0; b < BLOCKS; b++) {
        MARLIN_UNROLL
        for (int e = 0; e < 2; e++) score[b].thread_elements()[e] = 0.0f;
        MARLIN_UNROLL
        for (int c = 0; c < COLUMNS; c++) {
          MARLIN_UNROLL
          for (int e = 0; e < 2; e++) {
            operand.thread_elements()[e] = float(key_tile[(b * 8 + matrix_column + e) * STRIDE + c * 8 + matrix_row]);
          }
          metal::simdgroup_multiply_accumulate(score[b], query[c], operand, score[b]);
        }
        MARLIN_UNROLL
        for (int e = 0; e < 2; e++) {
          const int key = start + b * 8 + matrix_column + e, place = base + key;
          const bool sees = key < end && place >= seen.low && place < seen.high;
          if (!sees) score[b].thread_elements()[e] = marlin::HIDDEN;
          highest_score = metal::max(highest_score, score[b].thread_elements()[e]);
        }
      }
      // Lanes of one row differ in bits 0 and 3 of their numbers.
      highest_score = metal::max(highest_score, metal::simd_shuffle_xor(highest_score, ushort(1)));
      highest_score = metal::max(highest_score, metal::simd_shuffle_xor(highest_score, ushort(8)));
      const float shrink = metal::fast::exp2(peak - highest_score);
      peak = highest_score;
      weight *= shrink;
      MARLIN_UNROLL
      for (int b = 0; b < BLOCKS; b++) {
        MARLIN_UNROLL
        for (int e = 0; e < 2; e++) {
          score[b].thread_elements()[e] = metal::fast::exp2(score[b].thread_elements()[e] - peak);
          weight += score[b].thread_elements()[e];
        }
      }
      MARLIN_UNROLL
      for (int c = 0; c < COLUMNS; c++) {
        MARLIN_UNROLL
        for (int e = 0; e < 2; e++) sum[c].thread_elements()[e] *= shrink;
        MARLIN_UNROLL
        for (int b = 0; b < BLOCKS; b++) {
          MARLIN_UNROLL
          for (int e = 0; e < 2; e++) {
            operand.thread_elements()[e] = float(value_tile[(b * 8 + matrix_row) * STRIDE + c * 8 + matrix_column + e]);
          }
          metal::simdgroup_multiply_accumulate(sum[c], score[b], operand, sum[c]);
        }
      }
    }
    base += sizes[10 + page];
  }

  weight += metal::simd_shuffle_xor(weight, ushort(1));
  weight += metal::simd_shuffle_xor(weight, ushort(8));
  if (own_row > last_row) return;
  const float divisor = FINAL && weight != 0.0f ? weight : 1.0f;
  MARLIN_UNROLL
  for (int c = 0; c < COLUMNS; c++) {
    MARLIN_UNROLL
    for (int e = 0; e < 2; e++) {
      parts[(base_row + row) * HEAD_DIM + c * 8 + matrix_column + e] = OUT(sum[c].thread_elements()[e] / divisor);
    }
  }
  if (matrix_column == 0) {
    stats[(base_row + row) * 2] = peak;
    stats[(base_row + row) * 2 + 1] = weight;
  }
