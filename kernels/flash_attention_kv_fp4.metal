// One launch of an attention over keys and values that stand in pages, packed (nvfp4, mxfp8) or dense: up to three pages, each cut
// into splits, so that no threadgroup spans two arrays. attention_combine joins what the splits have seen; where there is but one
// split, it is the result.
//
// inputs   queries[batch, heads, rows, HEAD_DIM] T, contiguous
//          keys_i, values_i[batch, kv_heads, page rows, HEAD_DIM, packed or not], key_scales_i, value_scales_i[.., groups] uint8,
//          strides free; pages that are not there repeat another one; left_padding[batch], lengths[batch] int32
//          factor[1] float32, of dot products
//          sizes[13] int32: heads, kv_heads, rows, rows of the whole sequence, position of page 0's first row, rows a split,
//          causal, window (-1: none), whether left_padding counts, whether lengths counts, rows of each page
// outputs  parts[splits, batch, heads, rows, HEAD_DIM] OUT, divided by the weights where FINAL
//          stats[splits, batch, heads, rows, 2] float32: peak and weight
// template OUT; K_TYPE, K_BITS, V_TYPE, V_BITS: uint32 in 4 or 8 bits, or a float type; HEAD_DIM; TILE; SIMDGROUPS; FINAL
// grid     (splits * SIMDGROUPS * 32, kv_heads * ceil(heads / kv_heads * rows / TILE), batch) threads

  const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
  const int heads = sizes[0], kv_heads = sizes[1], rows = sizes[2], total = sizes[3], rows_a_split = sizes[5];
  const int shared_rows = heads / kv_heads * rows;  // that see the same keys
  const int tiles = (shared_rows + TILE - 1) / TILE;
  const int first_row = threadgroup_position_in_grid.y % tiles * TILE, kv_head = threadgroup_position_in_grid.y / tiles;
  const int batch = threadgroup_position_in_grid.z, batches = threadgroups_per_grid.z;
  const int64_t base_row = (int64_t(batch) * heads + kv_head * (heads / kv_heads)) * rows;  // of the queries

  // The page of this split, and its rows.
  int page = 0, split = threadgroup_position_in_grid.x, base = sizes[4];
  while (split >= (sizes[10 + page] + rows_a_split - 1) / rows_a_split) {
    split -= (sizes[10 + page] + rows_a_split - 1) / rows_a_split;
    base += sizes[10 + page];
    page++;
  }
  const int page_rows = sizes[10 + page];

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

  const int first_real = sizes[8] ? left_padding[batch] : 0, end_real = sizes[9] ? metal::min(lengths[batch], total) : total;
  marlin::Tile<HEAD_DIM, TILE> tile;
  tile.start(lane);
  MARLIN_UNROLL
  for (int r = 0; r < TILE; r++) {
    const int row = metal::min(first_row + r, shared_rows - 1);
    const int position = total - rows + row % rows;
    const marlin::Interval seen = marlin::sight(position, first_real, end_real, sizes[6] != 0, sizes[7]);
    tile.set_row(r, queries + (base_row + row) * HEAD_DIM, 1, position, seen, factor[0]);
  }

  const marlin::Interval reach = tile.reach();
  const int first = metal::max(reach.low - base, split * rows_a_split);
  const int end = metal::min(reach.high - base, metal::min((split + 1) * rows_a_split, page_rows));
  const marlin::NoBias bias;
  if (keys.value_stride == 1 && values.value_stride == 1) {
    tile.template see<true>(keys, values, first, end, base, simdgroup, SIMDGROUPS, bias);
  } else {
    tile.template see<false>(keys, values, first, end, base, simdgroup, SIMDGROUPS, bias);
  }
  tile.join_groups();

  constexpr int WIDTH = marlin::Tile<HEAD_DIM, TILE>::WIDTH;
  threadgroup float left[SIMDGROUPS * TILE * WIDTH];
  tile.leave(left + simdgroup * TILE * WIDTH);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // Each thread joins one number of the output, or a few.
  const int64_t part_row = (int64_t(threadgroup_position_in_grid.x) * batches) * heads * rows + base_row + first_row;
  const int numbers = metal::min(TILE, shared_rows - first_row) * HEAD_DIM;
  for (int n = simdgroup * 32 + lane; n < numbers; n += SIMDGROUPS * 32) {
    const int r = n / HEAD_DIM, i = n % HEAD_DIM;
    const marlin::Joined joined = marlin::join<HEAD_DIM>(left + r * WIDTH, i, SIMDGROUPS, TILE * WIDTH);
    const float divisor = FINAL && joined.weight != 0.0f ? joined.weight : 1.0f;
    parts[part_row * HEAD_DIM + n] = OUT(joined.sum / divisor);
    if (i < 2) stats[(part_row + r) * 2 + i] = i == 0 ? joined.peak : joined.weight;
  }
