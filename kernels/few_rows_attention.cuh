// Attention of one new row of a head over the rows before it, by one warp or by all warps of a block.
//
// A group of lanes holds one key at a time, each lane 8 values of it and of the running output. The new key and value are in no
// cache yet: they come as the products left them, are normalised and rotated here, and one warp puts them into the cache.
// A decoder's rows of a memory are numbers of 16 bits (float32 of that type), or packed as a cache packs them.

namespace marlin {

// Whether rows are shared by all warps of a block, and a row is read by another warp than the one that wrote it.
constexpr bool BY_BLOCKS = IS_GLOBAL || ANSWERS;
constexpr int DEEP_BY_BLOCKS = 4;  // rows that a group of lanes has under way there
// From a row of a head to the next one: a decoder's rows stand before each other, of all heads, so that they can grow.
constexpr int ROW_STRIDE = ANSWERS ? STREAMS * KV_HEADS * HEAD_DIM : HEAD_DIM;

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float NOTHING_SEEN = -1e30f;  // a running maximum before the first key; finite, so that differences are numbers

// COUNT (2, 4 or 8) values side by side, on their way until they are asked for: what is asked for too early is waited for.
template <typename From, int COUNT>
struct Loaded {
  static constexpr int WORDS = COUNT * sizeof(From) / 4;
  uint32_t words[WORDS];

  // PAST_FIRST: not from the first cache, which does not know what other blocks have written.
  template <bool PAST_FIRST>
  __device__ __forceinline__ void load(const From* from) {
    if constexpr (WORDS % 4 == 0) {
#pragma unroll
      for (int i = 0; i < WORDS; i += 4) {
        const uint4* place = reinterpret_cast<const uint4*>(from) + i / 4;
        const uint4 four = PAST_FIRST ? __ldcg(place) : *place;
        words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
      }
    } else if constexpr (WORDS == 2) {
      const uint2* place = reinterpret_cast<const uint2*>(from);
      const uint2 two = PAST_FIRST ? __ldcg(place) : *place;
      words[0] = two.x, words[1] = two.y;
    } else {
      const uint32_t* place = reinterpret_cast<const uint32_t*>(from);
      words[0] = PAST_FIRST ? __ldcg(place) : *place;
    }
  }

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (sizeof(From) == 4) return __uint_as_float(words[i]);
    return __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
  }
};

template <bool PAST_FIRST = true, typename From, int COUNT>
__device__ __forceinline__ void load_values(const From* from, float (&values)[COUNT]) {
  Loaded<From, COUNT> loaded;
  loaded.template load<PAST_FIRST>(from);
#pragma unroll
  for (int i = 0; i < COUNT; i++) values[i] = loaded[i];
}

// Eight values side by side to memory.
template <typename To>
__device__ __forceinline__ void store_values(To* to, const float (&values)[8]) {
  if constexpr (sizeof(To) == 2) {
    uint32_t pairs[4];
#pragma unroll
    for (int p = 0; p < 4; p++) pairs[p] = pair_of<false>(values[2 * p], values[2 * p + 1]);
    *reinterpret_cast<uint4*>(to) = uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
  } else {
    reinterpret_cast<float4*>(to)[0] = float4{values[0], values[1], values[2], values[3]};
    reinterpret_cast<float4*>(to)[1] = float4{values[4], values[5], values[6], values[7]};
  }
}

// Cosines and sines of one position: [head_dim / 2][2].
__device__ __forceinline__ void fill_rotation(float* rotation, float log2_theta, int position, int first, int stride) {
  constexpr int HALF = HEAD_DIM / 2;
  for (int i = first; i < HALF; i += stride) {
    float sine, cosine;
    sincosf(float(position) * exp2f(-log2_theta * float(i) / float(HALF)), &sine, &cosine);
    rotation[2 * i] = cosine, rotation[2 * i + 1] = sine;
  }
}

// Eight values of a row [states, HEAD_DIM] of keys or values, on their way until they are asked for.
template <int BITS>
struct StoredRow {
  static constexpr int WORDS = 8 * BITS / 32, GROUP = BITS == 8 ? 32 : 16;
  uint32_t words[WORDS];
  uint8_t scale;

  __device__ __forceinline__ void load(const void* rows, const void* scales, int64_t row, int piece) {
    const uint32_t* from = static_cast<const uint32_t*>(rows) + (row * (HEAD_DIM / 8) + piece) * WORDS;
    if constexpr (BITS == 8) {
      const uint2 two = *reinterpret_cast<const uint2*>(from);
      words[0] = two.x, words[1] = two.y;
    } else {
      words[0] = *from;
    }
    scale = static_cast<const uint8_t*>(scales)[(row * HEAD_DIM + piece * 8) / GROUP];
  }

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (BITS == 8) return scale_of<true>(uint8_t(words[i / 4] >> i % 4 * 8)) * scale_of<false>(scale);
    const uint32_t code = words[0] >> i * 4;
    return __uint_as_float((code & 8u) << 28 | (code & 7u) << 22) * power_of_two<126>() * scale_of<true>(scale);
  }
};

template <>
struct StoredRow<16> : Loaded<T, 8> {
  __device__ __forceinline__ void load(const void* rows, const void*, int64_t row, int piece) {
    Loaded<T, 8>::template load<false>(static_cast<const T*>(rows) + row * HEAD_DIM + piece * 8);
  }
};

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

  // Rows first .. end - 1, of which this is one of `warps` that share them, and the new row, if it is this one's. `some` are on
  // their way: the first ones of this warp. bias(row) is added to scores, in powers of two.
  template <typename Some, typename From, typename Bias>
  __device__ __forceinline__ void see(
      Some& some, const From& from, int first, int end, int warp, int warps, bool with_new, const Bias& bias) {
    peak = NOTHING_SEEN, weight = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) seen[i] = 0.0f;
    int base = first + warp * CROWD;
    take(some, base, end, warps, with_new, bias);
    for (base += Some::DEEP * warps * CROWD; base < end; base += Some::DEEP * warps * CROWD) {
      some.load(from, base, end, warps);
      take(some, base, end, warps, false, bias);
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
#pragma unroll
      for (int i = 0; i < 8; i++) scores[u] += query[i] * (u < DEEP ? some.keys[u < DEEP ? u : 0][i] : key[i]);
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
#pragma unroll
      for (int i = 0; i < 8; i++) seen[i] += share * (u < DEEP ? some.values[u < DEEP ? u : 0][i] : value[i]);
    }
  }
};

}  // namespace marlin
