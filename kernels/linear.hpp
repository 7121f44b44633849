// The dense product, for the bindings.
#pragma once
#include "mlx/mlx.h"
namespace marlin {
// x [.., K] float32, weight [N, K] float32 -> [.., N] float32.
mlx::core::array linear(const mlx::core::array& x, const mlx::core::array& weight);
}
