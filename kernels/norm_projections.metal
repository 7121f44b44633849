// Queries, keys and values of one new row of each stream: norm(x) @ [Q; K; V]^T, queries and keys rotated by their position. The
// new keys and values stand in row `at` of a copy of the rows that a short cache, the tail, holds: nothing is changed in place.
//
// inputs   rows[streams, depth] T; gains[depth] T; query_words, query_scales, query_zeros, and so of key and value: of one format,
//          see few_rows.h.metal; keys_before, values_before[streams, kv_heads, tail_rows, HEAD_DIM] T
//          left_padding[streams] int32; counts[2] int32: rows before the tail, row of the tail that is new
//          factors[5] float32: of the three products, eps of the norm, logarithm of the rotation's base, to the base 2
//          sizes[6] int32: streams, depth, heads, kv_heads, tail_rows, whether left_padding counts
// outputs  queries[streams, heads, HEAD_DIM]; keys, values[streams, kv_heads, tail_rows, HEAD_DIM] T
// template T; KIND, GROUP; NORM; TILE rows of x; ROWS of weights a simdgroup, even; SIMDGROUPS; HEAD_DIM; ROTATION: 0 none, 1 of
//          the halves of a head, 2 of neighbours
// grid     (products + copies, ceil(streams / TILE)): products are ceil((heads + 2 * kv_heads) * HEAD_DIM / (ROWS * SIMDGROUPS))
//          threadgroups of SIMDGROUPS * 32 threads; copies are any number of threadgroups, which share the rows that stay

  const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
  const int streams = sizes[0], depth = sizes[1], heads = sizes[2], kv_heads = sizes[3], tail_rows = sizes[4];
  const int first = threadgroup_position_in_grid.y * TILE, at = counts[1];
  const int all_rows = (heads + 2 * kv_heads) * HEAD_DIM;
  const int products = (all_rows + ROWS * SIMDGROUPS - 1) / (ROWS * SIMDGROUPS);

  const int copier = int(threadgroup_position_in_grid.x) - products;
  if (copier >= 0) {
    const int copiers = int(threadgroups_per_grid.x) - products, threads = SIMDGROUPS * 32;
    const int end = metal::min(first + TILE, streams) * kv_heads * tail_rows;
    for (int row = first * kv_heads * tail_rows + copier * SIMDGROUPS + simdgroup; row < end; row += copiers * threads / 32) {
      if (row % tail_rows == at) continue;
      for (int i = lane; i < HEAD_DIM; i += 32) {
        const int64_t place = int64_t(row) * HEAD_DIM + i;
        keys[place] = keys_before[place];
        values[place] = values_before[place];
      }
    }
    return;
  }

  threadgroup float left[2 * SIMDGROUPS * TILE];
  marlin::NormedRows<T, NORM, TILE> x;
  x.plain = {rows, depth, first, streams - 1};
  x.gains = gains;
  x.measure(factors[3], left, simdgroup, SIMDGROUPS, lane);

  // The rows of a simdgroup are of one head. Where it is rotated they are pairs that turn together.
  const int block = threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup, head = block * ROWS / HEAD_DIM;
  const int within = block * ROWS % HEAD_DIM;
  const int layer = head < heads ? 0 : head < heads + kv_heads ? 1 : 2;
  const int own_head = head - (layer == 0 ? 0 : layer == 1 ? heads : heads + kv_heads);
  const bool present = head < heads + 2 * kv_heads;
  marlin::Weights<T, KIND, GROUP> weights;
  if (layer == 0) {
    MARLIN_WEIGHTS(weights, query)
  } else if (layer == 1) {
    MARLIN_WEIGHTS(weights, key)
  } else {
    MARLIN_WEIGHTS(weights, value)
  }
  int columns[ROWS], of_weights[ROWS];
  MARLIN_UNROLL
  for (int r = 0; r < ROWS; r++) {
    columns[r] = ROTATION == 1 ? within / 2 + r / 2 + r % 2 * (HEAD_DIM / 2) : within + r;
    of_weights[r] = present ? own_head * HEAD_DIM + columns[r] : 0;
  }
  float sums[TILE][ROWS];
  marlin::multiply<TILE, ROWS>(x, weights, of_weights, depth, lane, sums);

  if (ROTATION != 0 && layer < 2) {
    MARLIN_UNROLL
    for (int row = 0; row < TILE; row++) {
      const int stream = metal::min(first + row, streams - 1);
      const float position = float(counts[0] + at - (sizes[5] ? left_padding[stream] : 0));
      MARLIN_UNROLL
      for (int r = 0; r < ROWS; r += 2) {
        const float angle = position * metal::exp2(-float(within / 2 + r / 2) / (HEAD_DIM / 2) * factors[4]);
        const float cosine = metal::cos(angle), sine = metal::sin(angle), one = sums[row][r], other = sums[row][r + 1];
        sums[row][r] = one * cosine - other * sine;
        sums[row][r + 1] = one * sine + other * cosine;
      }
    }
  }
  const float value = marlin::own_sum<TILE, ROWS>(sums, lane) * factors[layer];
  const int stream = first + lane / ROWS;
  int column = columns[0];
  MARLIN_UNROLL
  for (int r = 1; r < ROWS; r++) column = lane % ROWS == r ? columns[r] : column;
  if (present && lane < TILE * ROWS && stream < streams) {
    if (layer == 0) {
      queries[(int64_t(stream) * heads + own_head) * HEAD_DIM + column] = T(value);
    } else {
      const int64_t place = ((int64_t(stream) * kv_heads + own_head) * tail_rows + at) * HEAD_DIM + column;
      if (layer == 1) {
        keys[place] = T(value);
      } else {
        values[place] = T(value);
      }
    }
  }
