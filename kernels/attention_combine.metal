// The attention over all keys from what splits of them have seen.
//
// inputs   parts[splits, rows of the output, HEAD_DIM] float32, not divided by their weights; stats[splits, rows, 2] float32:
//          peak, to the base 2, and weight
// output   out[rows, HEAD_DIM] T
// template T; HEAD_DIM
// grid     (HEAD_DIM, rows) threads
//
// A split that saw nothing has weight 0 and a peak far below all others.

  const int splits = parts_shape[0], rows = parts_shape[1];
  const int i = thread_position_in_grid.x, row = thread_position_in_grid.y;
  float peak = marlin::NOTHING_SEEN;
  for (int split = 0; split < splits; split++) peak = metal::max(peak, stats[(int64_t(split) * rows + row) * 2]);
  float sum = 0.0f, weight = 0.0f;
  for (int split = 0; split < splits; split++) {
    const int64_t at = int64_t(split) * rows + row;
    const float share = metal::fast::exp2(stats[at * 2] - peak);
    sum += share * parts[at * HEAD_DIM + i];
    weight += share * stats[at * 2 + 1];
  }
  out[int64_t(row) * HEAD_DIM + i] = T(sum / (weight == 0.0f ? 1.0f : weight));
