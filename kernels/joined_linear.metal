// Joins what splits of the keys have seen, then a linear layer and the residual: out = attention @ W^T * factor + added.
// Every threadgroup joins all heads again, to save a launch.
//
// inputs   parts[splits, streams, WIDTH] float32, not divided by their weights; stats[splits, streams, heads, 2] float32: peak, to
//          the base 2, and weight; layer_words, layer_scales, layer_zeros: W, see few_rows.h.metal; added[streams, out_rows] T
//          factors[1] float32: of the product; sizes[3] int32: splits, streams, out_rows
// output   out[streams, out_rows] T
// template T; KIND, GROUP of W; TILE rows of x; ROWS of W a simdgroup; SIMDGROUPS; HEAD_DIM; WIDTH: heads * HEAD_DIM
// grid     (ceil(out_rows / (ROWS * SIMDGROUPS)) * SIMDGROUPS * 32, ceil(streams / TILE)) threads

  const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
  const int splits = sizes[0], streams = sizes[1], out_rows = sizes[2];
  constexpr int HEADS = WIDTH / HEAD_DIM;
  const int first = threadgroup_position_in_grid.y * TILE;

  threadgroup float attended[TILE * WIDTH];
  for (int n = simdgroup * 32 + lane; n < TILE * WIDTH; n += SIMDGROUPS * 32) {
    const int64_t stream = metal::min(first + n / WIDTH, streams - 1), column = n % WIDTH, head = column / HEAD_DIM;
    float peak = marlin::NOTHING_SEEN;
    for (int split = 0; split < splits; split++) peak = metal::max(peak, stats[((split * streams + stream) * HEADS + head) * 2]);
    float sum = 0.0f, weight = 0.0f;
    for (int split = 0; split < splits; split++) {
      const int64_t at = split * streams + stream;
      const float share = metal::fast::exp2(stats[(at * HEADS + head) * 2] - peak);
      sum += share * parts[at * WIDTH + column];
      weight += share * stats[(at * HEADS + head) * 2 + 1];
    }
    attended[n] = sum / (weight == 0.0f ? 1.0f : weight);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const marlin::SharedRows x = {attended, WIDTH};
  const int first_row = (threadgroup_position_in_grid.x * SIMDGROUPS + simdgroup) * ROWS;
  marlin::Weights<T, KIND, GROUP> weights;
  MARLIN_WEIGHTS(weights, layer)
  const float value = marlin::own_product<TILE, ROWS>(x, weights, first_row, out_rows, WIDTH, lane) * factors[0];
  const int stream = first + lane / ROWS, row = first_row + lane % ROWS;
  if (lane < TILE * ROWS && stream < streams && row < out_rows) {
    const int64_t place = int64_t(stream) * out_rows + row;
    out[place] = T(value + float(added[place]));
  }
