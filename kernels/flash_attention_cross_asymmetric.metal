// Attention of few queries over one long sequence that no order hides (a decoder's over an encoder's output), whose keys and values
// are packed (nvfp4, mxfp8) or dense, cut into splits. attention_combine joins what the splits have seen; where there is but one,
// it is the result.
//
// inputs   queries[batch, heads, rows, HEAD_DIM] T, contiguous
//          keys, values[batch, kv_heads, total, HEAD_DIM, packed or not], key_scales, value_scales[.., groups] uint8, strides free
//          lengths[batch] int32; factor[1] float32, of dot products
//          sizes[6] int32: heads, kv_heads, rows, total, rows a split, whether lengths counts
// outputs  parts[splits, batch, heads, rows, HEAD_DIM] OUT, divided by the weights where FINAL
//          stats[splits, batch, heads, rows, 2] float32: peak and weight
// template OUT; K_TYPE, K_BITS, V_TYPE, V_BITS: uint32 in 4 or 8 bits, or a float type; HEAD_DIM; TILE; SIMDGROUPS; FINAL
// grid     (splits * SIMDGROUPS * 32, kv_heads * ceil(heads / kv_heads * rows / TILE), batch) threads

  const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
  const int heads = sizes[0], kv_heads = sizes[1], rows = sizes[2], total = sizes[3], rows_a_split = sizes[4];
  const int shared_rows = heads / kv_heads * rows;  // that see the same keys
  const int tiles = (shared_rows + TILE - 1) / TILE;
  const int first_row = threadgroup_position_in_grid.y % tiles * TILE, kv_head = threadgroup_position_in_grid.y / tiles;
  const int split = threadgroup_position_in_grid.x, batch = threadgroup_position_in_grid.z, batches = threadgroups_per_grid.z;
  const int64_t base_row = (int64_t(batch) * heads + kv_head * (heads / kv_heads)) * rows;  // of the queries

  marlin::Rows<K_TYPE, K_BITS> key_rows;
  marlin::Rows<V_TYPE, V_BITS> value_rows;
  MARLIN_HEAD(key_rows, batch, kv_head, keys, keys_strides, key_scales, key_scales_strides)
  MARLIN_HEAD(value_rows, batch, kv_head, values, values_strides, value_scales, value_scales_strides)

  const marlin::Interval seen = {0, sizes[5] ? metal::min(lengths[batch], total) : total};
  marlin::Tile<HEAD_DIM, TILE> tile;
  tile.start(lane);
  MARLIN_UNROLL
  for (int r = 0; r < TILE; r++) {
    const int row = metal::min(first_row + r, shared_rows - 1);
    tile.set_row(r, queries + (base_row + row) * HEAD_DIM, 1, 0, seen, factor[0]);
  }
  const int first = split * rows_a_split, end = metal::min(seen.high, first + rows_a_split);
  const marlin::NoBias bias = {};
  if (key_rows.value_stride == 1 && value_rows.value_stride == 1) {
    tile.template see<true>(key_rows, value_rows, first, end, 0, simdgroup, SIMDGROUPS, bias);
  } else {
    tile.template see<false>(key_rows, value_rows, first, end, 0, simdgroup, SIMDGROUPS, bias);
  }
  tile.join_groups();

  constexpr int WIDTH = marlin::Tile<HEAD_DIM, TILE>::WIDTH;
  threadgroup float left[SIMDGROUPS * TILE * WIDTH];
  tile.leave(left + simdgroup * TILE * WIDTH);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // Each thread joins one number of the output, or a few.
  const int64_t part_row = int64_t(threadgroup_position_in_grid.x) * batches * heads * rows + base_row + first_row;
  const int numbers = metal::min(TILE, shared_rows - first_row) * HEAD_DIM;
  for (int n = simdgroup * 32 + lane; n < numbers; n += SIMDGROUPS * 32) {
    const int r = n / HEAD_DIM, i = n % HEAD_DIM;
    const marlin::Joined joined = marlin::join<HEAD_DIM>(left + r * WIDTH, i, SIMDGROUPS, TILE * WIDTH);
    const float divisor = FINAL && joined.weight != 0.0f ? joined.weight : 1.0f;
    parts[part_row * HEAD_DIM + n] = OUT(joined.sum / divisor);
    if (i < 2) stats[(part_row + r) * 2 + i] = i == 0 ? joined.peak : joined.weight;
  }
