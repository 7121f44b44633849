// Codes of MLX's packed formats as numbers, for the Metal kernels. Pure functions; a kernel's text comes after this one.

namespace marlin {

// An E4M3 code: its bits stand in a half 2^8 too small, and a product puts that right for its subnormals too. 0x7f is NaN.
METAL_FUNC float from_e4m3(uint code) {
  uint magnitude = code & 0x7f;
  half value = as_type<half>(ushort((code & 0x80) << 8 | ((magnitude + 1) & 0x80) << 7 | magnitude << 7));
  return float(value * half(256));
}

// An E8M0 code: a power of two.
METAL_FUNC float from_e8m0(uint code) {
  return as_type<float>(code == 0 ? 0x00400000u : code << 23);
}

// Codes p and p + 4 of a word of eight E2M1 codes, which stand 16 bits apart in it, so that they are decoded together.
METAL_FUNC float2 from_e2m1_pair(uint word, int p) {
  uint codes = word >> (4 * p);
  half2 values = as_type<half2>((codes & 0x00070007u) << 9 | (codes & 0x00080008u) << 12);
  return float2(values * half(16384));
}

// Codes p and p + 2 of a word of four E4M3 codes.
METAL_FUNC float2 from_e4m3_pair(uint word, int p) {
  uint codes = word >> (8 * p);
  uint magnitudes = codes & 0x007f007fu;
  uint not_a_number = (magnitudes + 0x00010001u) & 0x00800080u;
  half2 values = as_type<half2>((codes & 0x00800080u) << 8 | not_a_number << 7 | magnitudes << 7);
  return float2(values * half(256));
}

}  // namespace marlin
