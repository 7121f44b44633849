// The attention of a whole sequence from that over its parts.
//
// inputs   parts[splits, batch * heads * rows, HEAD_DIM] float32; log_weights[splits, batch * heads * rows] float32, base 2
// output   out[batch * heads * rows, HEAD_DIM] T
// template T; HEAD_DIM up to 256
// grid     (batch * heads * rows * 128), a block of 128 threads a row
//
// A part without any key has the log weight of one that saw nothing, far below all others. Each lane has the share of one part
// of 32 and the warp hands them round, so that the loop over parts has nothing but independent loads in it.

  constexpr int THREADS = 128;
  constexpr int COLUMNS = (HEAD_DIM + THREADS - 1) / THREADS;  // of a thread
  const int splits = parts_shape[0], rows = parts_shape[1], row = blockIdx.x, lane = threadIdx.x % 32;
  if (threadIdx.x - lane >= HEAD_DIM) return;  // a whole warp without a column

  float peak = marlin::NOTHING_SEEN;
  for (int split = lane; split < splits; split += 32) peak = fmaxf(peak, log_weights[int64_t(split) * rows + row]);
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) peak = fmaxf(peak, __shfl_xor_sync(0xffffffff, peak, offset));

  float weight = 0.0f, sums[COLUMNS] = {};
  for (int first = 0; first < splits; first += 32) {
    const int count = min(32, splits - first);
    const float share = lane < count ? exp2f(log_weights[int64_t(first + lane) * rows + row] - peak) : 0.0f;
    weight += share;
#pragma unroll 8
    for (int split = 0; split < count; split++) {
      const float its_share = __shfl_sync(0xffffffff, share, split);
      const float* part = parts + (int64_t(first + split) * rows + row) * HEAD_DIM;
#pragma unroll
      for (int i = 0; i < COLUMNS; i++) {
        const int column = threadIdx.x + i * THREADS;
        if (column < HEAD_DIM) sums[i] += its_share * part[column];
      }
    }
  }
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) weight += __shfl_xor_sync(0xffffffff, weight, offset);
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) {
    const int column = threadIdx.x + i * THREADS;
    if (column < HEAD_DIM) out[int64_t(row) * HEAD_DIM + column] = marlin::from_float<T>(sums[i] / weight);
  }
