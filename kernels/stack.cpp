// A stack of transformer layers: every operation on plain memory, so that a step costs its arithmetic and no graph.
//
// Many sequences are spread over threads, each of which takes a few of them through all layers while their rows stand in
// its cache. Few rows are taken through the layers by all threads together.
#include "stack.hpp"

#include <array>
#include <cmath>

#include "common.hpp"

namespace marlin {

namespace {

constexpr int64_t ROWS_AT_ONCE = 256;      // of sequences that a thread takes together
constexpr int64_t ROWS_OF_A_PRODUCT = 1024;  // of one sequence: what lies between two products stays small
constexpr int64_t FLOATS_KEPT = 1 << 24;   // of a thread's scratch, for the next call

// Memory of one thread for one call, taken piece by piece. It stays for the next call, unless it is large.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    thread_local std::vector<float> kept;
    std::vector<float>& memory = floats > FLOATS_KEPT ? own_ : kept;
    if (int64_t(memory.size()) < floats) memory.resize(floats);
    next_ = memory.data();
  }
  float* take(int64_t floats) { return std::exchange(next_, next_ + floats); }

 private:
  std::vector<float> own_;
  float* next_;
};

// Walsh-Hadamard transform of one head, orthonormal; head_dim is a power of two.
void hadamard(float* x, int64_t head_dim) {
  for (int64_t half = 1; half < head_dim; half *= 2) {
    for (int64_t start = 0; start < head_dim; start += 2 * half) {
      for (int64_t k = start; k < start + half; k++) {
        const float a = x[k], b = x[k + half];
        x[k] = a + b;
        x[k + half] = a - b;
      }
    }
  }
  const float factor = 1.0f / std::sqrt(float(head_dim));
  for (int64_t k = 0; k < head_dim; k++) x[k] *= factor;
}

void hadamard_heads(float* x, int64_t heads, int64_t head_dim) {
  for (int64_t h = 0; h < heads; h++) hadamard(x + h * head_dim, head_dim);
}

// The pages from sequence `first` on.
std::vector<PageView> from_sequence(std::vector<PageView> pages, int64_t first, int64_t head_dim) {
  for (PageView& page : pages) {
    const int64_t skipped = first * page.batch, eights = page.kind == Kind::mxfp8;
    if (page.dense) {
      page.dense += skipped;
    } else {
      page.weight += skipped * (eights ? head_dim : head_dim / 2);
      page.codes += skipped * (head_dim / (eights ? 32 : 16));
    }
  }
  return pages;
}

// Rows of keys or values as the products leave them, as pages.
std::vector<PageView> view(const float* rows, int64_t count, int64_t width, int64_t head_dim) {
  return {{rows, nullptr, nullptr, Kind::nvfp4, count * width, head_dim, width, count}};
}

// Attention in which `width` rows see each other and no more. Rows of a block without anything real see all of it alike, as
// in the models that were trained so: real rows nearby read them. It may change the queries.
void attend_in_blocks(const AttentionTask& task, int64_t width, float* queries, const float* keys, const float* values) {
  const int64_t kv_width = task.kv_heads * task.head_dim, whole = task.rows / width, tail = task.rows % width;
  for (int64_t b = 0; b < task.batch; b++) {
    for (const auto& [first, blocks, rows] : {std::array{int64_t(0), whole, width}, std::array{whole * width, int64_t(tail > 0), tail}}) {
      if (blocks == 0) continue;
      const int64_t offset = b * task.query_batch + first * task.query_row, from = (b * task.rows + first) * kv_width;
      std::vector<int32_t> lengths(blocks, rows);
      for (int64_t n = 0; n < blocks && task.lengths; n++) {
        const int64_t real = std::clamp<int64_t>(task.lengths[b] - first - n * width, 0, rows);
        if (real > 0) {
          lengths[n] = real;
        } else {
          std::fill_n(queries + offset + n * width * task.query_row, rows * task.query_row, 0.0f);
        }
      }
      AttentionTask own = task;
      own.batch = blocks, own.rows = own.total = rows, own.lengths = lengths.data();
      own.queries = queries + offset, own.out = task.out + offset;
      own.query_batch = own.out_batch = rows * task.query_row;
      attend(own, view(keys + from, rows, kv_width, task.head_dim), view(values + from, rows, kv_width, task.head_dim));
    }
  }
}

int64_t bytes_of(const std::vector<KeyValuePages>& keys, const std::vector<KeyValuePages>& values) {
  int64_t bytes = 0;
  for (const auto* pages : {&keys, &values})
    for (const auto& each : *pages) bytes += each.bytes_in_use();
  return bytes;
}

}  // namespace

StackCache::StackCache(int64_t layers, int64_t batch, int64_t kv_heads, int64_t head_dim, int key_bits, int value_bits,
                       int64_t rows_per_page, std::vector<int> left_padding, Reach reach)
    : batch_(batch), packed_(key_bits < 32 || value_bits < 32), reach_(std::move(reach)),
      left_padding_(left_padding.begin(), left_padding.end()), delayed_(layers) {
  if (reach_.window >= 0 && !left_padding_.empty()) throw std::invalid_argument("sequences of a window have no filler before them");
  for (int64_t layer = 0; layer < layers; layer++) {
    keys_.emplace_back(batch, kv_heads, head_dim, key_bits, rows_per_page, reach_.share_left >= 0);
    values_.emplace_back(batch, kv_heads, head_dim, value_bits, rows_per_page);
  }
}

int64_t StackCache::bytes_in_use() const {
  int64_t bytes = bytes_of(keys_, values_);
  for (const auto& rows : delayed_) bytes += rows.size() * sizeof(float);
  return bytes;
}

int64_t StackCache::bytes_allocated() const {
  int64_t bytes = 0;
  for (const auto* pages : {&keys_, &values_})
    for (const auto& each : *pages) bytes += each.bytes_allocated();
  return bytes;
}

void StackCache::forget() {
  if (reach_.window < 0) return;
  int64_t dropped = 0;
  for (auto* pages : {&keys_, &values_})
    for (auto& each : *pages) dropped = each.drop(reach_.sinks, held() - reach_.window);
  dropped_ += dropped;
}

void StackCache::clear() {
  rows_ = dropped_ = 0;
  for (auto* pages : {&keys_, &values_})
    for (auto& each : *pages) each.clear();
  for (auto& rows : delayed_) std::fill(rows.begin(), rows.end(), 0.0f);
}

void StackCache::keep(const std::vector<int>& streams) {
  recent_.clear();
  recent_rows_ = 0;
  for (auto* pages : {&keys_, &values_})
    for (auto& each : *pages) each.keep(streams);
  const auto chosen = [&](auto& from, int64_t width, int64_t slots) {
    std::remove_reference_t<decltype(from)> kept;
    for (int64_t slot = 0; slot < slots; slot++)
      for (int stream : streams) {
        const auto start = from.begin() + (slot * batch_ + stream) * width;
        kept.insert(kept.end(), start, start + width);
      }
    from = std::move(kept);
  };
  if (!left_padding_.empty()) chosen(left_padding_, 1, 1);
  for (auto& rows : delayed_)
    if (!rows.empty()) chosen(rows, rows.size() / (2 * batch_), 2);
  batch_ = streams.size();
}

void StackCache::cut(int64_t rows, const std::vector<mx::array>& delayed) {
  if (rows < dropped_) throw std::invalid_argument("these rows have been let go");
  const int64_t forgotten = std::max<int64_t>(0, rows_ - rows);
  const bool shifts = !delayed_.empty() && !delayed_[0].empty();
  if (shifts && forgotten && delayed.empty() && forgotten >= recent_rows_) throw std::invalid_argument("nobody kept what stands there");
  for (size_t layer = 0; shifts && forgotten && delayed.empty() && layer < delayed_.size(); layer++) {
    const int64_t channels = delayed_[layer].size() / (2 * batch_);
    for (int64_t sequence = 0; sequence < 2 * batch_; sequence++)
      std::copy_n(&recent_[layer][((sequence + 1) * recent_rows_ - 1 - forgotten) * channels], channels, &delayed_[layer][sequence * channels]);
  }
  recent_.clear();
  recent_rows_ = 0;
  rows_ = std::min(rows_, rows);
  for (auto* pages : {&keys_, &values_})
    for (auto& each : *pages) each.cut(held());
  if (!delayed.empty() && delayed.size() != delayed_.size()) throw std::invalid_argument("there is a last row for each layer");
  for (size_t layer = 0; layer < delayed.size(); layer++) {
    const auto last = in_memory(delayed[layer]);
    delayed_[layer].assign(last.data<float>(), last.data<float>() + last.size());
  }
}

StackCache::Stored StackCache::stored() const {
  Stored layers;
  for (size_t layer = 0; layer < keys_.size(); layer++) layers.emplace_back(keys_[layer].stored(), values_[layer].stored());
  return layers;
}

void StackCache::restore(const Stored& layers, int64_t rows, int64_t dropped) {
  if (layers.size() != keys_.size()) throw std::invalid_argument("these are no rows of such a cache");
  for (size_t layer = 0; layer < keys_.size(); layer++) {
    keys_[layer].restore(layers[layer].first, rows);
    values_[layer].restore(layers[layer].second, rows);
  }
  rows_ = rows + dropped, dropped_ = dropped;
}

std::vector<std::pair<int64_t, int64_t>> StackCache::places() const {
  std::vector<std::pair<int64_t, int64_t>> found;
  for (const auto* pages : {&keys_, &values_})
    for (const auto& each : *pages)
      for (const auto& place : each.places()) found.push_back(place);
  return found;
}

std::vector<mx::array> StackCache::delayed() const {
  std::vector<mx::array> last;
  for (const auto& rows : delayed_)
    if (!rows.empty()) last.emplace_back(rows.data(), mx::Shape{2, int(batch_), int(rows.size() / (2 * batch_))}, mx::float32);
  return last;
}

StackMemory::StackMemory(int64_t layers, int64_t batch, int64_t kv_heads, int64_t head_dim, int64_t rows, int bits, std::vector<int32_t> lengths)
    : batch_(batch), rows_(rows), heads_(kv_heads), head_dim_(head_dim), packed_(bits < 32), lengths_(std::move(lengths)) {
  constexpr int64_t ROWS_OF_A_PAGE = 4096;
  for (int64_t layer = 0; layer < layers; layer++)
    for (auto* pages : {&keys_, &values_})
      pages->emplace_back(batch, kv_heads, head_dim, bits, std::min(rows, ROWS_OF_A_PAGE)).reserve(rows);
}

void StackMemory::append(int64_t layer, float* keys, const float* values, int64_t count) {
  if (packed_) hadamard_heads(keys, batch_ * count * heads_, head_dim_);
  for (bool key : {true, false}) {
    KeyValuePages& pages = (key ? keys_ : values_)[layer];
    for (int64_t b = 0; b < batch_; b++) pages.write(b, (key ? keys : values) + b * count * heads_ * head_dim_, count);
    pages.advance(count);
  }
}

int64_t StackMemory::bytes_in_use() const { return bytes_of(keys_, values_); }

void StackMemory::keep(const std::vector<int>& sequences) {
  for (auto* pages : {&keys_, &values_})
    for (auto& each : *pages) each.keep(sequences);
  std::vector<int32_t> lengths;
  for (int sequence : sequences)
    if (!lengths_.empty()) lengths.push_back(lengths_[sequence]);
  lengths_ = std::move(lengths);
  batch_ = sequences.size();
}

Stack::Stack(std::vector<Layer> layers, std::optional<Norm> norm, const StackShape& shape, const std::optional<mx::array>& relative_bias)
    : layers_(std::move(layers)), norm_(std::move(norm)), shape_(shape), dim_(layers_.at(0).q_proj.depth()),
      ffn_dim_(layers_[0].up_proj.columns()), hidden_dim_(ffn_dim_) {
  for (const Layer& layer : layers_)
    if (layer.adapter) hidden_dim_ = std::max(hidden_dim_, layer.adapter->down_proj.columns());
  for (int64_t k = 0; shape.rope_theta > 0 && k < shape.head_dim / 2; k++)
    frequencies_.push_back(std::pow(shape.rope_theta, -2.0f * k / shape.head_dim));
  if (relative_bias) relative_bias_ = in_memory(*relative_bias);
}

StackCache Stack::cache(int64_t batch, int64_t rows) const {
  return StackCache(layers_.size(), batch, shape_.kv_heads, shape_.head_dim, 32, 32, rows, {});
}

StackMemory Stack::remember(const mx::array& states, const std::vector<int>& lengths, int bits) const {
  const auto input = in_memory(states);
  const int64_t batch = states.shape(0), rows = states.shape(1), width = shape_.kv_heads * shape_.head_dim;
  StackMemory memory(layers_.size(), batch, shape_.kv_heads, shape_.head_dim, rows, bits, {lengths.begin(), lengths.end()});
  std::vector<float> keys(batch * rows * width), values(batch * rows * width);
  for (size_t number = 0; number < layers_.size(); number++) {
    layers_[number].cross->k_proj(input.data<float>(), keys.data(), batch * rows);
    layers_[number].cross->v_proj(input.data<float>(), values.data(), batch * rows);
    memory.append(number, keys.data(), values.data(), rows);
  }
  return memory;
}

void Stack::angles(int64_t position, float* to) const {
  for (float frequency : frequencies_) {
    const double angle = double(position) * frequency;  // a float would know no place after some million rows
    *to++ = std::cos(angle), *to++ = std::sin(angle);
  }
}

void Stack::rotate(float* x, int64_t heads, const float* angles) const {
  const int64_t half = shape_.head_dim / 2;
  for (int64_t k = 0; k < half; k++) {
    const float c = angles[2 * k], s = angles[2 * k + 1];
    const int64_t first = shape_.rope_interleaved ? 2 * k : k, second = shape_.rope_interleaved ? 2 * k + 1 : k + half;
    for (int64_t h = 0; h < heads; h++) {
      float* head = x + h * shape_.head_dim;
      const float a = head[first], b = head[second];
      head[first] = a * c - b * s;
      head[second] = a * s + b * c;
    }
  }
}

void Stack::through(float* x, const Parts& parts, LayerRange layers, PartSeconds* seconds) const {
  const int64_t query_width = shape_.heads * shape_.head_dim, kv_width = shape_.kv_heads * shape_.head_dim, half = dim_ / 2;
  int64_t n = 0;
  for (const Part& part : parts) n += part.rows();
  const int64_t most_rows = std::min(n, ROWS_OF_A_PRODUCT);
  const auto turns_twice = [&](const Part& part) {
    const StackCache* cache = part.all->cache;
    return !frequencies_.empty() && cache && cache->reach_.sinks > 0 && cache->rows_ + part.all->rows > cache->reach_.sinks + cache->reach_.window;
  };
  const bool twice = std::any_of(parts.begin(), parts.end(), turns_twice);
  const int64_t turns = frequencies_.empty() ? 0 : 2 * frequencies_.size();
  Scratch scratch(2 * n * (query_width + kv_width) + most_rows * (2 * dim_ + hidden_dim_ + ffn_dim_) + (shape_.token_shift ? n * dim_ : 0) +
                  n * turns + (twice ? n * (query_width + turns) : 0));
  float *queries = scratch.take(n * query_width), *attended = scratch.take(n * query_width);
  float *keys = scratch.take(n * kv_width), *values = scratch.take(n * kv_width);
  float *normed = scratch.take(most_rows * dim_), *added = scratch.take(most_rows * dim_);
  float *up = scratch.take(most_rows * hidden_dim_), *gate = scratch.take(most_rows * ffn_dim_);
  float* shifted = scratch.take(shape_.token_shift ? n * dim_ : 0);
  float *turn = scratch.take(n * turns), *sink_turn = scratch.take(twice ? n * turns : 0), *sink_queries = scratch.take(twice ? n * query_width : 0);

  // body(part, its first row) for all parts.
  const auto over_parts = [&](const auto& body) {
    int64_t start = 0;
    for (const Part& part : parts) {
      body(part, start);
      start += part.rows();
    }
  };
  const auto padding_of = [](const Part& part) -> const int32_t* {
    const StackCache* cache = part.all->cache;
    return cache && !cache->left_padding_.empty() ? cache->left_padding_.data() + part.first : nullptr;
  };
  over_parts([&](const Part& part, int64_t start) {
    const StackCache* cache = part.all->cache;
    const int32_t* padding = padding_of(part);
    for (int64_t m = 0; m < part.rows() && turns; m++) {
      const int64_t position = (cache ? cache->rows_ : 0) + m % part.all->rows - (padding ? padding[m / part.all->rows] : 0);
      angles(position, turn + (start + m) * turns);
      // The first rows stay where training had them: no farther than the window is long.
      if (turns_twice(part)) angles(std::min(position, cache->reach_.sinks + cache->reach_.window), sink_turn + (start + m) * turns);
    }
  });
  // The upper half of the channels one row late; filler before a sequence counts as zeros.
  const auto delay = [&](int64_t layer, int64_t slot) -> const float* {
    if (!shape_.token_shift) return x;
    over_parts([&](const Part& part, int64_t start) {
      StackCache* cache = part.all->cache;
      const int64_t rows = part.all->rows, seen = cache ? cache->rows_ : 0;
      const int32_t* padding = padding_of(part);
      for (int64_t b = 0; b < part.count; b++) {
        float* kept = cache ? cache->delayed_[layer].data() + (slot * cache->batch_ + part.first + b) * half : nullptr;
        for (int64_t r = 0; r < rows; r++) {
          float* to = shifted + (start + b * rows + r) * dim_;
          const float* from = x + (start + b * rows + r) * dim_;
          const float* before = r ? from - dim_ + half : kept;
          const bool blank = !before || (padding && seen + r - 1 < padding[b]);
          std::memcpy(to, from, half * sizeof(float));
          if (blank) {
            std::fill(to + half, to + dim_, 0.0f);
          } else {
            std::memcpy(to + half, before, half * sizeof(float));
          }
        }
        if (kept) std::memcpy(kept, x + (start + (b + 1) * rows - 1) * dim_ + half, half * sizeof(float));
        for (int64_t r = 0; kept && cache->recent_rows_ && r < rows; r++)
          std::memcpy(cache->recent_[layer].data() + ((slot * cache->batch_ + part.first + b) * rows + r) * half,
                      x + (start + b * rows + r) * dim_ + half, half * sizeof(float));
      }
    });
    return shifted;
  };
  const auto over_rows = [&](const auto& body) {
    for (int64_t m = 0; m < n; m += most_rows) body(m, std::min(most_rows, n - m));
  };
  // What a part of a layer reads of rows, and how its result joins them.
  const auto read = [&](const Norm& norm, const float* rows_in, int64_t some) -> const float* {
    if (shape_.norms_follow) return rows_in;
    norm(rows_in, normed, some);
    return normed;
  };
  const auto join = [&](const Norm& norm, float* to, int64_t some) {
    if (shape_.norms_follow) return norm.of_sum(to, added, some);
    add(to, added, some * dim_);
  };
  const auto join_attended = [&](const Norm& norm, const Product& o_proj) {
    over_rows([&](int64_t m, int64_t some) {
      o_proj(attended + m * query_width, added, some);
      join(norm, x + m * dim_, some);
    });
  };
  // The rows of a part as those of `batch` sequences, each against `total` rows.
  const auto task_of = [&](const Part& part, int64_t start, int64_t batch, int64_t total) {
    const int64_t row_count = part.rows() / batch;
    AttentionTask task{batch, shape_.heads, shape_.kv_heads, shape_.head_dim, row_count, 0, total, shape_.scale};
    task.queries = queries + start * query_width, task.out = attended + start * query_width;
    task.query_batch = task.out_batch = row_count * query_width;
    task.query_head = task.out_head = shape_.head_dim;
    task.query_row = task.out_row = query_width;
    return task;
  };
  // Rotates what attention reads of a part and writes it where it stays.
  const auto place = [&](const Part& part, int64_t start, int64_t number) {
    StackCache* cache = part.all->cache;
    const int64_t rows = part.all->rows;
    const bool sinks = turns_twice(part);
    if (sinks) std::copy_n(queries + start * query_width, part.rows() * query_width, sink_queries + start * query_width);
    for (int64_t m = start; m < start + part.rows() && turns; m++) {
      rotate(queries + m * query_width, shape_.heads, turn + m * turns);
      rotate(keys + m * kv_width, shape_.kv_heads, turn + m * turns);
      if (sinks) rotate(sink_queries + m * query_width, shape_.heads, sink_turn + m * turns);
    }
    if (!cache) return;
    if (cache->packed_) {
      hadamard_heads(queries + start * query_width, part.rows() * shape_.heads, shape_.head_dim);
      if (sinks) hadamard_heads(sink_queries + start * query_width, part.rows() * shape_.heads, shape_.head_dim);
      hadamard_heads(keys + start * kv_width, part.rows() * shape_.kv_heads, shape_.head_dim);
    }
    for (int64_t b = 0; b < part.count; b++) {
      const int64_t row = (start + b * rows) * kv_width;
      cache->keys_[number].write(part.first + b, keys + row, rows);
      cache->values_[number].write(part.first + b, values + row, rows);
    }
  };
  std::vector<AttentionJob> jobs;

  for (int64_t number = layers.first; number < layers.end; number++) {
    const Layer& layer = layers_[number];
    const float* from = delay(number, 0);
    over_rows([&](int64_t m, int64_t some) {
      Product::together({{&layer.q_proj, queries + m * query_width}, {&layer.k_proj, keys + m * kv_width}, {&layer.v_proj, values + m * kv_width}},
                        read(layer.attention_norm, from + m * dim_, some), some);
    });
    if (layer.q_norm) (*layer.q_norm)(queries, queries, n * shape_.heads);
    if (layer.k_norm) (*layer.k_norm)(keys, keys, n * shape_.kv_heads);
    over_parts([&](const Part& part, int64_t start) { place(part, start, number); });
    Stopwatch attending(seconds, &PartSeconds::attention);
    jobs.clear();
    over_parts([&](const Part& part, int64_t start) {
      const Sequences& all = *part.all;
      const int64_t held = all.cache ? all.cache->held() : 0;
      AttentionTask task = task_of(part, start, part.count, held + all.rows);
      task.first = held;
      task.causal = shape_.causal;
      task.window = shape_.window;
      if (all.cache) {
        const Reach& reach = all.cache->reach_;
        if (reach.window >= 0) task.window = reach.window, task.sinks = reach.sinks;
        if (turns_twice(part)) task.sink_queries = sink_queries + start * query_width;
        task.share_left = reach.share_left, task.counts = reach.counts.get(), task.layer = number;
      }
      task.left_padding = padding_of(part);
      task.lengths = all.lengths ? all.lengths + part.first : nullptr;
      if (relative_bias_) task.relative_bias = relative_bias_->data<float>(), task.most = relative_bias_->shape(1) / 2;
      if (all.cache) {
        const auto pages = [&](const KeyValuePages& held) { return from_sequence(held.views(all.rows), part.first, shape_.head_dim); };
        jobs.push_back({task, pages(all.cache->keys_[number]), pages(all.cache->values_[number])});
      } else if (shape_.block > 0 && all.rows > shape_.block) {
        attend_in_blocks(task, shape_.block, queries + start * query_width, keys + start * kv_width, values + start * kv_width);
      } else {
        jobs.push_back({task, view(keys + start * kv_width, all.rows, kv_width, shape_.head_dim),
                        view(values + start * kv_width, all.rows, kv_width, shape_.head_dim)});
      }
    });
    attend(jobs);
    attending.stop();
    join_attended(layer.attention_norm, layer.o_proj);
    if (layer.cross && parts[0].all->memory) {
      over_rows([&](int64_t m, int64_t some) {
        layer.cross->q_proj(read(layer.cross->norm, x + m * dim_, some), queries + m * query_width, some);
      });
      jobs.clear();
      over_parts([&](const Part& part, int64_t start) {
        const StackMemory& memory = *part.all->memory;
        if (memory.packed_) hadamard_heads(queries + start * query_width, part.rows() * shape_.heads, shape_.head_dim);
        // The rows of all that read a sequence are rows of one: nothing tells them apart.
        AttentionTask reading = task_of(part, start, part.count / part.readers(), memory.rows_);
        const int64_t source = part.first / part.readers();
        reading.causal = false;
        reading.lengths = memory.lengths_.empty() ? nullptr : memory.lengths_.data() + source;
        jobs.push_back({reading, from_sequence(memory.keys_[number].views(0), source, shape_.head_dim),
                        from_sequence(memory.values_[number].views(0), source, shape_.head_dim)});
      });
      attend(jobs);
      join_attended(layer.cross->norm, layer.cross->o_proj);
    }
    from = delay(number, 1);
    over_rows([&](int64_t m, int64_t some) {
      const float* input = read(layer.ffn_norm, from + m * dim_, some);
      if (layer.gate_proj) {
        Product::together({{&layer.up_proj, up}, {&*layer.gate_proj, gate}}, input, some);
      } else {
        layer.up_proj(input, up, some);
      }
      activate(shape_.activation, up, layer.gate_proj ? gate : nullptr, up, some * ffn_dim_);
      layer.down_proj(up, added, some);
      join(layer.ffn_norm, x + m * dim_, some);
      if (layer.adapter) {
        layer.adapter->down_proj(x + m * dim_, up, some);
        activate(shape_.activation, up, nullptr, up, some * layer.adapter->down_proj.columns());
        layer.adapter->up_proj(up, added, some);
        join(layer.ffn_norm, x + m * dim_, some);
      }
    });
  }
  if (norm_ && layers.end == int64_t(layers_.size())) (*norm_)(x, x, n);
}

// Parts of few rows together, as far as they stand one after another; a sequence is never cut.
std::vector<Stack::Parts> Stack::chunks_of(const std::vector<Sequences>& all) const {
  std::vector<Parts> chunks;
  int64_t room = 0;
  for (const Sequences& each : all) {
    for (int64_t first = 0; first < each.batch;) {
      Part part{&each, first, 0};
      const int64_t readers = part.readers();  // those that read the same stay together
      if (room < each.rows * readers) {
        chunks.emplace_back();
        room = std::max(ROWS_AT_ONCE, each.rows * readers);
      }
      part.count = std::min(each.batch - first, room / (each.rows * readers) * readers);
      chunks.back().push_back(part);
      first += part.count;
      room -= part.rows();
    }
  }
  return chunks;
}

void Stack::operator()(float* x, const std::vector<Sequences>& all, LayerRange layers, PartSeconds* seconds) const {
  if (layers.end < 0) layers.end = layers_.size();
  for (const Sequences& each : all) {
    if (each.cache) each.cache->forget();
    for (size_t number = 0; each.cache && number < layers_.size(); number++) {
      each.cache->keys_[number].reserve(each.rows);
      each.cache->values_[number].reserve(each.rows);
      if (shape_.token_shift) each.cache->delayed_[number].resize(2 * each.batch * (dim_ / 2), 0.0f);
    }
    if (!each.cache || !shape_.token_shift) continue;
    each.cache->recent_rows_ = each.cache->goes_back_ ? each.rows : 0;
    each.cache->goes_back_ = false;
    each.cache->recent_.assign(layers_.size(), std::vector<float>(2 * each.batch * each.cache->recent_rows_ * (dim_ / 2)));
  }
  const std::vector<Parts> chunks = chunks_of(all);
  std::vector<int64_t> starts{0};
  int64_t most = 0;
  for (const Parts& parts : chunks) {
    int64_t rows = 0;
    for (const Part& part : parts) rows += part.rows();
    starts.push_back(starts.back() + rows);
    most = std::max(most, rows);
  }
  const int64_t count = chunks.size();
  const auto chunk = [&](int64_t number) { through(x + starts[number] * dim_, chunks[number], layers, count > 1 ? nullptr : seconds); };
  // A thread each, unless one would be left with the largest alone.
  if (count >= threads() && most * threads() <= starts.back() + ROWS_AT_ONCE) {
#pragma omp parallel for num_threads(threads()) schedule(dynamic, 1)
    for (int64_t number = 0; number < count; number++) chunk(number);
  } else {
    for (int64_t number = 0; number < count; number++) chunk(number);
  }
  for (const Sequences& each : all) {
    if (!each.cache) continue;
    each.cache->rows_ += each.rows;
    for (auto* pages : {&each.cache->keys_, &each.cache->values_})
      for (auto& part : *pages) part.advance(each.rows);
  }
}

mx::array Stack::forward(const mx::array& x, StackCache* cache, const std::vector<int>& lengths, PartSeconds* seconds) const {
  const Stopwatch whole(seconds, &PartSeconds::whole);
  Stopwatch waiting(seconds, &PartSeconds::inputs);
  const auto input = in_memory(x);
  waiting.stop();
  std::vector<float> rows(input.data<float>(), input.data<float>() + input.size());
  const std::vector<int32_t> real(lengths.begin(), lengths.end());
  (*this)(rows.data(), {{x.shape(0), x.shape(1), cache, nullptr, real.empty() ? nullptr : real.data()}}, {}, seconds);
  return mx::array(rows.data(), x.shape(), mx::float32);
}

mx::array Stack::ragged(const mx::array& x, const std::vector<int>& rows, const std::vector<StackCache*>& caches,
                        const std::vector<const StackMemory*>& memories, int first_layer, int end_layer, PartSeconds* seconds) const {
  const Stopwatch whole(seconds, &PartSeconds::whole);
  Stopwatch waiting(seconds, &PartSeconds::inputs);
  const auto input = in_memory(x);
  waiting.stop();
  const std::vector<Sequences> all = sequences_of(rows, caches, memories);
  int64_t total = 0;
  for (const Sequences& each : all) total += each.batch * each.rows;
  if (total != x.shape(0)) throw std::invalid_argument("the rows of the sequences are not those that are given");
  const int64_t count = layers_.size(), end = end_layer < 0 ? count : end_layer;
  if (first_layer < 0 || end > count || (!caches.empty() && (first_layer > 0 || end < count)))
    throw std::invalid_argument("no such layers, or some of them alone with a cache");
  std::vector<float> hidden(input.data<float>(), input.data<float>() + input.size());
  (*this)(hidden.data(), all, {first_layer, end}, seconds);
  return mx::array(hidden.data(), x.shape(), mx::float32);
}

std::vector<Sequences> sequences_of(const std::vector<int>& rows, const std::vector<StackCache*>& caches,
                                    const std::vector<const StackMemory*>& memories) {
  for (size_t given : {caches.size(), memories.size()})
    if (given && given != rows.size()) throw std::invalid_argument("a cache and a memory for each sequence, or none at all");
  std::vector<Sequences> all;
  for (size_t n = 0; n < rows.size(); n++) {
    if (rows[n] < 1) throw std::invalid_argument("a sequence has no rows");
    StackCache* cache = caches.empty() ? nullptr : caches[n];
    all.push_back({cache ? cache->batch() : 1, rows[n], cache, memories.empty() ? nullptr : memories[n]});
  }
  return all;
}

}  // namespace marlin
