// Attention of one new row of a head over the rows before it, by one warp or by all warps of a block.
//
// A group of lanes holds one key at a time, each lane 8 values of it and of the running output. The new key and value are in no
// cache yet: they come as the products left them, are normalised and rotated here, and one warp puts them into the cache.

namespace marlin {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float NOTHING_SEEN = -1e30f;  // a running maximum before the first key; finite, so that differences are numbers

// COUNT (2, 4 or 8) values side by side, past the first cache.
template <typename From, int COUNT>
__device__ __forceinline__ void load_values(const From* from, float (&values)[COUNT]) {
  constexpr int WORDS = COUNT * sizeof(From) / 4;
  uint32_t words[WORDS];
  if constexpr (WORDS % 4 == 0) {
#pragma unroll
    for (int i = 0; i < WORDS; i += 4) {
      const uint4 four = __ldcg(reinterpret_cast<const uint4*>(from) + i / 4);
      words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
    }
  } else if constexpr (WORDS == 2) {
    const uint2 two = __ldcg(reinterpret_cast<const uint2*>(from));
    words[0] = two.x, words[1] = two.y;
  } else {
    words[0] = __ldcg(reinterpret_cast<const uint32_t*>(from));
  }
#pragma unroll
  for (int i = 0; i < WORDS; i++) {
    if constexpr (sizeof(From) == 4) {
      values[i] = __uint_as_float(words[i]);
    } else {
      values[2 * i] = __uint_as_float(words[i] << 16), values[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
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

  // Two keys and values of each group, on their way.
  struct Rows {
    float keys[2][8], values[2][8];

    __device__ __forceinline__ void load(const T* from_keys, const T* from_values, int base, int end, int warps) {
#pragma unroll
      for (int u = 0; u < 2; u++) {
        if (base + u * warps * CROWD >= end) break;
        const int64_t row = min(base + u * warps * CROWD + group(), end - 1);
        load_values(from_keys + row * HEAD_DIM + piece() * 8, keys[u]);
        load_values(from_values + row * HEAD_DIM + piece() * 8, values[u]);
      }
    }
  };

  // Rows first .. end - 1 of a cache, of which this is one of `warps` that share them, and the new row, if it is this one's.
  // `some` are on their way: the first ones of this warp.
  __device__ __forceinline__ void see(
      Rows& some, const T* keys, const T* values, int first, int end, int warp, int warps, bool with_new) {
    peak = NOTHING_SEEN, weight = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) seen[i] = 0.0f;
    for (int base = first + warp * CROWD; base < end; base += 2 * warps * CROWD) {
      if (base > first + warp * CROWD) some.load(keys, values, base, end, warps);
#pragma unroll
      for (int u = 0; u < 2; u++) {
        if (base + u * warps * CROWD >= end) break;
        take(some.keys[u], some.values[u], base + u * warps * CROWD + group() < end);
      }
    }
    if (with_new) take(key, value, group() == 0);  // the same for all lanes
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
  __device__ __forceinline__ void take(const float (&k)[8], const float (&v)[8], bool there) {
    float score = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) score += query[i] * k[i];
    score = sum_of_group(score);
    if (!there) return;  // whole groups alike, and no exchange follows
    const float highest = fmaxf(peak, score), shrink = exp2f(peak - highest), share = exp2f(score - highest);
    weight = weight * shrink + share;
#pragma unroll
    for (int i = 0; i < 8; i++) seen[i] = seen[i] * shrink + share * v[i];
    peak = highest;
  }
};

}  // namespace marlin
