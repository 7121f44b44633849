// Attention of one row of each stream over the few rows of its tail, then a linear layer and the residual:
// out = attention @ W^T * factor + added. Every threadgroup attends for all heads again, to save a launch.
//
// inputs   queries[streams, heads, HEAD_DIM]; keys, values[streams, kv_heads, tail_rows, HEAD_DIM] T
//          layer_words, layer_scales, layer_zeros: W, see few_rows.h.metal; added[streams, out_rows] T
//          counts[2] int32: not read; the tail's last row, which sees all before it
//          factors[2] float32: of dot products, of the product; sizes[5] int32: streams, heads, kv_heads, tail_rows, out_rows
// output   out[streams, out_rows] T
// template T; KIND, GROUP of W; TILE rows of x; ROWS of W a simdgroup; SIMDGROUPS; HEAD_DIM; WIDTH: heads * HEAD_DIM
// grid     (ceil(out_rows / (ROWS * SIMDGROUPS)) * SIMDGROUPS * 32, ceil(streams / TILE)) threads

  const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
  const int streams = sizes[0], heads = sizes[1], kv_heads = sizes[2], tail_rows = sizes[3], out_rows = sizes[4];
  const int first = threadgroup_position_in_grid.y * TILE, seen = counts[1] + 1;

  threadgroup float attended[TILE * WIDTH];
  const marlin::NoBias bias;
  for (int task = simdgroup; task < TILE * heads; task += SIMDGROUPS) {
    const int head = task % heads, kv_head = head / (heads / kv_heads), stream = metal::min(first + task / heads, streams - 1);
    const int64_t base = (int64_t(stream) * kv_heads + kv_head) * tail_rows * HEAD_DIM;
    const marlin::Rows<T, 0> key_rows = {keys + base, nullptr, HEAD_DIM, 1, 0, 0};
    const marlin::Rows<T, 0> value_rows = {values + base, nullptr, HEAD_DIM, 1, 0, 0};
    marlin::Tile<HEAD_DIM, 1> tile;
    tile.start(lane);
    const device T* query = queries + (int64_t(stream) * heads + head) * HEAD_DIM;
    tile.set_row(0, query, 1, seen - 1, marlin::Interval{0, seen}, factors[0]);
    tile.template see<true>(key_rows, value_rows, 0, seen, 0, 0, 1, bias);
    tile.join_groups();
    if (tile.has(0)) {
      MARLIN_UNROLL
      for (int i = 0; i < marlin::PIECE; i++) attended[task * HEAD_DIM + tile.piece * marlin::PIECE + i] = tile.result(0, i);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const marlin::SharedRows x = {attended, WIDTH};
  const int first_row = (threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup) * ROWS;
  marlin::Weights<T, KIND, GROUP> weights;
  MARLIN_WEIGHTS(weights, layer)
  const float value = marlin::own_product<TILE, ROWS>(x, weights, first_row, out_rows, WIDTH, lane) * factors[1];
  const int stream = first + lane / ROWS, row = first_row + lane % ROWS;
  if (lane < TILE * ROWS && stream < streams && row < out_rows) {
    const int64_t place = int64_t(stream) * out_rows + row;
    out[place] = T(value + float(added[place]));
  }
