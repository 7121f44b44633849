// Packed weights as numbers, for products with so many rows that decoding a weight once costs less than decoding it for each tile.
//
// inputs   weight[rows, words] uint32; scales[rows, columns / GROUP] uint8, or any float where AFFINE; zeros: as scales, where AFFINE
// output   out[rows, columns] T
// template T; BITS 4 or 8; GROUP a multiple of 8; AFFINE: codes are whole numbers, times scale plus zero; else floats of BITS bits
// grid     one thread for each 8 values

  constexpr int VALUES = 8, WORDS = VALUES * BITS / 32;
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= int64_t(weight_shape[0]) * (weight_shape[1] / WORDS)) return;
  uint32_t words[WORDS];
#pragma unroll
  for (int w = 0; w < WORDS; w++) words[w] = weight[i * WORDS + w];
  const int64_t group = i * VALUES / GROUP;
  float scale, zero = 0.0f;
  if constexpr (AFFINE) {
    scale = marlin::to_float(scales[group]), zero = marlin::to_float(zeros[group]);
  } else {
    scale = marlin::scale_of<GROUP == 16>(reinterpret_cast<const uint8_t*>(scales)[group]);
  }
  T values[VALUES];
#pragma unroll
  for (int value = 0; value < VALUES; value++) {
    const uint32_t code = words[value * BITS / 32] >> value * BITS % 32 & (BITS == 4 ? 0xfu : 0xffu);
    float number;
    if constexpr (AFFINE) {
      number = float(code) * scale + zero;
    } else if constexpr (BITS == 4) {
      number = __uint_as_float((code & 8u) << 28 | (code & 7u) << 22) * marlin::power_of_two<126>() * scale;
    } else {
      number = marlin::scale_of<true>(uint8_t(code)) * scale;
    }
    values[value] = marlin::from_float<T>(number);
  }
  if constexpr (sizeof(T) == 2) {
    uint4 all;
    uint32_t pairs[4];
#pragma unroll
    for (int p = 0; p < 4; p++) {
      pairs[p] = reinterpret_cast<const uint16_t&>(values[2 * p]) | uint32_t(reinterpret_cast<const uint16_t&>(values[2 * p + 1])) << 16;
    }
    all.x = pairs[0], all.y = pairs[1], all.z = pairs[2], all.w = pairs[3];
    reinterpret_cast<uint4*>(out)[i] = all;
  } else {
#pragma unroll
    for (int value = 0; value < VALUES; value++) out[i * VALUES + value] = values[value];
  }
