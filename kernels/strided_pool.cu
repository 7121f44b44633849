// Each STRIDE rows as one, their mean or their maximum; the last ones may be fewer. Sums are float32; a NaN stays one.
//
// inputs   x[batch, rows, channels] T
// output   out[batch, ceil(rows / STRIDE), channels] T
// template T; STRIDE; MAXIMUM: true for the maximum, false for the mean
// grid     one thread a number of the output; neighbours read neighbouring channels

  const int rows = x_shape[1], channels = x_shape[2], pooled = (rows + STRIDE - 1) / STRIDE;
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= int64_t(x_shape[0]) * pooled * channels) return;
  const int channel = i % channels, place = i / channels % pooled;
  const int64_t batch = i / channels / pooled;
  const int count = min(STRIDE, rows - place * STRIDE);
  const T* from = x + (batch * rows + int64_t(place) * STRIDE) * channels + channel;
  float result = marlin::to_float(from[0]);
  for (int row = 1; row < count; row++) {
    const float value = marlin::to_float(from[int64_t(row) * channels]);
    if constexpr (MAXIMUM) {
      if (value > result || value != value) result = value;
    } else {
      result += value;
    }
  }
  out[i] = marlin::from_float<T>(MAXIMUM ? result : result / count);
