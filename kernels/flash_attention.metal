// Attention of a few rows of queries, or of short sequences of which there are many, over dense keys and values.
//
// inputs   queries[batch, heads, rows, HEAD_DIM], keys, values[batch, kv_heads, total, HEAD_DIM] T, strides free;
//          left_padding[batch], lengths[batch] int32; relative_bias[heads, 2 * most + 1] T, 8 numbers at least
//          factor[1] float32, of dot products
//          sizes[9] int32: heads, kv_heads, rows, total, causal, window (-1: none), whether left_padding counts, whether
//          lengths counts, most
// output   out[batch, heads, rows, HEAD_DIM] T
// template T; HEAD_DIM; TILE; SIMDGROUPS that share a tile's keys; HAS_BIAS
// grid     batches * kv_heads * ceil(heads / kv_heads * rows / TILE) * SIMDGROUPS * 32 threads; a threadgroup has one tile where
//          SIMDGROUPS is above 1, else one for each of its simdgroups

  const int lane = thread_index_in_simdgroup;
  const int heads = sizes[0], kv_heads = sizes[1], rows = sizes[2], total = sizes[3];
  const int shared_rows = heads / kv_heads * rows;  // that see the same keys
  const int tiles = (shared_rows + TILE - 1) / TILE;
  const int simdgroup_of_grid = thread_position_in_grid.x / 32, tile_of_grid = simdgroup_of_grid / SIMDGROUPS;
  const int simdgroup = simdgroup_of_grid % SIMDGROUPS;
  const int first_row = tile_of_grid % tiles * TILE, kv_head = tile_of_grid / tiles % kv_heads;
  const int batch = tile_of_grid / tiles / kv_heads;
  const int first_head = kv_head * (heads / kv_heads);

  marlin::Rows<T, 0> key_rows, value_rows;
  key_rows.data = keys + batch * keys_strides[0] + kv_head * keys_strides[1];
  key_rows.row_stride = keys_strides[2];
  key_rows.value_stride = keys_strides[3];
  value_rows.data = values + batch * values_strides[0] + kv_head * values_strides[1];
  value_rows.row_stride = values_strides[2];
  value_rows.value_stride = values_strides[3];

  const int first_real = sizes[6] ? left_padding[batch] : 0, end_real = sizes[7] ? metal::min(lengths[batch], total) : total;
  marlin::Tile<HEAD_DIM, TILE> tile;
  metal::conditional_t<HAS_BIAS, marlin::RelativeBias<T, TILE>, marlin::NoBias> bias;
  tile.start(lane);
  MARLIN_UNROLL
  for (int r = 0; r < TILE; r++) {
    const int row = metal::min(first_row + r, shared_rows - 1), head = first_head + row / rows;
    const int position = total - rows + row % rows;
    const marlin::Interval seen = marlin::sight(position, first_real, end_real, sizes[4] != 0, sizes[5]);
    const device T* from = queries + batch * queries_strides[0] + head * queries_strides[1] + row % rows * queries_strides[2];
    tile.set_row(r, from, queries_strides[3], position, seen, factor[0]);
    bias.set_row(r, relative_bias, head, sizes[8]);
  }

  const marlin::Interval reach = tile.reach();
  const int first = metal::max(reach.low, 0), end = metal::min(reach.high, total);
  if (key_rows.value_stride == 1 && value_rows.value_stride == 1) {
    tile.template see<true>(key_rows, value_rows, first, end, 0, simdgroup, SIMDGROUPS, bias);
  } else {
    tile.template see<false>(key_rows, value_rows, first, end, 0, simdgroup, SIMDGROUPS, bias);
  }
  tile.join_groups();

  const int64_t out_row = (int64_t(batch) * heads + first_head) * rows + first_row;
  const int count = metal::min(TILE, shared_rows - first_row);
  if (SIMDGROUPS == 1) {
    MARLIN_UNROLL
    for (int r = 0; r < TILE; r++) {
      if (r < count && tile.has(r)) {
        device T* to = out + (out_row + r) * HEAD_DIM + tile.piece * marlin::PIECE;
        for (int i = 0; i < marlin::PIECE; i++) to[i] = T(tile.result(r, i));
      }
    }
    return;
  }
  constexpr int WIDTH = marlin::Tile<HEAD_DIM, TILE>::WIDTH;
  threadgroup float left[SIMDGROUPS == 1 ? 1 : SIMDGROUPS * TILE * WIDTH];
  tile.leave(left + simdgroup * TILE * WIDTH);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (int n = simdgroup * 32 + lane; n < count * HEAD_DIM; n += SIMDGROUPS * 32) {
    const marlin::Joined joined = marlin::join<HEAD_DIM>(left + n / HEAD_DIM * WIDTH, n % HEAD_DIM, SIMDGROUPS, TILE * WIDTH);
    out[out_row * HEAD_DIM + n] = T(joined.sum / (joined.weight == 0.0f ? 1.0f : joined.weight));
  }
