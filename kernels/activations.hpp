// What stands between two products of a feed-forward, sixteen values at a time: for stacks of layers, convolutions and the bindings.
#pragma once
#include "common.hpp"

namespace marlin {

enum class Activation { swiglu, gelu, gelu_tanh, relu, silu };

// erf within 1.5e-7 (Abramowitz and Stegun, 7.1.26).
inline Vector error_function(Vector x) {
  const Vector magnitude = chosen(x < 0.0f, -x, x), t = 1.0f / (1.0f + 0.3275911f * magnitude);
  Vector y = splat(1.061405429f);
  for (float next : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) y = y * t + next;
  y = 1.0f - y * t * exponential(-magnitude * magnitude);
  return chosen(x < 0.0f, -y, y);
}

inline Vector activate(Activation kind, Vector x) {
  switch (kind) {
    case Activation::relu: return chosen(x > 0.0f, x, splat(0.0f));
    case Activation::gelu: return 0.5f * x * (1.0f + error_function(x * 0.70710678f));
    case Activation::gelu_tanh: return x / (1.0f + exponential(-1.59576912f * (x + 0.044715f * x * x * x)));  // (1 + tanh u) / 2 = 1 / (1 + e^-2u)
    default: return x / (1.0f + exponential(-x));
  }
}

// to[count] = activation(x[count]), or activation(gate[count]) * x[count] where there is a gate; over threads. `to` may be any of them.
void activate(Activation kind, const float* x, const float* gate, float* to, int64_t count);

// x [..] float32 -> activation(x), of the same shape.
mx::array activation(const mx::array& x, Activation kind);

}  // namespace marlin
