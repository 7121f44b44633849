// Attention of a few rows of queries over rows of keys and values, dense or packed, as the kernels flash_attention* use it.
//
// The 32 lanes of a simdgroup stand in groups; a group holds one key at a time, each of its lanes PIECE values of it, and the same
// piece of every query of the tile and of the running output. So a key is loaded and decoded once for the whole tile, straight to
// registers, and groups only meet when all keys are done. Whatever hides keys (order, window, padding, lengths) leaves a row one
// interval of positions. Softmax is in float32, to the base 2.

// Loops over registers: an index that is not known when the kernel is compiled would put them into memory.
#define MARLIN_UNROLL _Pragma("clang loop unroll(full)")

namespace marlin {

constant constexpr int PIECE = 8;  // values: one word of nvfp4, two of mxfp8
constant constexpr float LOG2_E = 1.44269504f;
constant constexpr float NOTHING_SEEN = -1e30f;  // a peak before the first key; finite, so that differences are numbers
constant constexpr float HIDDEN = -3e38f;        // the score of a hidden key: nothing beside NOTHING_SEEN

// Rows of keys or values of one head. Strides count elements of their arrays. `load` gives PIECE values of a row, which the
// factor that it returns multiplies; UNIT says that the values of a row stand side by side.
template <typename Stored, int BITS>
struct Rows {
  const device Stored* data;
  const device uint8_t* scales;
  int64_t row_stride, value_stride, scale_row_stride, scale_stride;

  template <bool UNIT>
  METAL_FUNC float load(int row, int piece, thread float (&values)[PIECE]) const {
    const int64_t stride = UNIT ? 1 : value_stride;
    const device Stored* from = data + row * row_stride + piece * PIECE * stride;
    MARLIN_UNROLL
    for (int i = 0; i < PIECE; i++) values[i] = float(from[i * stride]);
    return 1.0f;
  }
};

template <>
struct Rows<uint32_t, 4> {  // nvfp4: a scale for 16 values
  const device uint32_t* data;
  const device uint8_t* scales;
  int64_t row_stride, value_stride, scale_row_stride, scale_stride;

  template <bool UNIT>
  METAL_FUNC float load(int row, int piece, thread float (&values)[PIECE]) const {
    const uint word = data[row * row_stride + piece * (UNIT ? 1 : value_stride)];
    const uint scale = scales[row * scale_row_stride + piece / 2 * scale_stride];
    MARLIN_UNROLL
    for (int p = 0; p < 4; p++) {
      const float2 pair = from_e2m1_pair(word, p);
      values[p] = pair.x;
      values[p + 4] = pair.y;
    }
    return from_e4m3(scale);
  }
};

template <>
struct Rows<uint32_t, 8> {  // mxfp8: a scale for 32 values
  const device uint32_t* data;
  const device uint8_t* scales;
  int64_t row_stride, value_stride, scale_row_stride, scale_stride;

  template <bool UNIT>
  METAL_FUNC float load(int row, int piece, thread float (&values)[PIECE]) const {
    const int64_t stride = UNIT ? 1 : value_stride;
    const device uint32_t* from = data + row * row_stride + piece * 2 * stride;
    const uint words[2] = {from[0], from[stride]};
    const uint scale = scales[row * scale_row_stride + piece / 4 * scale_stride];
    MARLIN_UNROLL
    for (int i = 0; i < 4; i++) {
      const float2 pair = from_e4m3_pair(words[i / 2], i % 2);
      values[i / 2 * 4 + i % 2] = pair.x;
      values[i / 2 * 4 + i % 2 + 2] = pair.y;
    }
    return from_e8m0(scale);
  }
};

// Sets the Rows of one head to arrays of all heads, which stand in a kernel's own text: MLX gives it strides by their names.
#define MARLIN_HEAD(rows_of_head, batch, kv_head, array, strides, scales_array, scale_strides)        \
  rows_of_head.data = array + batch * strides[0] + kv_head * strides[1];                              \
  rows_of_head.scales = scales_array + batch * scale_strides[0] + kv_head * scale_strides[1];         \
  rows_of_head.row_stride = strides[2];                                                               \
  rows_of_head.value_stride = strides[3];                                                             \
  rows_of_head.scale_row_stride = scale_strides[2];                                                   \
  rows_of_head.scale_stride = scale_strides[3];

// Positions that a row sees: [low, high).
struct Interval {
  int low, high;
};

// What a row at `position` sees of the keys [first, end) that are real. `window` below 0: none.
METAL_FUNC Interval sight(int position, int first, int end, bool causal, int window) {
  Interval seen = {first, end};
  if (window >= 0) seen = {metal::max(first, position - window), metal::min(end, position + window + 1)};
  if (causal) seen.high = metal::min(seen.high, position + 1);
  return seen;
}

// What is added to dot products, here nothing.
struct NoBias {
  template <typename Table>
  METAL_FUNC void set_row(int row, Table table, int head, int most) {}
  METAL_FUNC float at(int row, int distance) const { return 0.0f; }
};

// T5's: a table of each head by the distance from the query to the key, whose ends stand for all that is farther.
template <typename T, int TILE>
struct RelativeBias {
  const device T* tables[TILE];  // each row's, at distance 0
  int most;

  METAL_FUNC void set_row(int row, const device T* table, int head, int farthest) {
    tables[row] = table + head * (2 * farthest + 1) + farthest;
    most = farthest;
  }
  METAL_FUNC float at(int row, int distance) const {
    return float(tables[row][metal::clamp(distance, -most, most)]) * LOG2_E;
  }
};

// TILE rows of queries that share keys, and what they have seen so far.
template <int HEAD_DIM, int TILE>
struct Tile {
  static constant constexpr int PIECES = HEAD_DIM / PIECE;
  // Lanes of a group: PIECES rounded up to a power of two.
  static constant constexpr int LANES = PIECES <= 1 ? 1 : PIECES <= 2 ? 2 : PIECES <= 4 ? 4 : PIECES <= 8 ? 8 : PIECES <= 16 ? 16 : 32;
  static constant constexpr int GROUPS = 32 / LANES;
  static constant constexpr int KEYS_AT_ONCE = TILE == 1 ? 4 : 2;  // of a group: their loads overlap
  static constant constexpr int WIDTH = HEAD_DIM + 2;              // floats that a row leaves for others to join

  int piece, group;  // this lane's
  bool working;      // false for lanes beyond the last piece
  int position[TILE];
  Interval seen[TILE];
  float queries[TILE][PIECE], sums[TILE][PIECE], peak[TILE], weight[TILE];

  METAL_FUNC void start(int lane) {
    piece = lane % LANES;
    group = lane / LANES;
    working = piece < PIECES;
    MARLIN_UNROLL
    for (int r = 0; r < TILE; r++) {
      peak[r] = NOTHING_SEEN;
      weight[r] = 0.0f;
      MARLIN_UNROLL
      for (int i = 0; i < PIECE; i++) sums[r][i] = 0.0f;
    }
  }

  // Row r of the tile: its values at `from`, its place in the sequence, what it sees of it, and the factor of dot products.
  template <typename T>
  METAL_FUNC void set_row(int r, const device T* from, int64_t value_stride, int place, Interval sees, float factor) {
    position[r] = place;
    seen[r] = sees;
    MARLIN_UNROLL
    for (int i = 0; i < PIECE; i++) {
      queries[r][i] = working ? float(from[(piece * PIECE + i) * value_stride]) * (factor * LOG2_E) : 0.0f;
    }
  }

  // Keys that any row sees.
  METAL_FUNC Interval reach() const {
    Interval all = seen[0];
    MARLIN_UNROLL
    for (int r = 1; r < TILE; r++) all = {metal::min(all.low, seen[r].low), metal::max(all.high, seen[r].high)};
    return all;
  }

  // Rows [first, end) of keys and values, of which this simdgroup takes its share; row 0 stands at position `base`.
  template <bool UNIT, typename Keys, typename Values, typename Bias>
  METAL_FUNC void see(
      Keys keys, Values values, int first, int end, int base, int simdgroup, int simdgroups, thread const Bias& bias) {
    constexpr int STEP = KEYS_AT_ONCE * GROUPS;
    for (int at = first + simdgroup * STEP; at < end; at += simdgroups * STEP) {
      float scores[KEYS_AT_ONCE][TILE];
      MARLIN_UNROLL
      for (int u = 0; u < KEYS_AT_ONCE; u++) {
        const int key = at + u * GROUPS + group;
        float key_values[PIECE];
        const float factor = keys.template load<UNIT>(metal::min(key, end - 1), working ? piece : 0, key_values);
        MARLIN_UNROLL
        for (int r = 0; r < TILE; r++) {
          float score = 0.0f;
          MARLIN_UNROLL
          for (int i = 0; i < PIECE; i++) score += queries[r][i] * key_values[i];
          score = working ? score * factor : 0.0f;
          MARLIN_UNROLL
          for (int lanes = 1; lanes < LANES; lanes *= 2) score += metal::simd_shuffle_xor(score, ushort(lanes));
          const int place = base + key;
          const bool sees = key < end && place >= seen[r].low && place < seen[r].high;
          scores[u][r] = sees ? score + bias.at(r, place - position[r]) : HIDDEN;
        }
      }
      MARLIN_UNROLL
      for (int r = 0; r < TILE; r++) {
        float highest = peak[r];
        MARLIN_UNROLL
        for (int u = 0; u < KEYS_AT_ONCE; u++) highest = metal::max(highest, scores[u][r]);
        const float shrink = metal::fast::exp2(peak[r] - highest);
        peak[r] = highest;
        weight[r] *= shrink;
        MARLIN_UNROLL
        for (int u = 0; u < KEYS_AT_ONCE; u++) {
          scores[u][r] = metal::fast::exp2(scores[u][r] - highest);
          weight[r] += scores[u][r];
        }
        MARLIN_UNROLL
        for (int i = 0; i < PIECE; i++) sums[r][i] *= shrink;
      }
      MARLIN_UNROLL
      for (int u = 0; u < KEYS_AT_ONCE; u++) {
        float value_values[PIECE];
        const int row = metal::min(at + u * GROUPS + group, end - 1);
        const float factor = values.template load<UNIT>(row, working ? piece : 0, value_values);
        MARLIN_UNROLL
        for (int r = 0; r < TILE; r++) {
          const float share = scores[u][r] * factor;
          MARLIN_UNROLL
          for (int i = 0; i < PIECE; i++) sums[r][i] += share * value_values[i];
        }
      }
    }
  }

  // What all groups of the simdgroup have seen, to every one of its lanes.
  METAL_FUNC void join_groups() {
    MARLIN_UNROLL
    for (int lanes = LANES; lanes < 32; lanes *= 2) {
      MARLIN_UNROLL
      for (int r = 0; r < TILE; r++) {
        const float other_peak = metal::simd_shuffle_xor(peak[r], ushort(lanes));
        const float highest = metal::max(peak[r], other_peak);
        const float own_share = metal::fast::exp2(peak[r] - highest);
        const float other_share = metal::fast::exp2(other_peak - highest);
        weight[r] = weight[r] * own_share + metal::simd_shuffle_xor(weight[r], ushort(lanes)) * other_share;
        MARLIN_UNROLL
        for (int i = 0; i < PIECE; i++) {
          sums[r][i] = sums[r][i] * own_share + metal::simd_shuffle_xor(sums[r][i], ushort(lanes)) * other_share;
        }
        peak[r] = highest;
      }
    }
  }

  // After join_groups: what this simdgroup has seen, TILE rows of WIDTH floats: sums, then peak and weight. Groups share the rows.
  METAL_FUNC void leave(threadgroup float* rows) const {
    MARLIN_UNROLL
    for (int r = 0; r < TILE; r++) {
      if (has(r)) {
        MARLIN_UNROLL
        for (int i = 0; i < PIECE; i++) rows[r * WIDTH + piece * PIECE + i] = sums[r][i];
        if (piece == 0) rows[r * WIDTH + HEAD_DIM] = peak[r];
        if (piece == 0) rows[r * WIDTH + HEAD_DIM + 1] = weight[r];
      }
    }
  }

  // Whether this lane is the one that gives its piece of row r away, after join_groups; and that piece of the result.
  METAL_FUNC bool has(int r) const { return group == r % GROUPS && working; }
  METAL_FUNC float result(int r, int i) const { return sums[r][i] / (weight[r] == 0.0f ? 1.0f : weight[r]); }
};

// One number of a row's output before its division, with the peak and the weight of the row.
struct Joined {
  float sum, peak, weight;
};

// Number i of a row that `count` simdgroups have left, `stride` floats apart.
template <int HEAD_DIM>
METAL_FUNC Joined join(const threadgroup float* row, int i, int count, int stride) {
  Joined all = {0.0f, NOTHING_SEEN, 0.0f};
  for (int s = 0; s < count; s++) all.peak = metal::max(all.peak, row[s * stride + HEAD_DIM]);
  for (int s = 0; s < count; s++) {
    const float share = metal::fast::exp2(row[s * stride + HEAD_DIM] - all.peak);
    all.sum += share * row[s * stride + i];
    all.weight += share * row[s * stride + HEAD_DIM + 1];
  }
  return all;
}

}  // namespace marlin
