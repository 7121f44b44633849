// Attention over pages of keys and values, dense or packed: for the bindings, and on plain memory for stacks of layers.
#pragma once
#include <atomic>
#include <optional>
#include <utility>
#include <vector>

#include "key_value_pages.hpp"
#include "mlx/mlx.h"

namespace marlin {

// By layer, how many pages queries could have read, and how many they did. Several caches may add to one.
class PageCounts {
 public:
  explicit PageCounts(int64_t layers) : counts_(layers) {}
  PageCounts(const PageCounts&) = delete;
  void add(int64_t layer, int64_t read, int64_t there) { counts_[layer].read += read, counts_[layer].there += there; }
  std::vector<std::pair<int64_t, int64_t>> so_far() const {
    std::vector<std::pair<int64_t, int64_t>> found;
    for (const Count& each : counts_) found.emplace_back(each.read, each.there);
    return found;
  }

 private:
  struct Count {
    std::atomic<int64_t> read{0}, there{0};
  };
  std::vector<Count> counts_;
};

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
  // The first rows, which every row sees whatever its window, and the queries that read them; null: those that read the others.
  int64_t sinks = 0;
  const float* sink_queries = nullptr;
  // Each row reads pages with bounds in falling order of these, until those left have no more than this share of the softmax;
  // below 0: all, in their order.
  float share_left = -1;
  PageCounts* counts = nullptr;
  int64_t layer = 0;  // in the counts
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
