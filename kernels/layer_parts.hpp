// What layers are made of: products and norms that keep their arrays, and activations between them.
#pragma once
#include <optional>
#include <vector>

#include "activations.hpp"
#include "marlin_gemm.hpp"

namespace marlin {

// The array itself where its values stand in order in memory already (an evaluation costs a tenth of a millisecond), else a copy.
mlx::core::array in_memory(const mlx::core::array& from);

// x @ W^T * factor + bias, dense or packed. It keeps its arrays alive.
class Product {
 public:
  Product(const mlx::core::array& weight, const std::optional<mlx::core::array>& scales, const std::optional<mlx::core::array>& biases,
          std::optional<Kind> kind, int group_size, const std::optional<mlx::core::array>& bias, float factor, int activation_bits);
  void operator()(const float* x, float* out, int64_t rows) const;
  // Several products of one x, in one go where their weights are packed alike.
  static void together(const std::vector<std::pair<const Product*, float*>>& products, const float* x, int64_t rows);
  int64_t columns() const { return columns_; }
  int64_t depth() const { return depth_; }

 private:
  std::vector<mlx::core::array> held_;
  std::optional<Kind> kind_;
  Matrix matrix_{};
  const float *dense_ = nullptr, *bias_ = nullptr;
  float factor_;
  int activation_bits_;
  int64_t columns_, depth_;

  Target target(float* out) const { return {matrix_, out, factor_, bias_}; }
};

// x [rows, K] @ W^T * factor + bias of several products at once: an array [rows, N] for each.
std::vector<mlx::core::array> products_of(const std::vector<const Product*>& products, const mlx::core::array& x);

enum class NormKind { rmsnorm, layernorm, variance };

class Norm {
 public:
  Norm(NormKind kind, const mlx::core::array& weight, const std::optional<mlx::core::array>& bias, float eps);
  // `out` may be `x`; both have rows of the weight's length one after another.
  void operator()(const float* x, float* out, int64_t rows) const;
  // x becomes the norm of x + added.
  void of_sum(float* x, const float* added, int64_t rows) const;
  // One row, on the thread that asks.
  void row(const float* x, float* out) const;

 private:

  NormKind kind_;
  std::vector<mlx::core::array> held_;
  const float *weight_, *bias_;
  int64_t width_;
  float eps_;
};

// to[count] += from[count], over threads.
void add(float* to, const float* from, int64_t count);

}  // namespace marlin
