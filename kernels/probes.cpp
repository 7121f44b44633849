// Operations of decoding on memory of their own, between two looks at a clock.
#include "probes.hpp"

#include "common.hpp"

namespace marlin {

namespace {

// Seconds that a body takes.
template <class Body>
double seconds_of(const Body& body) {
  PartSeconds seconds;
  Stopwatch watch(&seconds, &PartSeconds::whole);
  body();
  watch.stop();
  return seconds.whole;
}

}  // namespace

ProductProbe::ProductProbe(std::vector<Product> products) : products_(std::move(products)) {
  int64_t depth = 0, columns = 0;
  for (const Product& each : products_) depth = std::max(depth, each.depth()), columns = std::max(columns, each.columns());
  row_.assign(depth, 0.5f), out_.resize(columns);
}

double ProductProbe::seconds() {
  return seconds_of([&] {
    for (const Product& each : products_) each(row_.data(), out_.data(), 1);
  });
}

AttentionProbe::AttentionProbe(int64_t layers, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t rows, int64_t window, int key_bits,
                               int value_bits)
    : heads_(heads), kv_heads_(kv_heads), head_dim_(head_dim), rows_(rows), window_(window), queries_(heads * head_dim, 0.5f),
      row_(kv_heads * head_dim, 0.5f), out_(heads * head_dim) {
  constexpr int64_t ROWS_OF_A_PAGE = 128;
  for (int64_t layer = 0; layer < layers; layer++) {
    for (bool key : {true, false}) {
      KeyValuePages& pages = (key ? keys_ : values_).emplace_back(1, kv_heads, head_dim, key ? key_bits : value_bits, ROWS_OF_A_PAGE);
      pages.reserve(rows + 1);
      for (int64_t r = 0; r < rows; r++) {
        pages.write(0, row_.data(), 1);
        pages.advance(1);
      }
    }
  }
}

double AttentionProbe::seconds() {
  return seconds_of([&] {
    for (size_t layer = 0; layer < keys_.size(); layer++) {
      AttentionTask task{1, heads_, kv_heads_, head_dim_, 1, rows_, rows_ + 1, 1.0f / head_dim_};
      task.window = window_;
      task.queries = queries_.data(), task.out = out_.data();
      task.query_batch = task.out_batch = task.query_row = task.out_row = heads_ * head_dim_;
      task.query_head = task.out_head = head_dim_;
      for (auto* pages : {&keys_[layer], &values_[layer]}) pages->write(0, row_.data(), 1);
      attend(task, keys_[layer].views(1), values_[layer].views(1));
    }
  });
}

}  // namespace marlin
