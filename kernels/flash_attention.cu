// Attention over dense keys and values: causal or not, window, padding on either side, T5's relative bias; grouped heads.
//
// inputs   queries[batch, heads, rows, HEAD_DIM], keys and values[batch, kv_heads, total, HEAD_DIM] T, any strides;
//          left_padding[batch], lengths[batch] int32; relative_bias[heads, 2 * most + 1] T; factor[1] float32, of dot products
// output   out[batch, heads, rows, HEAD_DIM] T
// template T; HEAD_DIM a multiple of 16 up to 256; TILE rows of queries a warp has at once; WARPS that share a tile's keys,
//          1 or 4; CAUSAL; WINDOW, where HAS_WINDOW; HAS_PADDING, HAS_LENGTHS, HAS_BIAS: whether these inputs count
// grid     (tiles * WARPS * 32) threads in blocks of 128, tiles = batch * kv_heads * ceil(heads / kv_heads * rows / TILE)
//
// With WARPS 1 every warp has a tile of its own: short sequences, such as the patches of a local model, by the thousand.

  constexpr int BITS = sizeof(T) * 8;
  const int heads = queries_shape[1], rows = queries_shape[2], kv_heads = keys_shape[1], total = keys_shape[2];
  const int shared_rows = heads / kv_heads * rows;  // that see the same keys
  const int tiles = (shared_rows + TILE - 1) / TILE;
  const int warp = threadIdx.x / 32;
  const int64_t item = WARPS == 1 ? int64_t(blockIdx.x) * 4 + warp : blockIdx.x;
  if (item >= int64_t(queries_shape[0]) * kv_heads * tiles) return;  // whole warps; with WARPS 4 no block has any
  const int index = item % tiles * TILE, kv_head = item / tiles % kv_heads;
  const int64_t batch = item / tiles / kv_heads;
  const int first_head = kv_head * (heads / kv_heads);

  const marlin::Rows<BITS, T> key_rows = {
      keys + batch * keys_strides[0] + kv_head * keys_strides[1], nullptr, keys_strides[2], keys_strides[3], 0};
  const marlin::Rows<BITS, T> value_rows = {
      values + batch * values_strides[0] + kv_head * values_strides[1], nullptr, values_strides[2], values_strides[3], 0};

  marlin::Tile<T, HEAD_DIM, TILE> tile;
  tile.start(
      queries + batch * queries_strides[0] + first_head * queries_strides[1], queries_strides[1], queries_strides[2],
      queries_strides[3], index, shared_rows, rows, total, factor[0]);
  const marlin::Sight sight = {
      HAS_PADDING ? left_padding[batch] : 0, HAS_LENGTHS ? min(lengths[batch], total) : total, CAUSAL,
      HAS_WINDOW ? WINDOW : -1};
  int first, end;
  tile.reach(sight, first, end);

  const int most = HAS_BIAS ? relative_bias_shape[1] / 2 : 0;
  auto bias = [&](int r, int key) {
    if (!HAS_BIAS) return 0.0f;
    const int entry = most + max(-most, min(key - tile.position[r], most));
    return marlin::to_float(relative_bias[(first_head + tile.head[r]) * (2 * most + 1) + entry]) * marlin::LOG2_E;
  };
  if (key_rows.wide() && value_rows.wide()) {
    tile.template see<true>(key_rows, value_rows, first, end, 0, sight, WARPS == 1 ? 0 : warp, WARPS, bias);
  } else {
    tile.template see<false>(key_rows, value_rows, first, end, 0, sight, WARPS == 1 ? 0 : warp, WARPS, bias);
  }
  tile.join_groups();
  if constexpr (WARPS > 1) {
    // This is no template, so what is not needed is compiled all the same.
    __shared__ float shared[WARPS > 1 ? (WARPS - 1) * TILE * (HEAD_DIM + 2) : 1];
    tile.template join_warps<WARPS>(shared);
    if (warp > 0) return;
  }
  if (threadIdx.x % 32 < HEAD_DIM / marlin::PIECE) {
#pragma unroll
    for (int r = 0; r < TILE; r++) {
      const int own = index + r;
      if (own < shared_rows) {
        tile.write(r, out + ((batch * heads + first_head + own / rows) * rows + own % rows) * HEAD_DIM);
      }
    }
  }
