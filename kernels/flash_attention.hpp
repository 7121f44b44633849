// Attention over pages of keys and values, dense or packed: for the bindings, and on plain memory for stacks of layers.
#pragma once
#include <optional>
#include <vector>

#include "key_value_pages.hpp"
#include "mlx/mlx.h"

namespace marlin {

// What attention is to do. Row i of the queries stands at position first + i; keys and values have `total` rows.
struct AttentionTask {
  int64_t batch, heads, kv_heads, head_dim, rows, first, total;
  float scale;
  bool causal = true;
  int64_t window = -1;                  // rows before (and after) that a row sees; -1: all
  const int32_t* left_padding = nullptr;  // [batch] filler rows at the start
  const int32_t* lengths = nullptr;       // [batch] real rows
  const float* relative_bias = nullptr;   // [heads, 2 * most + 1] by clip(key - query, -most, most)
  int64_t most = 0;
  // Queries and results: `batch`, `head` and `row` floats apart.
  const float* queries;
  int64_t query_batch, query_head, query_row;
  float* out;
  int64_t out_batch, out_head, out_row;
};

// One task and the rows that it reads.
struct AttentionJob {
  AttentionTask task;
  std::vector<PageView> keys, values;
};

// All of them, each on its own, spread over threads by their work.
void attend(const std::vector<AttentionJob>& jobs);
void attend(const AttentionTask& task, const std::vector<PageView>& keys, const std::vector<PageView>& values);

// One page of the bindings: dense [batch, kv_heads, rows, head_dim] float32, or packed words and scales with their bits.
struct PageArrays {
  mlx::core::array data;
  std::optional<mlx::core::array> scales;
  int bits;
};

mlx::core::array flash_attention(const mlx::core::array& queries, const std::vector<PageArrays>& keys,
                                 const std::vector<PageArrays>& values, float scale, bool causal, int window,
                                 const std::optional<mlx::core::array>& left_padding,
                                 const std::optional<mlx::core::array>& lengths,
                                 const std::optional<mlx::core::array>& relative_bias);

}  // namespace marlin
