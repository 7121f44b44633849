// One part of an attention over keys and values that stand in pages, packed (nvfp4, mxfp8) or dense. `attention_combine` joins
// the parts; where there is one part only, it is the result.
//
// inputs   queries[batch, heads, rows, HEAD_DIM] T; eight pages: keys_i and values_i[batch, kv_heads, page rows, HEAD_DIM or
//          words], key_scales_i and value_scales_i[batch, kv_heads, page rows, groups] uint8; left_padding[batch],
//          lengths[batch] int32; factor[1] float32, of dot products;
//          span: its shape is (1 + position of the first page's first row, rows of the whole sequence, rows a split)
//          All strides are free. Pages that are not needed repeat another one.
// outputs  parts[splits, batch, heads, rows, HEAD_DIM] OUT, log_weights[splits, batch, heads, rows] float32
// template T; OUT; K_TYPE, K_BITS, V_TYPE, V_BITS: uint32 in 4 or 8 bits, or a float type in 16 or 32; HEAD_DIM; TILE; CAUSAL;
//          WINDOW, where HAS_WINDOW; HAS_PADDING, HAS_LENGTHS: whether these inputs count
// grid     (splits * 128, kv_heads * ceil(heads / kv_heads * rows / TILE), batch) threads in blocks of 128
//
// A page is a unit of splitting: each has ceil(page rows / rows a split) splits, so that no block ever spans two arrays.

  constexpr int WARPS = 4;
  const int heads = queries_shape[1], rows = queries_shape[2], kv_heads = keys_0_shape[1], total = span_shape[1];
  const int shared_rows = heads / kv_heads * rows;  // that see the same keys
  const int tiles = (shared_rows + TILE - 1) / TILE;
  const int index = blockIdx.y % tiles * TILE, kv_head = blockIdx.y / tiles;
  const int64_t batch = blockIdx.z;
  const int first_head = kv_head * (heads / kv_heads);
  const int warp = threadIdx.x / 32;

  marlin::Rows<K_BITS, K_TYPE> key_rows = {};
  marlin::Rows<V_BITS, V_TYPE> value_rows = {};
  const int rows_a_split = span_shape[2];
  int base = span_shape[0] - 1, split = blockIdx.x, page_rows = 0;
  bool found = false;
#define PAGE(keys, keys_shape, keys_strides, key_scales, key_scales_strides, values, values_strides, value_scales,     \
             value_scales_strides)                                                                                     \
  if (!found) {                                                                                                        \
    const int splits = (keys_shape[2] + rows_a_split - 1) / rows_a_split;                                              \
    if (split < splits) {                                                                                              \
      found = true;                                                                                                    \
      page_rows = keys_shape[2];                                                                                       \
      key_rows = {                                                                                                     \
          keys + batch * keys_strides[0] + kv_head * keys_strides[1],                                                  \
          key_scales + batch * key_scales_strides[0] + kv_head * key_scales_strides[1],                                \
          keys_strides[2], keys_strides[3], key_scales_strides[2]};                                                    \
      value_rows = {                                                                                                   \
          values + batch * values_strides[0] + kv_head * values_strides[1],                                            \
          value_scales + batch * value_scales_strides[0] + kv_head * value_scales_strides[1],                          \
          values_strides[2], values_strides[3], value_scales_strides[2]};                                              \
    } else {                                                                                                           \
      split -= splits;                                                                                                 \
      base += keys_shape[2];                                                                                           \
    }                                                                                                                  \
  }
  PAGE(keys_0, keys_0_shape, keys_0_strides, key_scales_0, key_scales_0_strides,
       values_0, values_0_strides, value_scales_0, value_scales_0_strides)
  PAGE(keys_1, keys_1_shape, keys_1_strides, key_scales_1, key_scales_1_strides,
       values_1, values_1_strides, value_scales_1, value_scales_1_strides)
  PAGE(keys_2, keys_2_shape, keys_2_strides, key_scales_2, key_scales_2_strides,
       values_2, values_2_strides, value_scales_2, value_scales_2_strides)
  PAGE(keys_3, keys_3_shape, keys_3_strides, key_scales_3, key_scales_3_strides,
       values_3, values_3_strides, value_scales_3, value_scales_3_strides)
  PAGE(keys_4, keys_4_shape, keys_4_strides, key_scales_4, key_scales_4_strides,
       values_4, values_4_strides, value_scales_4, value_scales_4_strides)
  PAGE(keys_5, keys_5_shape, keys_5_strides, key_scales_5, key_scales_5_strides,
       values_5, values_5_strides, value_scales_5, value_scales_5_strides)
  PAGE(keys_6, keys_6_shape, keys_6_strides, key_scales_6, key_scales_6_strides,
       values_6, values_6_strides, value_scales_6, value_scales_6_strides)
  PAGE(keys_7, keys_7_shape, keys_7_strides, key_scales_7, key_scales_7_strides,
       values_7, values_7_strides, value_scales_7, value_scales_7_strides)
#undef PAGE

  marlin::Tile<T, HEAD_DIM, TILE> tile;
  tile.start(
      queries + batch * queries_strides[0] + first_head * queries_strides[1], queries_strides[1], queries_strides[2],
      queries_strides[3], index, shared_rows, rows, total, factor[0]);
  const marlin::Sight sight = {
      HAS_PADDING ? left_padding[batch] : 0, HAS_LENGTHS ? min(lengths[batch], total) : total, CAUSAL,
      HAS_WINDOW ? WINDOW : -1};
  int first, end;
  tile.reach(sight, first, end);
  first = max(first - base, split * rows_a_split);
  end = min(end - base, min((split + 1) * rows_a_split, page_rows));

  auto no_bias = [](int, int) { return 0.0f; };
  if (key_rows.wide() && value_rows.wide()) {
    tile.template see<true>(key_rows, value_rows, first, end, base, sight, warp, WARPS, no_bias);
  } else {
    tile.template see<false>(key_rows, value_rows, first, end, base, sight, warp, WARPS, no_bias);
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
