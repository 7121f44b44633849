// Attention of one row of each stream over the rows that a cache holds and, behind them, its tail: splits of the cache's rows, and
// one for the tail. joined_linear joins what they have seen. The storage of the cache is longer than its rows, so that a launch is
// the same from one row to the next.
//
// inputs   queries[streams, heads, HEAD_DIM] T; stored_keys, stored_values[streams, kv_heads, capacity, HEAD_DIM] T
//          keys, values[streams, kv_heads, tail_rows, HEAD_DIM] T: the tail
//          left_padding[streams] int32; relative_bias[heads, 2 * most + 1] T
//          counts[2] int32: rows of the storage that are there, the tail's last row; factors[1] float32: of dot products
//          sizes[9] int32: heads, kv_heads, capacity, tail_rows, rows a split, window (-1: none), whether left_padding counts, most, 0
// outputs  parts[splits, streams, heads, HEAD_DIM] float32, not divided by the weights
//          stats[splits, streams, heads, 2] float32: peak, to the base 2, and weight
// template T; HEAD_DIM; TILE heads that share keys; SIMDGROUPS; HAS_BIAS
// grid     (splits * SIMDGROUPS * 32, kv_heads * ceil(heads / kv_heads / TILE), streams) threads; the last split has the tail

  const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
  const int heads = sizes[0], kv_heads = sizes[1], capacity = sizes[2], tail_rows = sizes[3], rows_a_split = sizes[4];
  const int shared = heads / kv_heads, tiles = (shared + TILE - 1) / TILE;
  const int first_head = threadgroup_position_in_grid.y % tiles * TILE, kv_head = threadgroup_position_in_grid.y / tiles;
  const int stream = threadgroup_position_in_grid.z, streams = threadgroups_per_grid.z, split = threadgroup_position_in_grid.x;
  const bool in_tail = split == int(threadgroups_per_grid.x) - 1;
  const int position = counts[0] + counts[1], base = in_tail ? counts[0] : 0;

  const int64_t of_stream = int64_t(stream) * kv_heads + kv_head;
  const int64_t place = of_stream * (in_tail ? tail_rows : capacity) * HEAD_DIM;
  const marlin::Rows<T, 0> key_rows = {(in_tail ? keys : stored_keys) + place, nullptr, HEAD_DIM, 1, 0, 0};
  const marlin::Rows<T, 0> value_rows = {(in_tail ? values : stored_values) + place, nullptr, HEAD_DIM, 1, 0, 0};

  const marlin::Interval seen = marlin::sight(position, sizes[6] ? left_padding[stream] : 0, position + 1, true, sizes[5]);
  marlin::Tile<HEAD_DIM, TILE> tile;
  metal::conditional_t<HAS_BIAS, marlin::RelativeBias<T, TILE>, marlin::NoBias> bias;
  tile.start(lane);
  MARLIN_UNROLL
  for (int r = 0; r < TILE; r++) {
    const int head = kv_head * shared + metal::min(first_head + r, shared - 1);
    tile.set_row(r, queries + (int64_t(stream) * heads + head) * HEAD_DIM, 1, position, seen, factors[0]);
    bias.set_row(r, relative_bias, head, sizes[7]);
  }
  const int first = metal::max(seen.low - base, in_tail ? 0 : split * rows_a_split);
  const int end = in_tail ? counts[1] + 1 : metal::min(counts[0], (split + 1) * rows_a_split);
  tile.template see<true>(key_rows, value_rows, first, end, base, simdgroup, SIMDGROUPS, bias);
  tile.join_groups();

  constexpr int WIDTH = marlin::Tile<HEAD_DIM, TILE>::WIDTH;
  threadgroup float left[SIMDGROUPS * TILE * WIDTH];
  tile.leave(left + simdgroup * TILE * WIDTH);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const int64_t out_head = (int64_t(split) * streams + stream) * heads + kv_head * shared + first_head;
  const int numbers = metal::min(TILE, shared - first_head) * HEAD_DIM;
  for (int n = simdgroup * 32 + lane; n < numbers; n += SIMDGROUPS * 32) {
    const int r = n / HEAD_DIM, i = n % HEAD_DIM;
    const marlin::Joined joined = marlin::join<HEAD_DIM>(left + r * WIDTH, i, SIMDGROUPS, TILE * WIDTH);
    parts[out_head * HEAD_DIM + n] = joined.sum;
    if (i < 2) stats[(out_head + r) * 2 + i] = i == 0 ? joined.peak : joined.weight;
  }
