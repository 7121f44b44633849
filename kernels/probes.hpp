// What decoding is made of, one kind of operation at a time, timed: from it the time of a byte can be predicted by a shape alone.
#pragma once
#include "stack.hpp"

namespace marlin {

// One row through each of some products, in turn.
class ProductProbe {
 public:
  explicit ProductProbe(std::vector<Product> products);
  double seconds();

 private:
  std::vector<Product> products_;
  std::vector<float> row_, out_;
};

// Of each layer of a stage: a row's keys and values go behind `rows` rows of its cache, and the row's queries are against all.
class AttentionProbe {
 public:
  // window -1: none. Bits are 32, 8 or 4.
  AttentionProbe(int64_t layers, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t rows, int64_t window, int key_bits, int value_bits);
  double seconds();

 private:
  int64_t heads_, kv_heads_, head_dim_, rows_, window_;
  std::vector<KeyValuePages> keys_, values_;
  std::vector<float> queries_, row_, out_;
};

}  // namespace marlin
