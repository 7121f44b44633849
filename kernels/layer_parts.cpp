// Products and norms on plain memory, over threads.
#include "layer_parts.hpp"

#include <cmath>

#include "common.hpp"
#include "linear.hpp"

namespace marlin {

namespace {

void scale_and_shift(float* x, float factor, const float* bias, int64_t count) {
  for (int64_t k = 0; k < count; k += LANES) {
    const int64_t left = count - k;
    const Vector value = load_some(x + k, left) * factor;
    store_some(bias ? value + load_some(bias + k, left) : value, x + k, left);
  }
}

}  // namespace

void add(float* to, const float* from, int64_t count) {
  constexpr int64_t AT_ONCE = 1024, WORK_OF_A_SUM = 4;
  over_threads((count + AT_ONCE - 1) / AT_ONCE, AT_ONCE * WORK_OF_A_SUM, [&](int64_t first, int64_t last) {
    for (int64_t k = first * AT_ONCE; k < std::min(count, last * AT_ONCE); k++) to[k] += from[k];
  });
}

mx::array in_memory(const mx::array& from) {
  if (lies_contiguous(from)) return from;
  auto copy = mx::contiguous(from, false, mx::Device::cpu);
  copy.eval();
  return copy;
}

Product::Product(const mx::array& weight, const std::optional<mx::array>& scales, const std::optional<mx::array>& biases,
                 std::optional<Kind> kind, int group_size, const std::optional<mx::array>& bias, float factor, int activation_bits)
    : kind_(kind), factor_(factor), activation_bits_(activation_bits) {
  const auto hold = [this](const mx::array& each) { return held_.emplace_back(in_memory(each)); };
  const auto own = hold(weight);
  if (kind) {
    const auto codes = hold(*scales);
    std::optional<mx::array> zeros;
    if (biases) zeros = hold(*biases);
    matrix_ = matrix_of(own, codes, zeros ? &*zeros : nullptr, *kind, group_size);
    columns_ = matrix_.columns, depth_ = matrix_.depth;
  } else {
    dense_ = own.data<float>();
    columns_ = own.shape(0), depth_ = own.shape(1);
  }
  if (bias) bias_ = hold(*bias).data<float>();
}

void Product::operator()(const float* x, float* out, int64_t rows) const {
  if (kind_) {
    const Target own = target(out);
    return multiply_packed(*kind_, {&own, 1}, x, rows, activation_bits_);
  }
  multiply_dense(x, dense_, out, rows, columns_, depth_);
  if (factor_ == 1.0f && !bias_) return;
  constexpr int64_t WORK_OF_A_VALUE = 4;
  over_threads(rows, columns_ * WORK_OF_A_VALUE, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; m++) scale_and_shift(out + m * columns_, factor_, bias_, columns_);
  });
}

void Product::together(const std::vector<std::pair<const Product*, float*>>& products, const float* x, int64_t rows) {
  const Product& any = *products.at(0).first;
  std::vector<Target> targets;
  for (const auto& [product, out] : products) {
    const bool alike = product->kind_ == any.kind_ && product->matrix_.group_size == any.matrix_.group_size &&
                       product->activation_bits_ == any.activation_bits_;
    if (any.kind_ && alike) {
      targets.push_back(product->target(out));
    } else {
      (*product)(x, out, rows);
    }
  }
  if (!targets.empty()) multiply_packed(*any.kind_, targets, x, rows, any.activation_bits_);
}

std::vector<mx::array> products_of(const std::vector<const Product*>& products, const mx::array& x) {
  const auto input = in_memory(x);
  const int64_t rows = x.shape(0);
  std::vector<std::vector<float>> sums;
  std::vector<std::pair<const Product*, float*>> pairs;
  for (const Product* product : products) pairs.emplace_back(product, sums.emplace_back(rows * product->columns()).data());
  Product::together(pairs, input.data<float>(), rows);
  std::vector<mx::array> found;
  for (size_t n = 0; n < products.size(); n++) found.emplace_back(sums[n].data(), mx::Shape{int(rows), int(products[n]->columns())}, mx::float32);
  return found;
}

Norm::Norm(NormKind kind, const mx::array& weight, const std::optional<mx::array>& bias, float eps) : kind_(kind), eps_(eps) {
  held_.push_back(in_memory(weight));
  if (bias) held_.push_back(in_memory(*bias));
  weight_ = held_[0].data<float>();
  bias_ = bias ? held_[1].data<float>() : nullptr;
  width_ = held_[0].size();
}

void Norm::operator()(const float* x, float* out, int64_t rows) const {
  constexpr int64_t WORK_OF_A_VALUE = 4;
  over_threads(rows, width_ * WORK_OF_A_VALUE, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; m++) row(x + m * width_, out + m * width_);
  });
}

void Norm::of_sum(float* x, const float* added, int64_t rows) const {
  constexpr int64_t WORK_OF_A_VALUE = 5;
  over_threads(rows, width_ * WORK_OF_A_VALUE, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; m++) {
      float* own = x + m * width_;
      for (int64_t k = 0; k < width_; k += LANES) {
        const int64_t left = width_ - k;
        store_some(load_some(own + k, left) + load_some(added + m * width_ + k, left), own + k, left);
      }
      row(own, own);
    }
  });
}

void Norm::row(const float* x, float* out) const {
  Vector totals{}, squares{};
  for (int64_t k = 0; k < width_; k += LANES) totals += load_some(x + k, width_ - k);
  const float mean = kind_ == NormKind::rmsnorm ? 0.0f : sum(totals) / width_;
  for (int64_t k = 0; k < width_; k += LANES) {
    const Vector off = load_some(x + k, width_ - k, mean) - mean;
    squares += off * off;
  }
  const float factor = 1.0f / std::sqrt(sum(squares) / width_ + eps_), centre = kind_ == NormKind::layernorm ? mean : 0.0f;
  for (int64_t k = 0; k < width_; k += LANES) {
    const int64_t left = width_ - k;
    Vector y = (load_some(x + k, left) - centre) * factor * load_some(weight_ + k, left);
    if (bias_) y += load_some(bias_ + k, left);
    store_some(y, out + k, left);
  }
}

}  // namespace marlin
