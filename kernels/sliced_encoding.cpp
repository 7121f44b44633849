// Phases of an encoder over ragged rows, a few rows at a time.
#include "sliced_encoding.hpp"

#include <algorithm>

#include "common.hpp"

namespace marlin {

namespace {

constexpr int64_t LEAST_ROWS = 32;            // of a product: fewer would cost as much
constexpr int64_t MOST_ROWS = 1024;  // what lies between two products stays small

}  // namespace

SlicedEncoding::SlicedEncoding(const Stack& encoder, const Stack& decoder, const mx::array& x, const std::vector<int>& sizes, const std::vector<int>& bits)
    : encoder_(encoder), decoder_(decoder), sizes_(sizes) {
  const auto input = in_memory(x);
  const StackShape& read = decoder.shape_;
  for (size_t n = 0; n < sizes.size(); n++) {
    rows_ += sizes[n];
    memories_.emplace_back(int64_t(decoder.layers_.size()), 1, read.kv_heads, read.head_dim, sizes[n], bits.at(n));
  }
  const int64_t width = encoder.shape_.heads * encoder.shape_.head_dim;
  if (x.shape(0) != rows_ || x.shape(1) != encoder.dim_) throw std::invalid_argument("the rows are not those of the inputs");
  if (width != read.kv_heads * read.head_dim) throw std::invalid_argument("encoder and decoder have heads of unlike width");
  x_.assign(input.data<float>(), input.data<float>() + input.size());
  const int64_t some = std::min(rows_, MOST_ROWS + LEAST_ROWS);
  for (auto* rows : {&queries_, &keys_, &values_}) rows->resize(rows_ * width);
  for (auto* rows : {&normed_, &added_}) rows->resize(some * encoder.dim_);
  for (auto* rows : {&up_, &gate_}) rows->resize(some * encoder.ffn_dim_);
  attended_.resize(some * width);
  for (int64_t phase = 0; phase < phases(); phase++) row_work_ += products_of(phase);
}

double SlicedEncoding::products_of(int64_t phase) const {
  const double width = encoder_.shape_.heads * encoder_.shape_.head_dim, dim = encoder_.dim_;
  const int64_t layer = phase / 2;
  if (layer >= int64_t(encoder_.layers_.size())) return 2.0 * decoder_.shape_.kv_heads * decoder_.shape_.head_dim * dim;
  if (phase % 2 == 0) return 3.0 * width * dim;
  return width * dim + (encoder_.layers_[layer].gate_proj ? 3.0 : 2.0) * dim * encoder_.ffn_dim_;
}

bool SlicedEncoding::advance(int64_t rows) {
  double left = rows * row_work_;
  while (phase_ < phases() && left > 0) {
    const bool attends = phase_ % 2 == 1 && phase_ < 2 * int64_t(encoder_.layers_.size());
    const double seen = attends ? sizes_[spans(row_, 1)[0].input] : 0;
    const double work = products_of(phase_) + 2.0 * encoder_.shape_.heads * encoder_.shape_.head_dim * seen;
    int64_t some = std::clamp<int64_t>(left / work, LEAST_ROWS, MOST_ROWS);
    if (rows_ - row_ < some + LEAST_ROWS) some = rows_ - row_;
    run(phase_, row_, some);
    left -= some * work;
    row_ += some;
    if (row_ == rows_) row_ = 0, phase_++;
  }
  return phase_ == phases();
}

void SlicedEncoding::keep(const std::vector<int>& inputs) {
  std::vector<int64_t> starts{0};
  for (int size : sizes_) starts.push_back(starts.back() + size);
  for (auto* rows : {&x_, &queries_, &keys_, &values_}) {
    const int64_t width = rows->size() / rows_;
    std::vector<float> kept;
    for (int n : inputs) kept.insert(kept.end(), rows->begin() + starts.at(n) * width, rows->begin() + starts.at(n + 1) * width);
    *rows = std::move(kept);
  }
  std::vector<int> sizes;
  std::vector<StackMemory> memories;
  int64_t row = 0;
  for (int n : inputs) {
    row += std::clamp<int64_t>(row_ - starts[n], 0, sizes_[n]);
    sizes.push_back(sizes_[n]);
    memories.push_back(std::move(memories_[n]));
  }
  sizes_ = std::move(sizes), memories_ = std::move(memories);
  rows_ = 0;
  for (int size : sizes_) rows_ += size;
  row_ = row;
  if (row_ == rows_) row_ = 0, phase_++;
}

std::vector<SlicedEncoding::Span> SlicedEncoding::spans(int64_t first, int64_t count) const {
  std::vector<Span> found;
  int64_t start = 0;
  for (size_t n = 0; n < sizes_.size() && start < first + count; start += sizes_[n++])
    if (start + sizes_[n] > first) found.push_back({int64_t(n), std::max(first, start), std::min(first + count, start + sizes_[n])});
  return found;
}

void SlicedEncoding::run(int64_t phase, int64_t first, int64_t count) {
  const int64_t layers = encoder_.layers_.size();
  if (phase >= 2 * layers) return remember(phase - 2 * layers, first, count);
  const Layer& layer = encoder_.layers_[phase / 2];
  if (phase % 2 == 0) return project(layer, first, count);
  finish(layer, first, count);
  if (encoder_.norm_ && phase == 2 * layers - 1) (*encoder_.norm_)(&x_[first * encoder_.dim_], &x_[first * encoder_.dim_], count);
}

void SlicedEncoding::project(const Layer& layer, int64_t first, int64_t count) {
  const int64_t width = encoder_.shape_.heads * encoder_.shape_.head_dim;
  layer.attention_norm(&x_[first * encoder_.dim_], normed_.data(), count);
  Product::together({{&layer.q_proj, &queries_[first * width]}, {&layer.k_proj, &keys_[first * width]}, {&layer.v_proj, &values_[first * width]}},
                    normed_.data(), count);
}

void SlicedEncoding::finish(const Layer& layer, int64_t first, int64_t count) {
  const StackShape& shape = encoder_.shape_;
  const int64_t width = shape.heads * shape.head_dim, dim = encoder_.dim_;
  std::vector<AttentionJob> jobs;
  for (const Span& span : spans(first, count)) {
    int64_t start = 0;
    for (int64_t n = 0; n < span.input; n++) start += sizes_[n];
    const int64_t size = sizes_[span.input];
    AttentionTask task{1, shape.heads, shape.heads, shape.head_dim, span.end - span.first, span.first - start, size, shape.scale};
    task.causal = false;
    if (encoder_.relative_bias_) task.relative_bias = encoder_.relative_bias_->data<float>(), task.most = encoder_.relative_bias_->shape(1) / 2;
    task.queries = &queries_[span.first * width], task.out = &attended_[(span.first - first) * width];
    task.query_batch = task.out_batch = task.rows * width;
    task.query_head = task.out_head = shape.head_dim;
    task.query_row = task.out_row = width;
    const auto view = [&](const std::vector<float>& rows) {
      return std::vector<PageView>{{&rows[start * width], nullptr, nullptr, Kind::nvfp4, size * width, shape.head_dim, width, size}};
    };
    jobs.push_back({task, view(keys_), view(values_)});
  }
  attend(jobs);
  float* x = &x_[first * dim];
  layer.o_proj(attended_.data(), added_.data(), count);
  add(x, added_.data(), count * dim);
  layer.ffn_norm(x, normed_.data(), count);
  if (layer.gate_proj) {
    Product::together({{&layer.up_proj, up_.data()}, {&*layer.gate_proj, gate_.data()}}, normed_.data(), count);
  } else {
    layer.up_proj(normed_.data(), up_.data(), count);
  }
  activate(shape.activation, up_.data(), layer.gate_proj ? gate_.data() : nullptr, up_.data(), count * encoder_.ffn_dim_);
  layer.down_proj(up_.data(), added_.data(), count);
  add(x, added_.data(), count * dim);
}

void SlicedEncoding::remember(int64_t layer, int64_t first, int64_t count) {
  const CrossAttention& cross = *decoder_.layers_[layer].cross;
  const int64_t width = decoder_.shape_.kv_heads * decoder_.shape_.head_dim;
  // One after the other, as `Stack::remember` has it: together they would be no faster.
  cross.k_proj(&x_[first * encoder_.dim_], &keys_[first * width], count);
  cross.v_proj(&x_[first * encoder_.dim_], &values_[first * width], count);
  for (const Span& span : spans(first, count))
    memories_[span.input].append(layer, &keys_[span.first * width], &values_[span.first * width], span.end - span.first);
}

}  // namespace marlin
