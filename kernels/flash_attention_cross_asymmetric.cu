// One part of an attention of a few rows over a long sequence that none of them belongs to (an encoder's output): not causal,
// no window. `attention_combine` joins the parts; where there is one part only, it is the result.
//
// inputs   queries[batch, heads, rows, HEAD_DIM] T; keys and values[batch, kv_heads, total, HEAD_DIM, packed or not],
//          key_scales and value_scales[batch, kv_heads, total, groups] uint8, any strides; lengths[batch] int32;
//          factor[1] float32, of dot products; span: its shape is (rows a split)
// outputs  parts[splits, batch, heads, rows, HEAD_DIM] OUT, log_weights[splits, batch, heads, rows] float32
// template T; OUT; K_TYPE, K_BITS, V_TYPE, V_BITS: uint32 in 4 or 8 bits, or a float type in 16 or 32; HEAD_DIM; TILE;
//          HAS_LENGTHS: whether that input counts
// grid     (splits * 128, kv_heads * ceil(heads / kv_heads * rows / TILE), batch) threads in blocks of 128

  constexpr int WARPS = 4;
  const int heads = queries_shape[1], rows = queries_shape[2], kv_heads = keys_shape[1], total = keys_shape[2];
  const int shared_rows = heads / kv_heads * rows;  // that see the same keys
  const int tiles = (shared_rows + TILE - 1) / TILE;
  const int index = blockIdx.y % tiles * TILE, kv_head = blockIdx.y / tiles;
  const int64_t batch = blockIdx.z;
  const int first_head = kv_head * (heads / kv_heads);
  const int warp = threadIdx.x / 32;

  const marlin::Rows<K_BITS, K_TYPE> key_rows = {
      keys + batch * keys_strides[0] + kv_head * keys_strides[1],
      key_scales + batch * key_scales_strides[0] + kv_head * key_scales_strides[1],
      keys_strides[2], keys_strides[3], key_scales_strides[2]};
  const marlin::Rows<V_BITS, V_TYPE> value_rows = {
      values + batch * values_strides[0] + kv_head * values_strides[1],
      value_scales + batch * value_scales_strides[0] + kv_head * value_scales_strides[1],
      values_strides[2], values_strides[3], value_scales_strides[2]};

  marlin::Tile<T, HEAD_DIM, TILE> tile;
  tile.start(
      queries + batch * queries_strides[0] + first_head * queries_strides[1], queries_strides[1], queries_strides[2],
      queries_strides[3], index, shared_rows, rows, total, factor[0]);
  const marlin::Sight sight = {0, HAS_LENGTHS ? min(lengths[batch], total) : total, false, -1};
  const int first = blockIdx.x * span_shape[0], end = min(sight.end, first + span_shape[0]);

  auto no_bias = [](int, int) { return 0.0f; };
  if (key_rows.wide() && value_rows.wide()) {
    tile.template see<true>(key_rows, value_rows, first, end, 0, sight, warp, WARPS, no_bias);
  } else {
    tile.template see<false>(key_rows, value_rows, first, end, 0, sight, warp, WARPS, no_bias);
  }
  tile.join_groups();
  __shared__ float shared[(WARPS - 1) * TILE * (HEAD_DIM + 2)];
  tile.template join_warps<WARPS>(shared);
  if (threadIdx.x >= HEAD_DIM / marlin::PIECE) return;
#pragma unroll
  for (int r = 0; r < TILE; r++) {
    const int own = index + r;
    if (own < shared_rows) {
      const int64_t row = ((blockIdx.x * int64_t(gridDim.z) + batch) * heads + first_head + own / rows) * rows + own % rows;
      tile.write(r, parts + row * HEAD_DIM);
      if (tile.piece == 0) log_weights[row] = tile.log_weight(r);
    }
  }
