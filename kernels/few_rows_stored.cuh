// Rows of keys and values as caches store them: numbers, or words and scales in MLX's formats; how they are read, and packed.
//
// Eight values of a row lie in a lane. Packed are they to the very bits that MLX's `quantize` gives on a GPU: mxfp8 under the
// smallest power of two that clips none, nvfp4 under the largest value / 6, both to the nearest, ties to even.

namespace marlin {

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

// E4M3 of a magnitude, to nearest, ties to even, at most 448; of what is no number, none. Below 2^-6 the last place of a code is
// that of a float beside 2^14.
__device__ __forceinline__ uint32_t e4m3_of(float magnitude) {
  if (magnitude != magnitude) return 0x7f;
  if (magnitude < power_of_two<-6>()) return __float_as_uint(magnitude + power_of_two<14>()) - __float_as_uint(power_of_two<14>());
  const uint32_t bits = __float_as_uint(magnitude);
  return min((bits + 0x7ffff + (bits >> 20 & 1)) >> 20, ((127 - 7) << 3) + 0x7eu) - ((127 - 7) << 3);
}

// E2M1 of a magnitude, to nearest, ties to even, at most 6; of what is no number, 6. Below 1 as above.
__device__ __forceinline__ uint32_t e2m1_of(float magnitude) {
  if (magnitude < 1.0f) return __float_as_uint(magnitude + power_of_two<22>()) - __float_as_uint(power_of_two<22>());
  const uint32_t bits = __float_as_uint(magnitude);
  return min((bits + 0x1fffff + (bits >> 22 & 1)) >> 22, ((127 - 1) << 1) + 7u) - ((127 - 1) << 1);
}

// E8M0 of a magnitude: the smallest power of two that is no smaller; of what is no number, none.
__device__ __forceinline__ uint32_t e8m0_of(float magnitude) {
  const uint32_t bits = __float_as_uint(magnitude), exponent = bits >> 23, rest = bits & 0x7fffff;
  const bool up = exponent == 0 ? rest > 0x400000 : rest > 0 && exponent < 0xfe;
  return exponent + up;
}

// Eight values of a row [states, HEAD_DIM] of keys or values, on their way until they are asked for: `numbers`, each of which is
// to be multiplied by `factor`.
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

  __device__ __forceinline__ void store(void* rows, void* scales, int64_t row, int piece) const {
    uint32_t* to = static_cast<uint32_t*>(rows) + (row * (HEAD_DIM / 8) + piece) * WORDS;
#pragma unroll
    for (int i = 0; i < WORDS; i++) to[i] = words[i];
    if (piece % (GROUP / 8) == 0) static_cast<uint8_t*>(scales)[(row * HEAD_DIM + piece * 8) / GROUP] = scale;
  }

  // Of values that lie in lanes, a group of the format beside each other.
  static __device__ __forceinline__ StoredRow of(const float (&values)[8]) {
    StoredRow made;
    float most = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) most = fmaxf(most, fabsf(values[i]));
#pragma unroll
    for (int offset = 1; offset < GROUP / 8; offset *= 2) most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, offset));
    made.scale = uint8_t(BITS == 8 ? e8m0_of(most / 448.0f) : e4m3_of(most / 6.0f));
    const float inverse = 1.0f / made.factor();
#pragma unroll
    for (int i = 0; i < WORDS; i++) made.words[i] = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float value = values[i] * inverse;
      const uint32_t code = BITS == 8 ? e4m3_of(fabsf(value)) : e2m1_of(fabsf(value));
      const uint32_t sign = value == value && __float_as_uint(value) >> 31 ? 1u << (BITS - 1) : 0;
      made.words[i * BITS / 32] |= (code | sign) << i * BITS % 32;
    }
    return made;
  }

  __device__ __forceinline__ float factor() const { return scale_of<BITS == 4>(scale); }

  __device__ __forceinline__ void numbers(float (&values)[8]) const {
    using Own = Codes<false, BITS>;
    const float half = power_of_two<Own::CODE_EXPONENT>();
    const uint32_t whole = pair_of<false>(half, half);
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
      uint32_t pairs[Own::PAIRS];
      Own::decode(words[w], pairs);
#pragma unroll
      for (int p = 0; p < Own::PAIRS; p++) {
        const uint32_t pair = product_of_pairs<false>(pairs[p], whole);
        values[w * 2 * Own::PAIRS + p] = __uint_as_float(pair << 16);
        values[w * 2 * Own::PAIRS + p + Own::PAIRS] = __uint_as_float(pair & 0xffff0000u);
      }
    }
  }
};

template <>
struct StoredRow<16> : Loaded<T, 8> {
  __device__ __forceinline__ void load(const void* rows, const void*, int64_t row, int piece) {
    Loaded<T, 8>::template load<false>(static_cast<const T*>(rows) + row * HEAD_DIM + piece * 8);
  }

  __device__ __forceinline__ void store(void* rows, void*, int64_t row, int piece) const {
    float values[8];
    numbers(values);
    store_values(static_cast<T*>(rows) + row * HEAD_DIM + piece * 8, values);
  }

  static __device__ __forceinline__ StoredRow of(const float (&values)[8]) {
    StoredRow made;
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
      if constexpr (sizeof(T) == 4) {
        made.words[i] = __float_as_uint(values[i]);
      } else {
        made.words[i] = pair_of<false>(values[2 * i], values[2 * i + 1]);
      }
    }
    return made;
  }

  __device__ __forceinline__ float factor() const { return 1.0f; }

  __device__ __forceinline__ void numbers(float (&values)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] = (*this)[i];
  }
};

// Where the rows of a page stand, of all streams and heads: [streams, KV_HEADS, ROWS_A_PAGE, HEAD_DIM], and their scales.
struct alignas(16) Page {
  void *keys, *key_scales, *values, *value_scales;
};

}  // namespace marlin
