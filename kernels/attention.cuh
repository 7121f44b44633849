// Attention of a few rows of queries over rows of keys and values, dense or packed, as the kernels flash_attention* use it.
//
// A warp's lanes stand in groups; a group holds one key at a time, each of its lanes PIECE values of it, and the same piece of
// every query of the tile and of the running output. So a key is loaded and decoded once for the whole tile, straight from
// memory to registers, and the groups only meet when all keys are done. Softmax is in float32 throughout.

namespace marlin {

constexpr int PIECE = 16;  // values: one group of nvfp4, half a group of mxfp8
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float NOTHING_SEEN = -1e30f;  // a running maximum before the first key; finite, so that differences are numbers

// What one lane has of one key or value: as it stands in memory, and as floats that `factor` multiplies.
template <int BITS, typename Stored>
struct Piece;

template <typename Stored>
struct DensePiece {
  uint32_t words[PIECE * sizeof(Stored) / 4];

  __device__ __forceinline__ float values(float (&out)[PIECE]) const {
#pragma unroll
    for (int i = 0; i < PIECE; i++) {
      if constexpr (sizeof(Stored) == 4) {
        out[i] = __uint_as_float(words[i]);
      } else if constexpr (marlin::is_same<Stored, __half>) {
        out[i] = __half2float(__ushort_as_half(uint16_t(words[i / 2] >> (i % 2 * 16))));
      } else {
        out[i] = __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
      }
    }
    return 1.0f;
  }
};

template <>
struct Piece<32, float> : DensePiece<float> {};
template <>
struct Piece<16, __half> : DensePiece<__half> {};
template <>
struct Piece<16, __nv_bfloat16> : DensePiece<__nv_bfloat16> {};

template <int BITS>
struct Piece<BITS, uint32_t> {
  uint32_t words[PIECE * BITS / 32];
  uint8_t scale;

  __device__ __forceinline__ float values(float (&out)[PIECE]) const {
    constexpr int PER_WORD = 32 / BITS, PAIRS = PER_WORD / 2;
#pragma unroll
    for (int word = 0; word < PIECE / PER_WORD; word++) {
      uint32_t pairs[PAIRS];
      Codes<true, BITS>::decode(words[word], pairs);
#pragma unroll
      for (int p = 0; p < PAIRS; p++) {
        float2 two = __half22float2(reinterpret_cast<const __half2&>(pairs[p]));
        out[word * PER_WORD + p] = two.x;
        out[word * PER_WORD + p + PAIRS] = two.y;
      }
    }
    return scale_of<BITS == 4>(scale) * power_of_two<Codes<true, BITS>::CODE_EXPONENT>();
  }
};

// Rows of keys or values of one head. Strides count elements of their arrays.
template <int BITS, typename Stored>
struct Rows {
  const Stored* data;
  const uint8_t* scales;
  int64_t row_stride, value_stride, scale_stride;

  // Whether every piece starts at a multiple of 16 bytes (8 for nvfp4) and lies in one piece.
  __device__ __forceinline__ bool wide() const {
    constexpr int UNIT = BITS == 4 ? 8 : 16;
    return value_stride == 1 && reinterpret_cast<uintptr_t>(data) % UNIT == 0 && row_stride * sizeof(Stored) % UNIT == 0;
  }

  template <bool WIDE>
  __device__ __forceinline__ void load(int row, int piece, Piece<BITS, Stored>& out) const {
    constexpr int ELEMENTS = PIECE * BITS / 8 / sizeof(Stored);
    const Stored* from = data + row * row_stride + piece * ELEMENTS * value_stride;
    if constexpr (WIDE) {
      load_words<true>(from, out.words);
    } else if constexpr (sizeof(Stored) == 4) {
#pragma unroll
      for (int i = 0; i < ELEMENTS; i++) out.words[i] = reinterpret_cast<const uint32_t*>(from)[i * value_stride];
    } else {
      const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
#pragma unroll
      for (int i = 0; i < ELEMENTS; i += 2) {
        out.words[i / 2] = halves[i * value_stride] | uint32_t(halves[(i + 1) * value_stride]) << 16;
      }
    }
    if constexpr (BITS == 4) out.scale = scales[row * scale_stride + piece];
    if constexpr (BITS == 8) out.scale = scales[row * scale_stride + piece / 2];
  }
};

// Which keys the rows of a tile see, by positions in the whole sequence.
struct Sight {
  int first, end;  // keys that exist for this tile's sequence: neither padding nor past its length
  bool causal;
  int window;  // below 0: none

  __device__ __forceinline__ bool sees(int query, int key) const {
    int distance = key - query;
    bool near = window < 0 || (distance <= window && -distance <= window);
    return key >= first && key < end && near && (!causal || distance <= 0);
  }
};

// TILE rows of queries that share keys, and what they have seen so far.
template <typename T, int HEAD_DIM, int TILE>
struct Tile {
  static constexpr int PIECES = HEAD_DIM / PIECE;
  static constexpr int LANES = PIECES <= 1 ? 1 : PIECES <= 2 ? 2 : PIECES <= 4 ? 4 : PIECES <= 8 ? 8 : 16;  // of a group
  static constexpr int GROUPS = 32 / LANES;
  static constexpr int KEYS_AT_ONCE = TILE == 1 ? 4 : TILE < 4 || LANES > 1 ? 2 : 1;  // of a group: their loads overlap

  int piece;     // this lane's
  bool working;  // false for lanes beyond the last piece
  int head[TILE], position[TILE];
  float queries[TILE][PIECE], sums[TILE][PIECE], peak[TILE], weight[TILE];

  // Rows `index`, index + 1, .. of the `count` that share keys: rows of the first head, then of the second, ..
  __device__ __forceinline__ void start(
      const T* from, const int64_t head_stride, const int64_t row_stride, const int64_t value_stride,
      int index, int count, int rows, int total, float scale) {
    piece = threadIdx.x % LANES;
    working = piece < PIECES;
#pragma unroll
    for (int r = 0; r < TILE; r++) {
      const int own = min(index + r, count - 1);
      head[r] = own / rows;
      position[r] = total - rows + own % rows;
      const T* row = from + head[r] * head_stride + own % rows * row_stride + piece * PIECE * value_stride;
#pragma unroll
      for (int i = 0; i < PIECE; i++) {
        queries[r][i] = working ? to_float(row[i * value_stride]) * (scale * LOG2_E) : 0.0f;
        sums[r][i] = 0.0f;
      }
      peak[r] = NOTHING_SEEN;
      weight[r] = 0.0f;
    }
  }

  // Keys first, first + 1, .. below end, of which this warp takes its share; `base` is the position of key 0 of these rows, and
  // bias(r, key position) is added to the dot products.
  template <bool WIDE, typename Keys, typename Values, int K_BITS, int V_BITS, typename Bias>
  __device__ __forceinline__ void see(
      const Rows<K_BITS, Keys>& keys, const Rows<V_BITS, Values>& values, int first, int end, int base,
      const Sight& sight, int warp, int warps, const Bias& bias) {
    const int group = threadIdx.x % 32 / LANES;
    const float unseen = -marlin::infinity();
    for (int at = first + warp * KEYS_AT_ONCE * GROUPS; at < end; at += warps * KEYS_AT_ONCE * GROUPS) {
      Piece<K_BITS, Keys> key_piece[KEYS_AT_ONCE];
      Piece<V_BITS, Values> value_piece[KEYS_AT_ONCE];
#pragma unroll
      for (int u = 0; u < KEYS_AT_ONCE; u++) {
        const int key = min(at + u * GROUPS + group, end - 1);
        keys.template load<WIDE>(key, working ? piece : 0, key_piece[u]);
        values.template load<WIDE>(key, working ? piece : 0, value_piece[u]);
      }
      float scores[KEYS_AT_ONCE][TILE];
#pragma unroll
      for (int u = 0; u < KEYS_AT_ONCE; u++) {
        const int key = at + u * GROUPS + group;
        float key_values[PIECE];
        const float factor = key_piece[u].values(key_values);
#pragma unroll
        for (int r = 0; r < TILE; r++) {
          float score = 0.0f;
#pragma unroll
          for (int i = 0; i < PIECE; i++) score += queries[r][i] * key_values[i];
          score = working ? score * factor : 0.0f;
#pragma unroll
          for (int offset = 1; offset < LANES; offset *= 2) score += __shfl_xor_sync(0xffffffff, score, offset);
          score += bias(r, base + key);
          scores[u][r] = key < end && sight.sees(position[r], base + key) ? score : unseen;
        }
      }
#pragma unroll
      for (int r = 0; r < TILE; r++) {
        float highest = peak[r];
#pragma unroll
        for (int u = 0; u < KEYS_AT_ONCE; u++) highest = fmaxf(highest, scores[u][r]);
        const float shrink = exp2f(peak[r] - highest);
        peak[r] = highest;
        weight[r] *= shrink;
#pragma unroll
        for (int u = 0; u < KEYS_AT_ONCE; u++) {
          scores[u][r] = exp2f(scores[u][r] - highest);
          weight[r] += scores[u][r];
        }
#pragma unroll
        for (int i = 0; i < PIECE; i++) sums[r][i] *= shrink;
      }
#pragma unroll
      for (int u = 0; u < KEYS_AT_ONCE; u++) {
        float value_values[PIECE];
        const float factor = value_piece[u].values(value_values);
#pragma unroll
        for (int r = 0; r < TILE; r++) {
          const float share = scores[u][r] * factor;
#pragma unroll
          for (int i = 0; i < PIECE; i++) sums[r][i] += share * value_values[i];
        }
      }
    }
  }

  // What all groups of the warp have seen, to every one of its lanes.
  __device__ __forceinline__ void join_groups() {
#pragma unroll
    for (int offset = LANES; offset < 32; offset *= 2) {
#pragma unroll
      for (int r = 0; r < TILE; r++) {
        const float other_peak = __shfl_xor_sync(0xffffffff, peak[r], offset);
        const float highest = fmaxf(peak[r], other_peak);
        const float own_share = exp2f(peak[r] - highest), other_share = exp2f(other_peak - highest);
        weight[r] = weight[r] * own_share + __shfl_xor_sync(0xffffffff, weight[r], offset) * other_share;
#pragma unroll
        for (int i = 0; i < PIECE; i++) {
          sums[r][i] = sums[r][i] * own_share + __shfl_xor_sync(0xffffffff, sums[r][i], offset) * other_share;
        }
        peak[r] = highest;
      }
    }
  }

  // What all warps of the block have seen, to the first one. `shared` has room for (WARPS - 1) * TILE * (HEAD_DIM + 2) floats.
  template <int WARPS>
  __device__ __forceinline__ void join_warps(float* shared) {
    constexpr int WIDTH = HEAD_DIM + 2;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp > 0 && lane < PIECES) {
#pragma unroll
      for (int r = 0; r < TILE; r++) {
        float* row = shared + ((warp - 1) * TILE + r) * WIDTH;
#pragma unroll
        for (int i = 0; i < PIECE; i++) row[piece * PIECE + i] = sums[r][i];
        if (lane == 0) row[HEAD_DIM] = peak[r], row[HEAD_DIM + 1] = weight[r];
      }
    }
    __syncthreads();
    if (warp > 0 || lane >= PIECES) return;
#pragma unroll
    for (int r = 0; r < TILE; r++) {
      for (int other = 0; other < WARPS - 1; other++) {
        const float* row = shared + (other * TILE + r) * WIDTH;
        const float highest = fmaxf(peak[r], row[HEAD_DIM]);
        const float own_share = exp2f(peak[r] - highest), other_share = exp2f(row[HEAD_DIM] - highest);
        weight[r] = weight[r] * own_share + row[HEAD_DIM + 1] * other_share;
#pragma unroll
        for (int i = 0; i < PIECE; i++) sums[r][i] = sums[r][i] * own_share + row[piece * PIECE + i] * other_share;
        peak[r] = highest;
      }
    }
  }

  // Row r's output; zeros where it saw nothing. Lanes below PIECES hold it after the joins.
  template <typename Out>
  __device__ __forceinline__ void write(int r, Out* row) const {
    const float share = weight[r] > 0.0f ? 1.0f / weight[r] : 0.0f;
#pragma unroll
    for (int i = 0; i < PIECE; i++) row[piece * PIECE + i] = from_float<Out>(sums[r][i] * share);
  }

  // The logarithm, base 2, of row r's sum of exponentials: what its output counts among those of other parts.
  __device__ __forceinline__ float log_weight(int r) const {
    return weight[r] > 0.0f ? peak[r] + log2f(weight[r]) : NOTHING_SEEN;
  }

  // The keys that any row of this tile can see: [first, end) within those that exist.
  __device__ __forceinline__ void reach(const Sight& sight, int& first, int& end) const {
    int lowest = position[0], highest = position[0];
#pragma unroll
    for (int r = 1; r < TILE; r++) lowest = min(lowest, position[r]), highest = max(highest, position[r]);
    first = sight.first, end = sight.end;
    if (sight.window >= 0) first = max(first, lowest - sight.window), end = min(end, highest + sight.window + 1);
    if (sight.causal) end = min(end, highest + 1);
  }
};

}  // namespace marlin
