// What MLX puts before the text of every custom kernel: its utils.h and what that includes, from the installed wheel.
// Four of those headers use names that only Apple's compiler has; this stands in for them.
#pragma once
#include <metal_stdlib>

using namespace metal;
typedef bfloat bfloat16_t;
typedef half float16_t;
inline uint16_t bfloat16_to_uint16(const bfloat16_t x) { return as_type<uint16_t>(x); }
inline bfloat16_t uint16_to_bfloat16(const uint16_t x) { return as_type<bfloat16_t>(x); }

template <class T>
struct complex_t {
  T real, imag;
  constexpr complex_t() = default;
  constexpr complex_t(T real, T imag = T(0)) : real(real), imag(imag) {}
};
typedef complex_t<float> complex64_t;

namespace mlx {
struct os_log {
  constexpr os_log(const char*, const char*) {}
  template <class... Values>
  void log_debug(const char*, Values...) const {}
};
}  // namespace mlx

#include "mlx/backend/metal/kernels/utils.h"

// Metal has none of these; the headers above needed them.
#define double emulator_no_double_in_metal
#define std emulator_no_std_in_metal
