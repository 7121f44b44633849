// The attention of a whole sequence from that over its parts.
//
// inputs   parts[splits, batch * heads * rows, HEAD_DIM] float32; log_weights[splits, batch * heads * rows] float32, base 2
// output   out[batch * heads * rows, HEAD_DIM] T
// template T; HEAD_DIM
// grid     one thread a number of the output
//
// A part without any key has the log weight of one that saw nothing, far below all others.

  const int splits = parts_shape[0], rows = parts_shape[1];
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= int64_t(rows) * HEAD_DIM) return;
  const int row = i / HEAD_DIM;
  float peak = marlin::NOTHING_SEEN;
  for (int split = 0; split < splits; split++) peak = fmaxf(peak, log_weights[int64_t(split) * rows + row]);
  float sum = 0.0f, weight = 0.0f;
  for (int split = 0; split < splits; split++) {
    const float share = exp2f(log_weights[int64_t(split) * rows + row] - peak);
    sum += share * parts[int64_t(split) * rows * HEAD_DIM + i];
    weight += share;
  }
  out[i] = marlin::from_float<T>(sum / weight);
