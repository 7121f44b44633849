// A stack of transformer layers as one call, over many sequences at once or over one row after another: MegaByte's blocks,
// T5's with their relative bias and their reading of another sequence, and BERT's, whose norms follow the sums. Sequences that
// stand at unlike places, with unlike numbers of rows, go through it together: products take the rows of all of them, and
// attention takes each sequence by itself.
#pragma once
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "flash_attention.hpp"
#include "layer_parts.hpp"
#include "part_seconds.hpp"

namespace marlin {

// What a layer reads another sequence with.
struct CrossAttention {
  Norm norm;
  Product q_proj, k_proj, v_proj, o_proj;
};

// A bottleneck after the feed-forward, behind its norm once more.
struct Adapter {
  Product down_proj, up_proj;
};

struct Layer {
  Norm attention_norm;
  Product q_proj, k_proj, v_proj, o_proj;
  std::optional<Norm> q_norm, k_norm;
  Norm ffn_norm;
  std::optional<Product> gate_proj;
  Product up_proj, down_proj;
  std::optional<CrossAttention> cross;
  std::optional<Adapter> adapter;  // where norms follow
};

struct StackShape {
  int64_t heads, kv_heads, head_dim;
  float scale;
  int64_t window;            // -1: none
  float rope_theta;          // 0: none
  bool rope_interleaved, token_shift;
  Activation activation;
  bool causal;
  bool norms_follow;         // the norm of a part is that of the sum, not of what goes in
  int64_t block;             // rows see those of their own block of so many; -1: of all
};

// Which rows a row reads of those before it: its own `window` (-1: all), and of any the first `sinks`, as if these were right
// before that window. Pages that nothing reads any more are let go. Of those left it may leave out some, see `AttentionTask`.
struct Reach {
  int64_t window = -1, sinks = 0;
  float share_left = -1;
  std::shared_ptr<PageCounts> counts;
};

// What a stack remembers of the rows it has seen. A copy shares the pages until one of the two goes on.
class StackCache {
 public:
  StackCache(int64_t layers, int64_t batch, int64_t kv_heads, int64_t head_dim, int key_bits, int value_bits,
             int64_t rows_per_page, std::vector<int> left_padding, Reach reach = {});

  int64_t rows() const { return rows_; }                // seen
  int64_t dropped() const { return dropped_; }          // of these, rows that are let go
  int64_t held() const { return rows_ - dropped_; }     // and that are not
  int64_t batch() const { return batch_; }
  int64_t bytes_in_use() const;
  int64_t bytes_allocated() const;
  bool packed() const { return packed_; }
  void clear();
  void keep(const std::vector<int>& streams);
  // Goes back to the first `rows` rows, behind which `delayed` stands: see there; empty for no shift of tokens, and for a place
  // that `may_go_back` has kept.
  void cut(int64_t rows, const std::vector<mlx::core::array>& delayed);
  // With a shift of tokens: the next rows, which come together, may be cut anywhere among them.
  void may_go_back() { goes_back_ = true; }
  // Of each layer what `KeyValuePages::stored` gives of its keys and of its values.
  using Stored = std::vector<std::pair<std::vector<mlx::core::array>, std::vector<mlx::core::array>>>;
  Stored stored() const;
  // Takes rows as `stored` gives them, in place of those that are there; `dropped`: so many more were seen.
  void restore(const Stored& layers, int64_t rows, int64_t dropped = 0);
  std::vector<std::pair<int64_t, int64_t>> places() const;  // see `KeyValuePages::places`
  // Of each layer the last row of both slots [2, batch, channels]; empty for no shift of tokens.
  std::vector<mlx::core::array> delayed() const;

 private:
  friend class Stack;
  // Lets go of what no row to come reads.
  void forget();

  int64_t batch_, rows_ = 0, dropped_ = 0;
  bool packed_;
  Reach reach_;
  std::vector<int32_t> left_padding_;  // empty: none
  std::vector<KeyValuePages> keys_, values_;
  std::vector<std::vector<float>> delayed_;  // by layer: [2, batch, channels] the last row of both slots
  bool goes_back_ = false;
  int64_t recent_rows_ = 0;                  // that came together, to any of which `cut` may go back
  std::vector<std::vector<float>> recent_;   // by layer: [2, batch, rows, channels] what was the last row after each of them
};

// Keys and values of another sequence, as each layer reads them. It never grows.
class StackMemory {
 public:
  // Of a batch of sequences that will have `rows` each, and have none yet.
  StackMemory(int64_t layers, int64_t batch, int64_t kv_heads, int64_t head_dim, int64_t rows, int bits, std::vector<int32_t> lengths = {});
  // Adds rows [count, width] of keys and values of one layer to each sequence. It may turn the keys.
  void append(int64_t layer, float* keys, const float* values, int64_t count);

  int64_t bytes_in_use() const;
  int64_t batch() const { return batch_; }
  void keep(const std::vector<int>& sequences);

 private:
  friend class Stack;
  int64_t batch_, rows_, heads_, head_dim_;
  bool packed_;
  std::vector<int32_t> lengths_;  // real rows of each sequence; empty: all
  std::vector<KeyValuePages> keys_, values_;
};

// Sequences that stand at the same place: `batch` of them with `rows` rows each, one after another.
struct Sequences {
  int64_t batch, rows;
  StackCache* cache = nullptr;          // of `batch` sequences: the rows follow those that it has seen
  const StackMemory* memory = nullptr;  // those that read the same sequence of it stand together, equally many for each
  const int32_t* lengths = nullptr;     // [batch] real rows, all if null
};

// The layers from `first` to before `end`. What a cache remembers, it remembers of all layers.
struct LayerRange {
  int64_t first = 0, end = -1;  // -1: the last one, and the norm that follows it
};

class Stack {
 public:
  // relative_bias [heads, 2 * most + 1]: added to scores by clip(key - query, -most, most).
  Stack(std::vector<Layer> layers, std::optional<Norm> norm, const StackShape& shape,
        const std::optional<mlx::core::array>& relative_bias);
  int64_t dim() const { return dim_; }
  // A cache in float32 for at most `rows` rows.
  StackCache cache(int64_t batch, int64_t rows) const;
  // What the layers read of states [batch, rows, dim], of which each sequence has `lengths` real rows (all, if empty), in
  // 32, 8 or 4 bits.
  StackMemory remember(const mlx::core::array& states, const std::vector<int>& lengths, int bits) const;

  // x, the rows [.., dim] of all sequences one after another, becomes their hidden rows. No cache comes twice.
  // `seconds` learns what attention takes; sequences that are spread over threads have no clock in common and tell nothing.
  void operator()(float* x, const std::vector<Sequences>& all, LayerRange layers = {}, PartSeconds* seconds = nullptr) const;
  mlx::core::array forward(const mlx::core::array& x, StackCache* cache, const std::vector<int>& lengths, PartSeconds* seconds) const;
  // x [rows, dim] of sequences with `rows` each, of whose caches there is one for each, or none at all; and so of memories.
  mlx::core::array ragged(const mlx::core::array& x, const std::vector<int>& rows, const std::vector<StackCache*>& caches,
                          const std::vector<const StackMemory*>& memories, int first_layer, int end_layer, PartSeconds* seconds) const;

 private:
  friend class SlicedEncoding;
  // Some of the sequences that stand together.
  struct Part {
    const Sequences* all;
    int64_t first, count;
    int64_t readers() const { return all->memory ? all->batch / all->memory->batch() : 1; }
    int64_t rows() const { return count * all->rows; }
  };
  using Parts = std::vector<Part>;
  std::vector<Parts> chunks_of(const std::vector<Sequences>& all) const;
  void through(float* x, const Parts& parts, LayerRange layers, PartSeconds* seconds) const;
  // The cosines and sines [half of head_dim, 2] that rows at a position are turned by.
  void angles(int64_t position, float* to) const;
  void rotate(float* x, int64_t heads, const float* angles) const;

  std::vector<Layer> layers_;
  std::optional<Norm> norm_;
  StackShape shape_;
  int64_t dim_, ffn_dim_, hidden_dim_;  // hidden: the widest rows between two products
  std::vector<float> frequencies_;
  std::optional<mlx::core::array> relative_bias_;
};

// Sequences with a cache each (or none at all), and a memory each (or none at all), of which `rows` has the rows.
std::vector<Sequences> sequences_of(const std::vector<int>& rows, const std::vector<StackCache*>& caches,
                                    const std::vector<const StackMemory*>& memories);

}  // namespace marlin
