// Each STRIDE rows as one, their mean or their maximum; the last ones may be fewer. Sums are float32; a NaN stays one.
//
// inputs   x[batch, rows, channels] T
// output   out[batch, ceil(rows / STRIDE), channels] T
// template T; STRIDE; MAXIMUM: the maximum, else the mean
// grid     (channels, ceil(rows / STRIDE), batch) threads; neighbours read neighbouring channels

  const int rows = x_shape[1], channels = x_shape[2];
  const int channel = thread_position_in_grid.x, place = thread_position_in_grid.y, batch = thread_position_in_grid.z;
  const int first = place * STRIDE, count = metal::min(STRIDE, rows - first);
  const int64_t from = (int64_t(batch) * rows + first) * channels + channel;
  float result = float(x[from]);
  for (int row = 1; row < count; row++) {
    const float value = float(x[from + int64_t(row) * channels]);
    if (MAXIMUM) {
      result = value > result || metal::isnan(value) ? value : result;
    } else {
      result += value;
    }
  }
  const int pooled = (rows + STRIDE - 1) / STRIDE;
  out[(int64_t(batch) * pooled + place) * channels + channel] = T(MAXIMUM ? result : result / count);
