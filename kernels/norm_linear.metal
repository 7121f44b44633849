// out = norm(x) @ W^T * factor + bias + added, of a few rows of x: the head, what a stage gives the next, and, without a norm, the
// second layer of a feed-forward with its residual.
//
// inputs   rows[streams, depth] T; gains[depth] T, of the norm; layer_words, layer_scales, layer_zeros: W, see few_rows.h.metal
//          bias[out_rows] T; added[streams or 1, out_rows] T
//          factors[2] float32: the factor of the product, eps of the norm
//          sizes[4] int32: streams, depth, out_rows, whether `added` is of each stream
// output   out[streams, out_rows] OUT
// template T, OUT; KIND, GROUP of W; NORM; TILE rows of x; ROWS of W a simdgroup; SIMDGROUPS; HAS_BIAS, HAS_ADDED
// grid     (ceil(out_rows / (ROWS * SIMDGROUPS)) * SIMDGROUPS * 32, ceil(streams / TILE)) threads

  const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
  const int streams = sizes[0], depth = sizes[1], out_rows = sizes[2];
  const int first = threadgroup_position_in_grid.y * TILE;
  threadgroup float left[2 * SIMDGROUPS * TILE];
  marlin::NormedRows<T, NORM, TILE> x;
  x.plain = {rows, depth, first, streams - 1};
  x.gains = gains;
  x.measure(factors[1], left, simdgroup, SIMDGROUPS, lane);

  const int first_row = (threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup) * ROWS;
  marlin::Weights<T, KIND, GROUP> weights;
  MARLIN_WEIGHTS(weights, layer)
  float value = marlin::own_product<TILE, ROWS>(x, weights, first_row, out_rows, depth, lane) * factors[0];

  const int stream = first + lane / ROWS, row = first_row + lane % ROWS;
  if (lane < TILE * ROWS && stream < streams && row < out_rows) {
    if (HAS_BIAS) value += float(bias[row]);
    if (HAS_ADDED) value += float(added[(sizes[3] ? int64_t(stream) * out_rows : 0) + row]);
    out[int64_t(stream) * out_rows + row] = OUT(value);
  }
