// Metal's mathematical functions on floats, 16-bit floats (computed in float, rounded once) and vectors.
#pragma once
#include "vectors.h"

namespace metal {

// `expression` is of one float x, or of two, x and y.
#define EMULATOR_UNARY(name, expression)                          \
  METAL_FUNC float name(float x) { return expression; }           \
  METAL_FUNC half name(half value) {                              \
    const float x = value;                                        \
    return (half)(expression);                                    \
  }                                                               \
  METAL_FUNC bfloat name(bfloat value) {                          \
    const float x = value;                                        \
    return (bfloat)(expression);                                  \
  }                                                               \
  template <class T, int N>                                       \
  METAL_FUNC vec<T, N> name(vec<T, N> values) {                   \
    return each(values, [](T value) { return name(value); });     \
  }
#define EMULATOR_BINARY(name, expression)                                       \
  METAL_FUNC float name(float x, float y) { return expression; }                \
  METAL_FUNC half name(half first, half second) {                               \
    const float x = first, y = second;                                          \
    return (half)(expression);                                                  \
  }                                                                             \
  METAL_FUNC bfloat name(bfloat first, bfloat second) {                         \
    const float x = first, y = second;                                          \
    return (bfloat)(expression);                                                \
  }                                                                             \
  template <class T, int N>                                                     \
  METAL_FUNC vec<T, N> name(vec<T, N> first, vec<T, N> second) {                \
    return each(first, second, [](T a, T b) { return name(a, b); });            \
  }

// Metal has these three times: as they are, in metal::precise and in metal::fast.
#define EMULATOR_FUNCTIONS                                                      \
  EMULATOR_UNARY(exp, ::expf(x))                                                \
  EMULATOR_UNARY(exp2, ::exp2f(x))                                              \
  EMULATOR_UNARY(exp10, ::powf(10.0f, x))                                       \
  EMULATOR_UNARY(log, ::logf(x))                                                \
  EMULATOR_UNARY(log2, ::log2f(x))                                              \
  EMULATOR_UNARY(log10, ::log10f(x))                                            \
  EMULATOR_UNARY(sin, ::sinf(x))                                                \
  EMULATOR_UNARY(cos, ::cosf(x))                                                \
  EMULATOR_UNARY(tan, ::tanf(x))                                                \
  EMULATOR_UNARY(asin, ::asinf(x))                                              \
  EMULATOR_UNARY(acos, ::acosf(x))                                              \
  EMULATOR_UNARY(atan, ::atanf(x))                                              \
  EMULATOR_UNARY(sinh, ::sinhf(x))                                              \
  EMULATOR_UNARY(cosh, ::coshf(x))                                              \
  EMULATOR_UNARY(tanh, ::tanhf(x))                                              \
  EMULATOR_UNARY(asinh, ::asinhf(x))                                            \
  EMULATOR_UNARY(acosh, ::acoshf(x))                                            \
  EMULATOR_UNARY(atanh, ::atanhf(x))                                            \
  EMULATOR_UNARY(sinpi, ::sinf(3.14159265358979324f * x))                       \
  EMULATOR_UNARY(cospi, ::cosf(3.14159265358979324f * x))                       \
  EMULATOR_UNARY(sqrt, __builtin_sqrtf(x))                                      \
  EMULATOR_UNARY(rsqrt, 1.0f / __builtin_sqrtf(x))                              \
  EMULATOR_UNARY(floor, __builtin_floorf(x))                                    \
  EMULATOR_UNARY(ceil, __builtin_ceilf(x))                                      \
  EMULATOR_UNARY(trunc, __builtin_truncf(x))                                    \
  EMULATOR_UNARY(round, ::roundf(x))                                            \
  EMULATOR_UNARY(rint, __builtin_rintf(x))                                      \
  EMULATOR_UNARY(fabs, __builtin_fabsf(x))                                      \
  EMULATOR_UNARY(fract, x - __builtin_floorf(x))                                \
  EMULATOR_UNARY(saturate, x > 1.0f ? 1.0f : x > 0.0f ? x : 0.0f)               \
  EMULATOR_UNARY(sign, x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f)               \
  EMULATOR_BINARY(pow, ::powf(x, y))                                            \
  EMULATOR_BINARY(powr, ::powf(x, y))                                           \
  EMULATOR_BINARY(fmod, ::fmodf(x, y))                                          \
  EMULATOR_BINARY(atan2, ::atan2f(x, y))                                        \
  EMULATOR_BINARY(copysign, __builtin_copysignf(x, y))                          \
  EMULATOR_BINARY(fmin, __builtin_fminf(x, y))                                  \
  EMULATOR_BINARY(fmax, __builtin_fmaxf(x, y))                                  \
  EMULATOR_BINARY(fdim, ::fdimf(x, y))                                          \
  EMULATOR_BINARY(divide, x / y)
EMULATOR_FUNCTIONS
namespace precise {
EMULATOR_FUNCTIONS
}
namespace fast {
EMULATOR_FUNCTIONS
}
#undef EMULATOR_FUNCTIONS
#undef EMULATOR_UNARY
#undef EMULATOR_BINARY

METAL_FUNC float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
METAL_FUNC half fma(half a, half b, half c) { return (half)__builtin_fma((float)a, (float)b, (float)c); }
METAL_FUNC bfloat fma(bfloat a, bfloat b, bfloat c) { return (bfloat)__builtin_fmaf(a, b, c); }
template <class T, int N>
METAL_FUNC vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
  vec<T, N> result;
  for (int i = 0; i < N; i++) result.data[i] = fma(a.data[i], b.data[i], c.data[i]);
  return result;
}

template <class T>
METAL_FUNC enable_if_t<is_arithmetic_v<T>, T> ldexp(T x, int exponent) {
  return (T)__builtin_ldexpf((float)x, exponent);
}
METAL_FUNC float frexp(float x, int& exponent) { return ::frexpf(x, &exponent); }
METAL_FUNC int ilogb(float x) { return ::ilogbf(x); }
METAL_FUNC float nextafter(float x, float y) { return ::nextafterf(x, y); }
METAL_FUNC float mix(float a, float b, float share) { return a + (b - a) * share; }

#define EMULATOR_CLASSIFIER(name)                                              \
  METAL_FUNC bool name(float x) { return __builtin_##name(x); }                \
  METAL_FUNC bool name(half x) { return __builtin_##name((float)x); }          \
  METAL_FUNC bool name(bfloat x) { return __builtin_##name((float)x); }
EMULATOR_CLASSIFIER(isnan)
EMULATOR_CLASSIFIER(isinf)
EMULATOR_CLASSIFIER(isfinite)
EMULATOR_CLASSIFIER(isnormal)
EMULATOR_CLASSIFIER(signbit)
#undef EMULATOR_CLASSIFIER

}  // namespace metal
