// What the CUDA kernels share: codes of the packed formats as numbers, fragments for the matrix units, loads of 16 bytes.
// MLX's runtime compiler gets this text before a kernel's own; no include path leads to this folder.

namespace marlin {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else if constexpr (marlin::is_same<T, __half>) {
    return __float2half(value);
  } else {
    return __float2bfloat16(value);
  }
}

// 2^EXPONENT, for exponents of normal floats.
template <int EXPONENT>
__device__ __forceinline__ float power_of_two() {
  static_assert(-126 <= EXPONENT && EXPONENT <= 127);
  return __uint_as_float(uint32_t(EXPONENT + 127) << 23);
}

// Scale codes. The bits of an E4M3 code stand in a float 2^120 too small, and a product puts that right for its subnormals too.
template <bool E4M3>
__device__ __forceinline__ float scale_of(uint8_t code) {
  if constexpr (E4M3) {
    uint32_t bits = (uint32_t(code & 0x80) << 24) | (uint32_t(code & 0x7f) << 20);
    return __uint_as_float(bits) * power_of_two<120>();
  } else {
    return __uint_as_float(code == 0 ? 0x00400000u : uint32_t(code) << 23);
  }
}

__device__ __forceinline__ constexpr uint32_t shifted(uint32_t word, int left) {
  return left >= 0 ? word << left : word >> -left;
}

// Codes of one word as pairs of 16-bit floats, pair p holding codes p and p + PAIRS, which stand 16 bits apart in the word: so
// two shifts and two masks make a pair. The code's exponent lands in the lowest bits of the wider one, which makes numbers that
// are CODE_EXPONENT powers of two too small; the caller's scale puts that right, for the codes' subnormals too.
template <bool HALF, int BITS>
struct Codes {
  static constexpr int PAIRS = BITS == 4 ? 4 : 2;
  static constexpr int CODE_EXPONENT = BITS == 4 ? (HALF ? 14 : 126) : (HALF ? 8 : 120);
  static constexpr int MANTISSA = HALF ? 10 : 7;                // bits of the 16-bit float's mantissa
  static constexpr int FIELD = BITS == 4 ? 0x7 : 0x7f;          // exponent and mantissa of a code
  static constexpr int SHIFT = MANTISSA - (BITS == 4 ? 1 : 3);  // from a code's lowest bit to its place

  __device__ static __forceinline__ void decode(uint32_t word, uint32_t (&pairs)[PAIRS]) {
    constexpr uint32_t FIELDS = (uint32_t(FIELD) << SHIFT) * 0x00010001u;
#pragma unroll
    for (int p = 0; p < PAIRS; p++) {
      uint32_t sign = shifted(word, 16 - BITS * (p + 1)) & 0x80008000u;
      pairs[p] = sign | (shifted(word, SHIFT - BITS * p) & FIELDS);
    }
  }
};

template <bool HALF>
__device__ __forceinline__ uint32_t pair_of(float first, float second) {
  if constexpr (HALF) {
    __half2 pair = __floats2half2_rn(first, second);
    return reinterpret_cast<uint32_t&>(pair);
  } else {
    __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return reinterpret_cast<uint32_t&>(pair);
  }
}

template <bool HALF>
__device__ __forceinline__ uint32_t product_of_pairs(uint32_t a, uint32_t b) {
  if constexpr (HALF) {
    __half2 pair = __hmul2(reinterpret_cast<__half2&>(a), reinterpret_cast<__half2&>(b));
    return reinterpret_cast<uint32_t&>(pair);
  } else {
    __nv_bfloat162 pair = __hmul2(reinterpret_cast<__nv_bfloat162&>(a), reinterpret_cast<__nv_bfloat162&>(b));
    return reinterpret_cast<uint32_t&>(pair);
  }
}

template <bool HALF>
__device__ __forceinline__ uint32_t product_plus(uint32_t a, uint32_t b, uint32_t c) {
  if constexpr (HALF) {
    __half2 pair = __hfma2(reinterpret_cast<__half2&>(a), reinterpret_cast<__half2&>(b), reinterpret_cast<__half2&>(c));
    return reinterpret_cast<uint32_t&>(pair);
  } else {
    using Pair = __nv_bfloat162;
    Pair pair = __hfma2(reinterpret_cast<Pair&>(a), reinterpret_cast<Pair&>(b), reinterpret_cast<Pair&>(c));
    return reinterpret_cast<uint32_t&>(pair);
  }
}

template <bool HALF>
__device__ __forceinline__ uint32_t difference_of_pairs(uint32_t a, uint32_t b) {
  if constexpr (HALF) {
    __half2 pair = __hsub2(reinterpret_cast<__half2&>(a), reinterpret_cast<__half2&>(b));
    return reinterpret_cast<uint32_t&>(pair);
  } else {
    __nv_bfloat162 pair = __hsub2(reinterpret_cast<__nv_bfloat162&>(a), reinterpret_cast<__nv_bfloat162&>(b));
    return reinterpret_cast<uint32_t&>(pair);
  }
}

// Codes of one word that are whole numbers from 0 on, as pairs in the order of `Codes`. A code stands in the lowest bits of a
// float whose last place is 1 (1024 in half, 128 in bfloat16), from which that float is taken. A bfloat16 has seven bits for it:
// of a code from 128 on the eighth is what was to be taken.
template <bool HALF, int BITS>
__device__ __forceinline__ void whole_pairs(uint32_t word, uint32_t (&pairs)[BITS == 4 ? 4 : 2]) {
  constexpr uint32_t FIRST = HALF ? 0x64006400u : 0x43004300u;
  constexpr uint32_t FIELDS = BITS == 4 ? 0x000f000fu : HALF ? 0x00ff00ffu : 0x007f007fu;
#pragma unroll
  for (int p = 0; p < (BITS == 4 ? 4 : 2); p++) {
    const uint32_t codes = word >> p * BITS;
    const uint32_t taken = BITS == 8 && !HALF ? FIRST - (codes & 0x00800080u) * 0x86u : FIRST;  // 0x80 * 0x86 is 0x4300
    pairs[p] = difference_of_pairs<HALF>((codes & FIELDS) | FIRST, taken);
  }
}

// Scales times 2^EXPONENT, each twice in a pair: of two consecutive groups of nvfp4 (E4M3), or of one of the others (E8M0).
template <bool HALF, int EXPONENT>
__device__ __forceinline__ void scale_pairs(uint32_t codes, uint32_t (&pairs)[2]) {
  uint32_t decoded[2];
  Codes<HALF, 8>::decode(__byte_perm(codes, 0, 0x4140), decoded);
  constexpr int MISSING = EXPONENT + Codes<HALF, 8>::CODE_EXPONENT;
  const float half_of_it = power_of_two<MISSING / 2>(), rest = power_of_two<MISSING - MISSING / 2>();
  uint32_t scales = product_of_pairs<HALF>(decoded[0], pair_of<HALF>(half_of_it, half_of_it));
  scales = product_of_pairs<HALF>(scales, pair_of<HALF>(rest, rest));
  pairs[0] = __byte_perm(scales, 0, 0x1010);
  pairs[1] = __byte_perm(scales, 0, 0x3232);
}

template <bool HALF, int EXPONENT>
__device__ __forceinline__ void scale_pairs(uint32_t code, uint32_t (&pairs)[1]) {
  const float scale = scale_of<false>(code) * power_of_two<EXPONENT>();
  pairs[0] = pair_of<HALF>(scale, scale);
}

// Consecutive values of x as the right operand's pairs, in the order of `Codes`; float32 in PARTS bfloat16 whose sum it is.
template <typename T, int PARTS, int PAIRS>
__device__ __forceinline__ void x_pairs_of(const uint32_t* loaded, uint32_t (&pairs)[PARTS][PAIRS]) {
#pragma unroll
  for (int p = 0; p < PAIRS; p++) {
    if constexpr (sizeof(T) == 2) {
      pairs[0][p] = __byte_perm(loaded[p / 2], loaded[(p + PAIRS) / 2], p % 2 ? 0x7632 : 0x5410);
    } else {
      float first = __uint_as_float(loaded[p]), second = __uint_as_float(loaded[p + PAIRS]);
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        pairs[part][p] = pair_of<false>(first, second);
        first -= __uint_as_float(pairs[part][p] << 16);
        second -= __uint_as_float(pairs[part][p] & 0xffff0000u);
      }
    }
  }
}

// COUNT 32-bit words from memory: in loads of up to 16 bytes where WIDE (the address is a multiple of that), else one by one.
template <bool WIDE, int COUNT>
__device__ __forceinline__ void load_words(const void* from, uint32_t (&words)[COUNT]) {
  if constexpr (WIDE && COUNT % 4 == 0) {
#pragma unroll
    for (int i = 0; i < COUNT / 4; i++) {
      uint4 four = static_cast<const uint4*>(from)[i];
      words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
    }
  } else if constexpr (WIDE && COUNT == 2) {
    uint2 two = *static_cast<const uint2*>(from);
    words[0] = two.x, words[1] = two.y;
  } else {
    const uint16_t* halves = static_cast<const uint16_t*>(from);
#pragma unroll
    for (int i = 0; i < COUNT; i++) words[i] = halves[2 * i] | uint32_t(halves[2 * i + 1]) << 16;
  }
}

__device__ __forceinline__ bool aligned_to_16_bytes(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0;
}

}  // namespace marlin
