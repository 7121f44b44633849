// marlin_gemm by products of floats, two ways. Registers: each packed row is decoded there, once for up to eight rows of x, and never
// written out. Blocks, for many rows where there are no panels: blocks of packed rows are decoded into a buffer and multiplied as dense ones. Weights are exact in both; only the
// order of sums differs.
#include "marlin_gemm_floats.hpp"

#include <array>
#include <bit>

#include "decode.hpp"
#include "linear.hpp"
#include "packed_columns.hpp"
#include "targets.hpp"

namespace marlin {

namespace {

constexpr bool WHOLE_VECTORS = sizeof(Sums) == sizeof(Vector);  // in a register each, and many of them
constexpr int BLOCK = 32;  // weights decoded at a time: sixteen bytes of 4 bits, or thirty-two of 8

// Thirty-two weights, of nibbles in the order in which they come: sixteen even ones and sixteen odd ones, or, with AVX2, each eight of the row
// as four even ones and four odd ones. So x is laid out in that order once.
struct Block {
  Vector first, second;
};

constexpr float UNSIGNED[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

#if MARLIN_NEON
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

// What nibbles come out of their table divided by: where it holds whole numbers, all are multiples of one half. The scale takes it back.
#if MARLIN_NEON
constexpr float NIBBLE_FACTOR = 0.5f;
#else
constexpr float NIBBLE_FACTOR = 1.0f;
#endif

// Thirty-two nibbles through a table of sixteen floats, over NIBBLE_FACTOR.
template <const float (&TABLE)[16]>
inline __attribute__((always_inline)) Block decode_nibbles(const uint8_t* from) {
#if MARLIN_AVX512
  const __m512 values = _mm512_loadu_ps(TABLE);
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  // The permutation reads the low four bits of each lane: the high nibble needs a shift, the low one no mask.
  return {Vector(_mm512_permutexvar_ps(bytes, values)), Vector(_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), values))};
#elif MARLIN_AVX2
  // Two bytes of a float say all of such a number: each has a table, and they meet by unpacking, which no conversion is needed for.
  constexpr auto bytes_of_float = [](int byte) {
    std::array<uint8_t, 16> bytes{};
    for (int code = 0; code < 16; code++) bytes[code] = uint8_t(std::bit_cast<uint32_t>(TABLE[code]) >> (8 * byte));
    return bytes;
  };
  alignas(16) static constexpr auto UPPERMOST = bytes_of_float(3), SECOND = bytes_of_float(2);
  const auto looked_up = [](const auto& table, __m256i codes) __attribute__((always_inline)) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table.data()))), codes);
  };
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  const __m256i nibbles = _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes), _mm256_set1_epi8(15));
  const __m256i upper = looked_up(UPPERMOST, nibbles), lower = looked_up(SECOND, nibbles), zero = _mm256_setzero_si256();
  const __m256i eight = _mm256_unpacklo_epi8(lower, upper), more = _mm256_unpackhi_epi8(lower, upper);
  using Half = decltype(Vector::low);
  return {{Half(_mm256_unpacklo_epi16(zero, eight)), Half(_mm256_unpackhi_epi16(zero, eight))},
          {Half(_mm256_unpacklo_epi16(zero, more)), Half(_mm256_unpackhi_epi16(zero, more))}};
#elif MARLIN_NEON
  alignas(16) int8_t halves[16];
  for (int code = 0; code < 16; code++) halves[code] = int8_t(2 * TABLE[code]);
  const uint8x16_t bytes = vld1q_u8(from);
  const int8x16_t values = vld1q_s8(halves);
  return {from_bytes(vqtbl1q_s8(values, vandq_u8(bytes, vdupq_n_u8(15)))), from_bytes(vqtbl1q_s8(values, vshrq_n_u8(bytes, 4)))};
#else
  Block block;
  for (int lane = 0; lane < LANES; lane++) {
    block.first[lane] = TABLE[from[lane] & 15];
    block.second[lane] = TABLE[from[lane] >> 4];
  }
  return block;
#endif
}

// Thirty-two values in the order of such a block.
inline void in_order_of_nibbles(const float* from, float* to) {
#if MARLIN_AVX512
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30), odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
  const __m512 lower = _mm512_loadu_ps(from), upper = _mm512_loadu_ps(from + LANES);
  _mm512_storeu_ps(to, _mm512_permutex2var_ps(lower, even, upper));
  _mm512_storeu_ps(to + LANES, _mm512_permutex2var_ps(lower, odd, upper));
#elif MARLIN_AVX2
  for (int k = 0; k < BLOCK; k += 8)
    _mm256_storeu_ps(to + k, _mm256_permutevar8x32_ps(_mm256_loadu_ps(from + k), _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7)));
#else
  for (int lane = 0; lane < LANES; lane++) to[lane] = from[2 * lane], to[LANES + lane] = from[2 * lane + 1];
#endif
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

// A block whose first sixteen weights of the row have one scale, and the others another.
inline Block scaled(const Block& block, float lower, float upper) {
#if MARLIN_AVX2
  return {block.first * lower, block.second * upper};
#else
#if MARLIN_AVX512
  const auto scale = Vector(_mm512_mask_blend_ps(0xff00, _mm512_set1_ps(lower), _mm512_set1_ps(upper)));
#else
  using Half = decltype(Vector::low);
  const Vector scale{splat_as<Half>(lower), splat_as<Half>(upper)};
#endif
  return {block.first * scale, block.second * scale};
#endif
}

// How each format decodes block number `index` of a row, scaled; `nibbles`: whether weights come in another order than the row's.
struct Nvfp4 {
  static constexpr bool nibbles = true, affine = false;
  static inline __attribute__((always_inline)) Block decode(const Packed& row, int64_t index) {
    return scaled(decode_nibbles<E2M1>(row.weight + 16 * index), e4m3_table[row.codes[2 * index]] * NIBBLE_FACTOR,
                  e4m3_table[row.codes[2 * index + 1]] * NIBBLE_FACTOR);
  }
};

struct Mxfp4 {
  static constexpr bool nibbles = true, affine = false;
  static inline __attribute__((always_inline)) Block decode(const Packed& row, int64_t index) {
    const Block block = decode_nibbles<E2M1>(row.weight + 16 * index);
    const Vector scale = splat(e8m0(row.codes[index]) * NIBBLE_FACTOR);
    return {block.first * scale, block.second * scale};
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
    const Block block = decode_nibbles<UNSIGNED>(row.weight + 16 * index);
    const Vector scale = splat(row.scales[index * BLOCK / row.group_size] * NIBBLE_FACTOR);
    return {block.first * scale, block.second * scale};
  }
};

struct Int8 {
  static constexpr bool nibbles = false, affine = true;
  static inline __attribute__((always_inline)) Block decode(const Packed& row, int64_t index) {
    const Vector scale = splat(row.scales[index * BLOCK / row.group_size]);
    return {decode_bytes(row.weight + 32 * index) * scale, decode_bytes(row.weight + 32 * index + 16) * scale};
  }
};

// x as the blocks are decoded, [rows, blocks, 32], rows `stride` apart; and the sums of its groups for the biases.
struct Laid {
  const float* values;
  int64_t stride;
  const std::vector<float>& sums;
};

// In memory that stays with the thread for its next product.
Laid lay_out(const float* x, int64_t rows, const Matrix& w, bool nibbles, bool affine) {
  thread_local AlignedBytes kept;
  thread_local std::vector<float> sums;
  // Rows that are a page apart would share too few places of the caches.
  const int64_t depth = w.depth, whole = depth / BLOCK * BLOCK, stride = (depth + BLOCK - 1) / BLOCK * BLOCK + LANES;
  auto* values = reinterpret_cast<float*>(kept.of(rows * stride * sizeof(float)));
  for (int64_t m = 0; m < rows; m++) {
    const float* from = x + m * depth;
    float *to = values + m * stride, last[BLOCK] = {};
    const auto put = [&](const float* block, int64_t k) {
      if (nibbles) {
        in_order_of_nibbles(block, to + k);
      } else {
        std::memcpy(to + k, block, BLOCK * sizeof(float));
      }
    };
    for (int64_t k = 0; k < whole; k += BLOCK) put(from + k, k);
    if (whole == depth) continue;
    std::memcpy(last, from + whole, (depth - whole) * sizeof(float));
    put(last, whole);
  }
  if (affine) sum_groups(x, rows, w, sums);
  return {values, stride, sums};
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

// TOGETHER rows of weights against ROWS rows of x; one or two rows of x have chains of sums to spare, so every other block gets its own. Where
// there are registers for it, rows of weights share each load of x.
template <class Format, int ROWS, int TOGETHER>
inline void together(const Matrix& w, const Laid& laid, float* out, int64_t n0, int64_t there, int64_t m0) {
  constexpr int64_t CHAINS = ROWS <= 2 ? 2 : 1, BLOCK_BYTES = Format::nibbles ? BLOCK / 2 : BLOCK;
  constexpr int SHARING = WHOLE_VECTORS ? TOGETHER : 1;
  const int64_t ahead = w.bytes_ahead(TOGETHER), whole = w.depth / BLOCK, groups = w.groups(), stride = laid.stride;
  const float* x = laid.values + m0 * stride;
  Packed rows[TOGETHER];
  rows_of<TOGETHER>(w, n0, there, groups, rows);
  Sums sums[CHAINS][TOGETHER][ROWS] = {};
  // The products of a block of each row of weights, block(n), with x from k on.
  const auto add = [&](int64_t k, int64_t chain, const auto& block) __attribute__((always_inline)) {
    for (int first = 0; first < TOGETHER; first += SHARING) {
      Block blocks[SHARING];
      for (int n = 0; n < SHARING; n++) blocks[n] = block(first + n);
      for (int m = 0; m < ROWS; m++) {
        const Vector one = load(x + m * stride + k), other = load(x + m * stride + k + LANES);
        for (int n = 0; n < SHARING; n++) add_products(sums[chain][first + n][m], blocks[n].first, one);
        for (int n = 0; n < SHARING; n++) add_products(sums[chain][first + n][m], blocks[n].second, other);
      }
    }
  };
  const auto step = [&](int64_t index, int64_t chain) __attribute__((always_inline)) {
    add(index * BLOCK, chain, [&](int n) __attribute__((always_inline)) { return Format::decode(rows[n], index); });
  };
  int64_t index = 0;
  for (; index + CHAINS <= whole; index += CHAINS) {
    if constexpr (CHAINS > 1)
      for (int n = 0; n < TOGETHER; n++) __builtin_prefetch(rows[n].weight + index * BLOCK_BYTES + ahead);
    for (int64_t chain = 0; chain < CHAINS; chain++) step(index + chain, chain);
  }
  for (; index < whole; index++) step(index, 0);
  if (whole * BLOCK < w.depth) {
    Tail tail;
    add(whole * BLOCK, 0, [&](int n) { return Format::decode(tail.of(rows[n], whole), 0); });  // x is zero behind it
  }
  for (int n = 0; n < TOGETHER && n < there; n++) {
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
  constexpr int TOGETHER = WHOLE_VECTORS || ROWS <= 4 ? 2 : 1;  // as many sums as there are registers
  by_columns<TOGETHER>(first, last, [&](int64_t n, int64_t there) { together<Format, ROWS, TOGETHER>(w, laid, out, n, there, m0); });
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

// Weights in the order of the row.
inline Block interleaved(const Block& block) {
#if MARLIN_AVX2
  const auto eight = [](const auto& values) { return decltype(Vector::low)(_mm256_permutevar8x32_ps(__m256(values), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))); };
  return {{eight(block.first.low), eight(block.first.high)}, {eight(block.second.low), eight(block.second.high)}};
#else
  Block ordered;
  interleave(block.first, block.second, ordered.first, ordered.second);
  return ordered;
#endif
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
    const Block ordered = Format::nibbles ? interleaved({block.first + bias, block.second + bias}) : Block{block.first + bias, block.second + bias};
    if (count == BLOCK) {
      store(ordered.first, to + k);
      store(ordered.second, to + k + LANES);
      continue;
    }
    store(ordered.first, buffer);
    store(ordered.second, buffer + LANES);
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
