// The number formats of packed weights, keys and values, one code at a time.
#pragma once
#include <array>
#include <cstdint>
#include <cstring>

namespace marlin {

constexpr float E2M1[16] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

inline float e8m0(uint8_t code) {
  // 2^(code - 127): the code is the exponent field, except that 0 means 2^-127, a subnormal.
  uint32_t bits = code ? uint32_t(code) << 23 : 0x400000u;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float e4m3(uint8_t code) {
  const int exponent = (code >> 3) & 15, mantissa = code & 7;
  const float magnitude = exponent ? float(8 + mantissa) * e8m0(127 + exponent - 10) : float(mantissa) * e8m0(127 - 9);
  return code & 0x80 ? -magnitude : magnitude;
}

// E4M3 by code.
inline const std::array<float, 256> e4m3_table = [] {
  std::array<float, 256> table;
  for (int code = 0; code < 256; code++) table[code] = e4m3(uint8_t(code));
  return table;
}();

}  // namespace marlin
