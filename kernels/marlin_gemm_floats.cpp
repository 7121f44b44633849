// marlin_gemm by products of floats, two ways. Registers: each packed row is decoded there, once for up to eight rows of x, and never
// written out. Blocks, for many rows where there are no panels: blocks of packed rows are decoded into a buffer and multiplied as dense ones. Weights are exact in both; only the
// order of sums differs.
#include "marlin_gemm_floats.hpp"

#include "decode.hpp"
#include "linear.hpp"
#include "packed_columns.hpp"
#include "targets.hpp"

namespace marlin {

namespace {

constexpr int BLOCK = 32;  // weights decoded at a time: sixteen bytes of 4 bits, or thirty-two of 8

// Sixteen even and sixteen odd weights of a block: nibbles come in that order, so x is laid out in it once.
struct Block {
  Vector even, odd;
};

constexpr float UNSIGNED[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

#if MARLIN_AVX2
// Sixteen signed bytes as floats.
inline Vector from_bytes(__m128i bytes) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
#elif MARLIN_NEON
inline Vector from_bytes(int8x16_t bytes) {
  const int16x8_t wide[2] = {vmovl_s8(vget_low_s8(bytes)), vmovl_s8(vget_high_s8(bytes))};
  Vector value;
  for (int part = 0; part < 4; part++) {
    const int16x4_t four = part & 1 ? vget_high_s16(wide[part / 2]) : vget_low_s16(wide[part / 2]);
    vst1q_f32(reinterpret_cast<float*>(&value) + 4 * part, vcvtq_f32_s32(vmovl_s16(four)));
  }
  return value;
}
#endif

// What nibbles come out of their table divided by: where it holds bytes, all are multiples of one half. The scale takes it back.
#if MARLIN_AVX2 || MARLIN_NEON
constexpr float NIBBLE_FACTOR = 0.5f;
#else
constexpr float NIBBLE_FACTOR = 1.0f;
#endif

// Thirty-two nibbles through a table of sixteen floats, over NIBBLE_FACTOR.
inline __attribute__((always_inline)) Block decode_nibbles(const uint8_t* from, const float* table) {
  Block block;
#if MARLIN_AVX2 || MARLIN_NEON
  alignas(16) int8_t halves[16];
  for (int code = 0; code < 16; code++) halves[code] = int8_t(2 * table[code]);
#endif
#if MARLIN_AVX512
  const __m512 values = _mm512_loadu_ps(table);
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  // The permutation reads the low four bits of each lane: the high nibble needs a shift, the low one no mask.
  block.even = Vector(_mm512_permutexvar_ps(bytes, values));
  block.odd = Vector(_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), values));
#elif MARLIN_AVX2
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), low = _mm_set1_epi8(15);
  const __m128i values = _mm_load_si128(reinterpret_cast<const __m128i*>(halves));
  block.even = from_bytes(_mm_shuffle_epi8(values, _mm_and_si128(bytes, low)));
  block.odd = from_bytes(_mm_shuffle_epi8(values, _mm_and_si128(_mm_srli_epi16(bytes, 4), low)));
#elif MARLIN_NEON
  const uint8x16_t bytes = vld1q_u8(from);
  const int8x16_t values = vld1q_s8(halves);
  block.even = from_bytes(vqtbl1q_s8(values, vandq_u8(bytes, vdupq_n_u8(15))));
  block.odd = from_bytes(vqtbl1q_s8(values, vshrq_n_u8(bytes, 4)));
#else
  for (int lane = 0; lane < LANES; lane++) {
    block.even[lane] = table[from[lane] & 15];
    block.odd[lane] = table[from[lane] >> 4];
  }
#endif
  return block;
}

// Sixteen E4M3 bytes, each times 2^-8: as half floats they need a shift, and halves carry E4M3's subnormals.
inline Vector decode_e4m3(const uint8_t* from) {
#if MARLIN_AVX512
  const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
  const __m256i rest = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x7f)), 7);
  return Vector(_mm512_cvtph_ps(_mm256_or_si256(sign, rest)));
#elif MARLIN_AVX2
  const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
  const __m256i rest = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x7f)), 7);
  const __m256i halves = _mm256_or_si256(sign, rest);
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
#else
  Vector value;
  for (int lane = 0; lane < LANES; lane++) value[lane] = e4m3(from[lane]) * 0x1p-8f;
  return value;
#endif
}

inline Vector decode_bytes(const uint8_t* from) {
#if MARLIN_AVX512
  return Vector(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))));
#elif MARLIN_AVX2
  const auto eight = [](const uint8_t* bytes) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes))));
  };
  return {eight(from), eight(from + 8)};
#else
  Vector value;
  for (int lane = 0; lane < LANES; lane++) value[lane] = from[lane];
  return value;
#endif
}

// Two groups of sixteen share a block of nvfp4: in the order of nibbles, eight lanes of each.
inline Vector two_scales(float first, float second) {
#if MARLIN_AVX512
  return Vector(_mm512_mask_blend_ps(0xff00, _mm512_set1_ps(first), _mm512_set1_ps(second)));
#else
  using Half = decltype(Vector::low);
  return {splat_as<Half>(first), splat_as<Half>(second)};
#endif
}

// How each format decodes block number `index` of a row, scaled; `nibbles`: whether even and odd weights come apart.
struct Nvfp4 {
  static constexpr bool nibbles = true, affine = false;
  static inline __attribute__((always_inline)) Block decode(const Packed& row, int64_t index) {
    Block block = decode_nibbles(row.weight + 16 * index, E2M1);
    const Vector scale = two_scales(e4m3_table[row.codes[2 * index]] * NIBBLE_FACTOR, e4m3_table[row.codes[2 * index + 1]] * NIBBLE_FACTOR);
    return {block.even * scale, block.odd * scale};
  }
};

struct Mxfp4 {
  static constexpr bool nibbles = true, affine = false;
  static inline __attribute__((always_inline)) Block decode(const Packed& row, int64_t index) {
    Block block = decode_nibbles(row.weight + 16 * index, E2M1);
    const Vector scale = splat(e8m0(row.codes[index]) * NIBBLE_FACTOR);
    return {block.even * scale, block.odd * scale};
  }
};

struct Mxfp8 {
  static constexpr bool nibbles = false, affine = false;
  static inline __attribute__((always_inline)) Block decode(const Packed& row, int64_t index) {
    const Vector scale = splat(e8m0(row.codes[index]) * 256.0f);
    return {decode_e4m3(row.weight + 32 * index) * scale, decode_e4m3(row.weight + 32 * index + 16) * scale};
  }
};

// Without the bias, which the caller adds from the sums of x over each group.
struct Int4 {
  static constexpr bool nibbles = true, affine = true;
  static inline __attribute__((always_inline)) Block decode(const Packed& row, int64_t index) {
    Block block = decode_nibbles(row.weight + 16 * index, UNSIGNED);
    const Vector scale = splat(row.scales[index * BLOCK / row.group_size] * NIBBLE_FACTOR);
    return {block.even * scale, block.odd * scale};
  }
};

struct Int8 {
  static constexpr bool nibbles = false, affine = true;
  static inline __attribute__((always_inline)) Block decode(const Packed& row, int64_t index) {
    const Vector scale = splat(row.scales[index * BLOCK / row.group_size]);
    return {decode_bytes(row.weight + 32 * index) * scale, decode_bytes(row.weight + 32 * index + 16) * scale};
  }
};

// x as the blocks are decoded: [rows, blocks, even 16, odd 16], and the sums of its groups for the biases.
struct Laid {
  std::vector<float> values, sums;
};

Laid lay_out(const float* x, int64_t rows, const Matrix& w, bool nibbles, bool affine) {
  Laid laid;
  const int64_t depth = w.depth;
  const int64_t padded = (depth + BLOCK - 1) / BLOCK * BLOCK;
  laid.values.assign(rows * padded, 0.0f);
  for (int64_t m = 0; m < rows; m++) {
    for (int64_t k = 0; k < depth; k++) {
      const int64_t block = k / BLOCK * BLOCK, inside = k % BLOCK;
      laid.values[m * padded + (nibbles ? block + inside / 2 + (inside & 1) * LANES : k)] = x[m * depth + k];
    }
  }
  if (affine) sum_groups(x, rows, w, laid.sums);
  return laid;
}

// A row of packed weights whose depth ends in half a block (nvfp4 alone): the rest is read as zeros from here.
struct Tail {
  uint8_t weight[16] = {}, codes[2] = {};

  // Block number `index` of a row, as block 0 of what is returned.
  Packed of(const Packed& row, int64_t index) {
    std::memcpy(weight, row.weight + 16 * index, 8);
    codes[0] = row.codes[2 * index];
    Packed half = row;
    half.weight = weight;
    half.codes = codes;
    return half;
  }
};

// TOGETHER rows of weights against ROWS rows of x. Several rows of weights share each load of x, which is what bounds many
// rows; one or two rows of x have chains of sums to spare, so every other block gets its own.
template <class Format, int ROWS, int TOGETHER>
inline void together(const Matrix& w, const Laid& laid, float* out, int64_t n0, int64_t m0) {
  constexpr int64_t CHAINS = ROWS <= 2 ? 2 : 1, BLOCK_BYTES = Format::nibbles ? BLOCK / 2 : BLOCK;
  const int64_t ahead = w.bytes_ahead(TOGETHER);
  const int64_t whole = w.depth / BLOCK, padded = (w.depth + BLOCK - 1) / BLOCK * BLOCK;
  const int64_t groups = w.groups();
  const float* x = laid.values.data() + m0 * padded;
  Packed rows[TOGETHER];
  for (int n = 0; n < TOGETHER; n++) rows[n] = w.row(n0 + n);
  Sums sums[CHAINS][TOGETHER][ROWS] = {};
  const auto add = [&](const Block* blocks, int64_t k, int64_t chain) __attribute__((always_inline)) {
    for (int m = 0; m < ROWS; m++) {
      const Vector even = load(x + m * padded + k), odd = load(x + m * padded + k + LANES);
      for (int n = 0; n < TOGETHER; n++) add_products(sums[chain][n][m], blocks[n].even, even);
      for (int n = 0; n < TOGETHER; n++) add_products(sums[chain][n][m], blocks[n].odd, odd);
    }
  };
  const auto decode = [&](Block* blocks, int64_t index) __attribute__((always_inline)) {
    for (int n = 0; n < TOGETHER; n++) blocks[n] = Format::decode(rows[n], index);
  };
  Block blocks[TOGETHER];
  int64_t index = 0;
  for (; index + CHAINS <= whole; index += CHAINS) {
    if constexpr (CHAINS > 1)
      for (int n = 0; n < TOGETHER; n++) __builtin_prefetch(rows[n].weight + index * BLOCK_BYTES + ahead);
    for (int64_t chain = 0; chain < CHAINS; chain++) {
      decode(blocks, index + chain);
      add(blocks, (index + chain) * BLOCK, chain);
    }
  }
  for (; index < whole; index++) {
    decode(blocks, index);
    add(blocks, index * BLOCK, 0);
  }
  if (whole * BLOCK < w.depth) {
    for (int n = 0; n < TOGETHER; n++) {
      // Nibbles of eight bytes fill the lower half of the lanes; x is zero in the others.
      Tail tail;
      blocks[n] = Format::decode(tail.of(rows[n], whole), 0);
    }
    add(blocks, whole * BLOCK, 0);
  }
  for (int n = 0; n < TOGETHER; n++) {
    for (int m = 0; m < ROWS; m++) {
      Sums all = sums[0][n][m];
      for (int64_t chain = 1; chain < CHAINS; chain++) all += sums[chain][n][m];
      float total = sum(all);
      if (Format::affine)
        for (int64_t g = 0; g < groups; g++) total += rows[n].biases[g] * laid.sums[(m0 + m) * groups + g];
      out[(m0 + m) * w.columns + n0 + n] = total;
    }
  }
}

template <class Format, int ROWS>
void few_rows(const Matrix& w, const Laid& laid, float* out, int64_t first, int64_t last, int64_t m0) {
  by_columns<2>(first, last, [&](auto some, int64_t n) { together<Format, ROWS, some>(w, laid, out, n, m0); });
}

template <class Format>
void up_to_eight(const Matrix& w, const Laid& laid, float* out, int64_t first, int64_t last, int64_t m0, int64_t rows) {
  switch (rows) {
    case 1: return few_rows<Format, 1>(w, laid, out, first, last, m0);
    case 2: return few_rows<Format, 2>(w, laid, out, first, last, m0);
    case 3: return few_rows<Format, 3>(w, laid, out, first, last, m0);
    case 4: return few_rows<Format, 4>(w, laid, out, first, last, m0);
    case 5: return few_rows<Format, 5>(w, laid, out, first, last, m0);
    case 6: return few_rows<Format, 6>(w, laid, out, first, last, m0);
    case 7: return few_rows<Format, 7>(w, laid, out, first, last, m0);
    default: return few_rows<Format, 8>(w, laid, out, first, last, m0);
  }
}

// Even and odd weights in the order of the row.
inline Block interleaved(const Block& block) {
  Block ordered;
  interleave(block.even, block.odd, ordered.even, ordered.odd);
  return ordered;
}

// One row of weights as floats.
template <class Format>
void unpack_row(const Matrix& w, int64_t n, float* to) {
  const Packed row = w.row(n);
  float buffer[BLOCK];
  for (int64_t k = 0; k < w.depth; k += BLOCK) {
    Tail tail;
    const int64_t index = k / BLOCK, count = std::min<int64_t>(BLOCK, w.depth - k);
    const Block block = count < BLOCK ? Format::decode(tail.of(row, index), 0) : Format::decode(row, index);
    const Vector bias = splat(Format::affine ? row.biases[k / w.group_size] : 0.0f);
    const Block ordered = Format::nibbles ? interleaved({block.even + bias, block.odd + bias}) : Block{block.even + bias, block.odd + bias};
    if (count == BLOCK) {
      store(ordered.even, to + k);
      store(ordered.odd, to + k + LANES);
      continue;
    }
    store(ordered.even, buffer);
    store(ordered.odd, buffer + LANES);
    std::memcpy(to + k, buffer, count * sizeof(float));
  }
}

// Decoded in registers, for up to eight rows of x at a time.
template <class Format>
void multiply_in_registers(Targets targets, const float* x, int64_t rows) {
  constexpr int64_t TOGETHER = 8;
  const Matrix& any = targets[0].w;
  const Laid laid = lay_out(x, rows, any, Format::nibbles, Format::affine);
  over_columns(targets, 1, rows * any.depth, [&](const Target& target, int64_t first, int64_t last) {
    for (int64_t m = 0; m < rows; m += TOGETHER)
      up_to_eight<Format>(target.w, laid, target.out, first, last, m, std::min(TOGETHER, rows - m));
    finish(target, 0, rows, first, last - first);
  });
}

// Decoded into a buffer, which a dense product takes.
template <class Format>
void multiply_in_blocks(Targets targets, const float* x, int64_t rows) {
  constexpr int64_t BUFFER_WEIGHTS = 1 << 20;
  const int64_t depth = targets[0].w.depth, at_once = std::max<int64_t>(1, BUFFER_WEIGHTS / depth);
  std::vector<float> buffer(at_once * depth);
  for (const Target& target : targets) {
    const Matrix& w = target.w;
    for (int64_t n = 0; n < w.columns; n += at_once) {
      const int64_t count = std::min(at_once, w.columns - n);
      over_threads(count, w.depth, [&](int64_t first, int64_t last) {
        for (int64_t each = first; each < last; each++) unpack_row<Format>(w, n + each, buffer.data() + each * w.depth);
      });
      product({x, w.depth}, {buffer.data(), w.depth}, target.out + n, w.columns, rows, count, w.depth);
    }
    over_threads(rows, w.columns, [&](int64_t first, int64_t last) { finish(target, first, last - first, 0, w.columns); });
  }
}

// body(Format) of a kind.
template <class Body>
void with_format(Kind kind, const Body& body) {
  switch (kind) {
    case Kind::nvfp4: return body(Nvfp4{});
    case Kind::mxfp4: return body(Mxfp4{});
    case Kind::mxfp8: return body(Mxfp8{});
    case Kind::int4: return body(Int4{});
    case Kind::int8: return body(Int8{});
  }
}

}  // namespace

void multiply_registers(Kind kind, Targets targets, const float* x, int64_t rows) {
  with_format(kind, [&](auto format) { multiply_in_registers<decltype(format)>(targets, x, rows); });
}

void multiply_blocks(Kind kind, Targets targets, const float* x, int64_t rows) {
  with_format(kind, [&](auto format) { multiply_in_blocks<decltype(format)>(targets, x, rows); });
}

void unpack(Kind kind, const Matrix& w, int64_t first, int64_t last, float* to) {
  with_format(kind, [&](auto format) {
    for (int64_t n = first; n < last; n++) unpack_row<decltype(format)>(w, n, to + (n - first) * w.depth);
  });
}

}  // namespace marlin
