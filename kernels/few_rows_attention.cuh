// Attention of one new row of a head over the rows before it, by one warp or by all warps of a block.
//
// A group of lanes holds one key at a time, each lane 8 values of it and of the running output. The new key and value are in no
// cache yet: they come as the products left them, are normalised and rotated here, and one warp puts them into the cache.
// A decoder's rows of a memory are numbers of 16 bits (float32 of that type), or packed as a cache packs them; so are the rows of a
// packed cache, in pages.

namespace marlin {

// Whether rows are shared by all warps of a block, and a row is read by another warp than the one that wrote it.
constexpr bool BY_BLOCKS = IS_GLOBAL || ANSWERS;
constexpr int DEEP_BY_BLOCKS = 4;  // rows that a group of lanes has under way there
// From a row of a head to the next one: a decoder's rows stand before each other, of all heads, so that they can grow.
constexpr int ROW_STRIDE = ANSWERS ? STREAMS * KV_HEADS * HEAD_DIM : HEAD_DIM;

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float NOTHING_SEEN = -1e30f;  // a running maximum before the first key; finite, so that differences are numbers

// Cosines and sines of one position: [head_dim / 2][2].
__device__ __forceinline__ void fill_rotation(float* rotation, float log2_theta, int position, int first, int stride) {
  constexpr int HALF = HEAD_DIM / 2;
  for (int i = first; i < HALF; i += stride) {
    float sine, cosine;
    sincosf(float(position) * exp2f(-log2_theta * float(i) / float(HALF)), &sine, &cosine);
    rotation[2 * i] = cosine, rotation[2 * i + 1] = sine;
  }
}

struct Head {
  static constexpr int LANES = HEAD_DIM / 8, CROWD = 32 / LANES;  // lanes of a group, groups of a warp
  float query[8], key[8], value[8], seen[8];
  float peak, weight;

  static __device__ __forceinline__ int piece() { return threadIdx.x % LANES; }
  static __device__ __forceinline__ int group() { return threadIdx.x % 32 / LANES; }

  static __device__ __forceinline__ float sum_of_group(float value) {
#pragma unroll
    for (int offset = 1; offset < LANES; offset *= 2) value += __shfl_xor_sync(0xffffffff, value, offset);
    return value;
  }

  // Normalise (where there is a weight) and rotate a head that lies in its lanes.
  static __device__ __forceinline__ void prepare(float (&x)[8], const T* norm, float eps, const float* rotation) {
    if constexpr (QK_NORM) {
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; i++) squares += x[i] * x[i];
      const float factor = rsqrtf(sum_of_group(squares) / HEAD_DIM + eps);
#pragma unroll
      for (int i = 0; i < 8; i++) x[i] *= factor * to_float(norm[piece() * 8 + i]);
    }
    if constexpr (ROTATES && INTERLEAVED) {
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const float cosine = rotation[piece() * 8 + i], sine = rotation[piece() * 8 + i + 1], first = x[i], second = x[i + 1];
        x[i] = first * cosine - second * sine, x[i + 1] = first * sine + second * cosine;
      }
    } else if constexpr (ROTATES) {
      const bool upper = piece() >= LANES / 2;
      const float* own = rotation + piece() % (LANES / 2) * 16;
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float other = __shfl_xor_sync(0xffffffff, x[i], LANES / 2);
        x[i] = x[i] * own[2 * i] + (upper ? other : -other) * own[2 * i + 1];
      }
    }
  }

  // The product with a Hadamard matrix, which keys of packed rows have had, of a head that lies in its lanes.
  static __device__ __forceinline__ void spread(float (&x)[8]) {
#pragma unroll
    for (int apart = 1; apart < 8; apart *= 2) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        if (i & apart) continue;
        const float low = x[i], high = x[i + apart];
        x[i] = low + high, x[i + apart] = low - high;
      }
    }
#pragma unroll
    for (int apart = 1; apart < LANES; apart *= 2) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const float other = __shfl_xor_sync(0xffffffff, x[i], apart);
        x[i] = piece() & apart ? other - x[i] : x[i] + other;
      }
    }
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] *= rsqrtf(float(HEAD_DIM));
  }

  // Some keys and values of each group of a cache, on their way.
  struct Rows {
    struct From {
      const T *keys, *values;
    };
    static constexpr int DEEP = BY_BLOCKS ? DEEP_BY_BLOCKS : 2;
    static constexpr bool PACKED = false, AHEAD = false;
    Loaded<T, 8> keys[DEEP], values[DEEP];

    // A local stage's rows are this warp's own.
    __device__ __forceinline__ void load(const From& from, int base, int end, int warps) {
#pragma unroll
      for (int u = 0; u < DEEP; u++) {
        if (base + u * warps * CROWD >= end) break;
        const int64_t place = int64_t(min(base + u * warps * CROWD + group(), end - 1)) * ROW_STRIDE + piece() * 8;
        keys[u].template load<BY_BLOCKS>(from.keys + place);
        values[u].template load<BY_BLOCKS>(from.values + place);
      }
    }
  };

  // The same of a memory that a decoder reads.
  struct MemoryRows {
    struct From {
      const void *keys, *key_scales, *values, *value_scales;
      int64_t first;  // row of the head
    };
    static constexpr int DEEP = DEEP_BY_BLOCKS;
    static constexpr bool PACKED = MEMORY_BITS < 16, AHEAD = false;
    StoredRow<MEMORY_BITS> keys[DEEP], values[DEEP];

    __device__ __forceinline__ void load(const From& from, int base, int end, int warps) {
#pragma unroll
      for (int u = 0; u < DEEP; u++) {
        if (base + u * warps * CROWD >= end) break;
        const int64_t row = from.first + min(base + u * warps * CROWD + group(), end - 1);
        keys[u].load(from.keys, from.key_scales, row, piece());
        values[u].load(from.values, from.value_scales, row, piece());
      }
    }
  };

  // The same of a packed cache. Its pages are found by a table that no launch writes to.
  struct PagedRows {
    struct From {
      const Page* pages;
      int64_t first;  // row of the head in each page
    };
    static constexpr int DEEP = DEEP_BY_BLOCKS;
    static constexpr bool PACKED = true, AHEAD = true;  // the next rows on their way while some are decoded
    StoredRow<KEY_BITS> keys[DEEP];
    StoredRow<VALUE_BITS> values[DEEP];

    __device__ __forceinline__ void load(const From& from, int base, int end, int warps) {
#pragma unroll
      for (int u = 0; u < DEEP; u++) {
        if (base + u * warps * CROWD >= end) break;
        const int row = min(base + u * warps * CROWD + group(), end - 1);
        const Page page = from.pages[row / ROWS_A_PAGE];
        const int64_t place = from.first + row % ROWS_A_PAGE;
        keys[u].load(page.keys, page.key_scales, place, piece());
        values[u].load(page.values, page.value_scales, place, piece());
      }
    }
  };

  // Rows first .. end - 1, of which this is one of `warps` that share them, and the new row, if it is this one's. `some` are on
  // their way: the first ones of this warp. bias(row) is added to scores, in powers of two.
  template <typename Some, typename From, typename Bias>
  __device__ __forceinline__ void see(
      Some& some, const From& from, int first, int end, int warp, int warps, bool with_new, const Bias& bias) {
    peak = NOTHING_SEEN, weight = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) seen[i] = 0.0f;
    int base = first + warp * CROWD;
    if constexpr (Some::AHEAD) {  // decoding takes as long as what is on its way; its text is long, and stands here once
#pragma unroll 1
      while (true) {
        Some others;
        const int following = base + Some::DEEP * warps * CROWD;
        others.load(from, following, end, warps);
        take(some, base, end, warps, with_new, bias);
        if (following >= end) break;
        some = others, base = following, with_new = false;
      }
    } else {
      take(some, base, end, warps, with_new, bias);
      for (base += Some::DEEP * warps * CROWD; base < end; base += Some::DEEP * warps * CROWD) {
        some.load(from, base, end, warps);
        take(some, base, end, warps, false, bias);
      }
    }
#pragma unroll
    for (int offset = LANES; offset < 32; offset *= 2) {
      const float other_peak = __shfl_xor_sync(0xffffffff, peak, offset), highest = fmaxf(peak, other_peak);
      const float own = exp2f(peak - highest), other = exp2f(other_peak - highest);
      weight = weight * own + __shfl_xor_sync(0xffffffff, weight, offset) * other;
#pragma unroll
      for (int i = 0; i < 8; i++) seen[i] = seen[i] * own + __shfl_xor_sync(0xffffffff, seen[i], offset) * other;
      peak = highest;
    }
  }

 private:
  // The numbers of a row that is packed, or of the new one behind them, and what each is to be multiplied by.
  template <int DEEP, typename Row>
  static __device__ __forceinline__ float numbers_of(const Row (&rows)[DEEP], int u, const float (&fresh)[8], float (&numbers)[8]) {
    if (u < DEEP) {
      rows[u < DEEP ? u : 0].numbers(numbers);
      return rows[u < DEEP ? u : 0].factor();
    }
#pragma unroll
    for (int i = 0; i < 8; i++) numbers[i] = fresh[i];
    return 1.0f;
  }

  // Some rows, and the new one, together: what one needs does not wait for another.
  template <typename Some, typename Bias>
  __device__ __forceinline__ void take(const Some& some, int base, int end, int warps, bool with_new, const Bias& bias) {
    constexpr int DEEP = Some::DEEP;
    float scores[DEEP + 1], more[DEEP + 1];
    bool there[DEEP + 1];
#pragma unroll
    for (int u = 0; u <= DEEP; u++) {
      there[u] = u < DEEP ? base + u * warps * CROWD + group() < end : with_new && group() == 0;
      scores[u] = 0.0f, more[u] = there[u] ? bias(u < DEEP ? base + u * warps * CROWD + group() : end) : 0.0f;
      if constexpr (Some::PACKED) {
        if (u < DEEP && base + u * warps * CROWD >= end) continue;  // for no lane
        float numbers[8];
        const float factor = numbers_of<DEEP>(some.keys, u, key, numbers);
#pragma unroll
        for (int i = 0; i < 8; i++) scores[u] += query[i] * numbers[i];
        scores[u] *= factor;
      } else {
#pragma unroll
        for (int i = 0; i < 8; i++) scores[u] += query[i] * (u < DEEP ? some.keys[u < DEEP ? u : 0][i] : key[i]);
      }
    }
#pragma unroll
    for (int offset = 1; offset < LANES; offset *= 2) {
#pragma unroll
      for (int u = 0; u <= DEEP; u++) scores[u] += __shfl_xor_sync(0xffffffff, scores[u], offset);
    }
    float highest = peak;
#pragma unroll
    for (int u = 0; u <= DEEP; u++) scores[u] += more[u];
#pragma unroll
    for (int u = 0; u <= DEEP; u++) highest = there[u] ? fmaxf(highest, scores[u]) : highest;
    const float shrink = exp2f(peak - highest);
    weight *= shrink, peak = highest;
#pragma unroll
    for (int i = 0; i < 8; i++) seen[i] *= shrink;
#pragma unroll
    for (int u = 0; u <= DEEP; u++) {
      if (!there[u]) continue;  // what stands there may be no number
      const float share = exp2f(scores[u] - highest);
      weight += share;
      if constexpr (Some::PACKED) {
        float numbers[8];
        const float own = share * numbers_of<DEEP>(some.values, u, value, numbers);
#pragma unroll
        for (int i = 0; i < 8; i++) seen[i] += own * numbers[i];
      } else {
#pragma unroll
        for (int i = 0; i < 8; i++) seen[i] += share * (u < DEEP ? some.values[u < DEEP ? u : 0][i] : value[i]);
      }
    }
  }
};

}  // namespace marlin
