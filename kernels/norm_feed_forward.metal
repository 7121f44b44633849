// The first half of a feed-forward of a few rows of x: out = f(norm(x) @ G^T) * (norm(x) @ U^T), or f(norm(x) @ U^T) without a gate.
//
// inputs   rows[streams, depth] T; gains[depth] T; up_words, up_scales, up_zeros: U, see few_rows.h.metal; up_bias[out_rows] T
//          gate_words, gate_scales, gate_zeros, gate_bias: the same of G, of U's format; not read without a gate
//          factors[3] float32: of U's product, of G's, eps of the norm; sizes[3] int32: streams, depth, out_rows
// output   out[streams, out_rows] T
// template T; KIND, GROUP; NORM; TILE rows of x; ROWS of U, and of G, a simdgroup; SIMDGROUPS; GATED; ACTIVATION: f; HAS_BIAS
// grid     (ceil(out_rows / (ROWS * SIMDGROUPS)) * SIMDGROUPS * 32, ceil(streams / TILE)) threads

  const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
  const int streams = sizes[0], depth = sizes[1], out_rows = sizes[2];
  const int first = threadgroup_position_in_grid.y * TILE;
  threadgroup float left[2 * SIMDGROUPS * TILE];
  marlin::NormedRows<T, NORM, TILE> x;
  x.plain = {rows, depth, first, streams - 1};
  x.gains = gains;
  x.measure(factors[2], left, simdgroup, SIMDGROUPS, lane);

  const int first_row = (threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup) * ROWS;
  const int stream = first + lane / ROWS, row = first_row + lane % ROWS;
  const bool writing = lane < TILE * ROWS && stream < streams && row < out_rows;
  marlin::Weights<T, KIND, GROUP> weights;

  MARLIN_WEIGHTS(weights, up)
  float value = marlin::own_product<TILE, ROWS>(x, weights, first_row, out_rows, depth, lane) * factors[0];
  if (HAS_BIAS && writing) value += float(up_bias[row]);
  if (GATED) {
    MARLIN_WEIGHTS(weights, gate)
    float gate = marlin::own_product<TILE, ROWS>(x, weights, first_row, out_rows, depth, lane) * factors[1];
    if (HAS_BIAS && writing) gate += float(gate_bias[row]);
    value *= marlin::activated(gate, ACTIVATION);
  } else {
    value = marlin::activated(value, ACTIVATION);
  }
  if (writing) out[int64_t(stream) * out_rows + row] = T(value);
