// flash_attention, flash_attention_kv_fp4 and flash_attention_cross_asymmetric: one online softmax over tiles of keys and
// values (FlashAttention, arXiv 2205.14135). A packed tile is decoded once for all rows that stand in the first cache.
#include "flash_attention.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "common.hpp"
#include "linear.hpp"

namespace marlin {

namespace {

constexpr int64_t ROW_BLOCK = 32, TILE = 64;
constexpr int64_t FEW_ROWS = 4;  // OpenBLAS pays for itself beyond
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

// Rows first .. last of a page of one head, as floats; packed ones are decoded into `buffer`.
Strided tile_of(const PageView& page, int64_t batch, int64_t head, int64_t head_dim, int64_t first, int64_t last, float* buffer) {
  if (page.dense) return {page.dense + batch * page.batch + head * page.head + first * page.row, page.row};
  const int64_t start = batch * page.batch + head * page.head, group = page.kind == Kind::mxfp8 ? 32 : 16;
  const int64_t row_bytes = page.kind == Kind::mxfp8 ? head_dim : head_dim / 2;
  const Matrix rows{page.weight + start * row_bytes, page.codes + start * (head_dim / group), nullptr, nullptr,
                    page.rows, head_dim, row_bytes, group};
  unpack(page.kind, rows, first, last, buffer);
  return {buffer, head_dim};
}

// COUNT keys against one query: as many sums at once hide the latency of one.
template <int COUNT>
inline void some_scores(const float* query, const float* keys, int64_t stride, float* scores, int64_t head_dim) {
  Sums sums[COUNT] = {};
  for (int64_t d = 0; d < head_dim; d += LANES) {
    const Vector part = load_some(query + d, head_dim - d);
#pragma GCC unroll 4
    for (int n = 0; n < COUNT; n++) add_products(sums[n], part, load_some(keys + n * stride + d, head_dim - d));
  }
  for (int n = 0; n < COUNT; n++) scores[n] = sum(sums[n]);
}

// scores[rows, TILE] = queries @ keys^T for a few rows.
void few_scores(const float* queries, int64_t query_row, Strided keys, float* scores, int64_t rows, int64_t count, int64_t head_dim) {
  constexpr int TOGETHER = 4;
  for (int64_t r = 0; r < rows; r++) {
    const float* query = queries + r * query_row;
    int64_t j = 0;
    for (; j + TOGETHER <= count; j += TOGETHER)
      some_scores<TOGETHER>(query, keys.data + j * keys.stride, keys.stride, scores + r * TILE + j, head_dim);
    for (; j < count; j++) some_scores<1>(query, keys.data + j * keys.stride, keys.stride, scores + r * TILE + j, head_dim);
  }
}

// COUNT vectors of a result at once; the last one has the channels that are left.
template <int COUNT>
inline void some_sums(const float* weights, Strided values, float* out, int64_t count, int64_t left) {
  Vector totals[COUNT];
  const int64_t last = left - (COUNT - 1) * LANES;
#pragma GCC unroll 4
  for (int n = 0; n < COUNT; n++) totals[n] = load_some(out + n * LANES, n + 1 < COUNT ? LANES : last);
  for (int64_t j = 0; j < count; j++) {
    const Vector weight = splat(weights[j]);
    const float* from = values.data + j * values.stride;
#pragma GCC unroll 4
    for (int n = 0; n < COUNT; n++) totals[n] += weight * load_some(from + n * LANES, n + 1 < COUNT ? LANES : last);
  }
#pragma GCC unroll 4
  for (int n = 0; n < COUNT; n++) store_some(totals[n], out + n * LANES, n + 1 < COUNT ? LANES : last);
}

// out[rows, head_dim] += weights[rows, TILE] @ values for a few rows.
void few_sums(const float* weights, Strided values, float* out, int64_t rows, int64_t count, int64_t head_dim) {
  constexpr int TOGETHER = 4;
  for (int64_t r = 0; r < rows; r++) {
    int64_t d = 0;
    for (; d + TOGETHER * LANES <= head_dim; d += TOGETHER * LANES)
      some_sums<TOGETHER>(weights + r * TILE, {values.data + d, values.stride}, out + r * head_dim + d, count, TOGETHER * LANES);
    for (; d < head_dim; d += LANES)
      some_sums<1>(weights + r * TILE, {values.data + d, values.stride}, out + r * head_dim + d, count, std::min<int64_t>(LANES, head_dim - d));
  }
}

struct Head {
  const AttentionTask& task;
  const std::vector<PageView>&keys, &values;
  int64_t batch, head;
  int64_t start, end;  // real rows of this sequence

  // Adds the bias and takes away what row `position` may not see of keys key .. key + count: those that more than `window` rows
  // are between are. Returns the largest score left.
  float mask(float* scores, int64_t position, int64_t key, int64_t count, int64_t window) const {
    const int64_t low = std::max(start, position - window);
    const int64_t high = std::min(end, (task.causal ? position : position + window) + 1);
    const float* biases = task.relative_bias ? task.relative_bias + head * (2 * task.most + 1) + task.most : nullptr;
    Vector highest = splat(NOTHING);
    for (int64_t j = 0; j < count; j += LANES) {
      const int64_t some = std::min<int64_t>(LANES, count - j), other = key + j, distance = other - position;
      Vector values = load_some(scores + j, some, NOTHING) * task.scale;
      if (biases) {
        if (distance >= -task.most && distance + some - 1 <= task.most) {
          values += load_some(biases + distance, some);
        } else if (distance >= task.most || distance + some - 1 <= -task.most) {
          values += biases[distance > 0 ? task.most : -task.most];
        } else {
          for (int64_t n = 0; n < some; n++) values[n] += biases[std::clamp(distance + n, -task.most, task.most)];
        }
      }
      if (other < low || other + some > high)
        for (int64_t n = 0; n < some; n++)
          if (other + n < low || other + n >= high) values[n] = NOTHING;
      store_some(values, scores + j, some);
      highest = chosen(values > highest, values, highest);
    }
    return largest(highest);
  }

  // The largest score that a query may have with a key of a page.
  float bound(const float* query, const PageView& page) const {
    const float* low = page.bounds + batch * page.bounds_batch + head / (task.heads / task.kv_heads) * 2 * task.head_dim;
    Vector total{};
    for (int64_t d = 0; d < task.head_dim; d += LANES) {
      const int64_t some = std::min<int64_t>(LANES, task.head_dim - d);
      const Vector part = load_some(query + d, some), least = part * load_some(low + d, some), most = part * load_some(low + task.head_dim + d, some);
      total += chosen(least > most, least, most);
    }
    return sum(total) * task.scale;
  }

  void rows(int64_t first_row, int64_t count) const {
    const int64_t head_dim = task.head_dim, kv_head = head / (task.heads / task.kv_heads), everything = task.total + task.rows;
    const int64_t window = task.window < 0 ? everything : task.window;
    float scores[ROW_BLOCK * TILE], most[ROW_BLOCK], total[ROW_BLOCK];
    thread_local std::vector<float> memory;
    memory.resize((ROW_BLOCK + 2 * TILE) * head_dim);
    float *sums = memory.data(), *key_buffer = sums + ROW_BLOCK * head_dim, *value_buffer = key_buffer + TILE * head_dim;
    std::fill(most, most + count, NOTHING);
    std::fill(total, total + count, 0.0f);
    std::fill(sums, sums + count * head_dim, 0.0f);
    const int64_t offset = batch * task.query_batch + head * task.query_head + first_row * task.query_row;
    const float* queries = task.queries + offset;
    const int64_t position = task.first + first_row;
    const int64_t low = std::max({start, task.sinks, task.window < 0 ? 0 : position - task.window});
    const int64_t high = std::min({end, task.causal ? position + count : task.total,
                                   task.window < 0 || task.causal ? task.total : position + count + task.window});
    const bool few = count <= FEW_ROWS || exact_rows();
    const auto tile = [&](const std::vector<PageView>& pages, size_t page, int64_t first, int64_t some, float* buffer) {
      if (first + some <= pages[page].rows) return tile_of(pages[page], batch, kv_head, head_dim, first, first + some, buffer);
      for (float* to = buffer; some > 0; page++, first = 0) {
        const int64_t own = std::min(some, pages[page].rows - first);
        const Strided part = tile_of(pages[page], batch, kv_head, head_dim, first, first + own, to);
        for (int64_t r = 0; part.data != to && r < own; r++) std::copy_n(part.data + r * part.stride, head_dim, to + r * head_dim);
        to += own * head_dim, some -= own;
      }
      return Strided{buffer, head_dim};
    };
    size_t page = 0;
    int64_t page_start = 0;
    // Takes keys first .. last in, of which a row sees those at most `reach` rows before it.
    const auto read = [&](const float* reading, int64_t first, int64_t last, int64_t reach) {
      if (first < page_start) page = 0, page_start = 0;
      for (int64_t j = first, some; j < last; j += some) {
        for (; j >= page_start + keys[page].rows; page++) page_start += keys[page].rows;
        some = std::min(TILE, last - j);
        if (!exact_rows()) some = std::min(some, page_start + keys[page].rows - j);
        const Strided key_tile = tile(keys, page, j - page_start, some, key_buffer);
        if (few) {
          few_scores(reading, task.query_row, key_tile, scores, count, some, head_dim);
        } else {
          product({reading, task.query_row}, key_tile, scores, TILE, count, some, head_dim);
        }
        for (int64_t r = 0; r < count; r++) {
          float* row = scores + r * TILE;
          const float highest = std::max(most[r], mask(row, position + r, j, some, reach));
          if (highest == NOTHING) {
            std::fill(row, row + some, 0.0f);
            continue;
          }
          Vector added{};
          for (int64_t n = 0; n < some; n += LANES) {
            const Vector weights = exponential(load_some(row + n, some - n, NOTHING) - highest);
            // What is masked counts for nothing, where e^-87 would count.
            const Vector real = chosen(load_some(row + n, some - n, NOTHING) == NOTHING, splat(0.0f), weights);
            store_some(real, row + n, some - n);
            added += real;
          }
          if (highest != most[r]) {
            const float shrink = exponential(splat(most[r] - highest))[0] * (most[r] == NOTHING ? 0.0f : 1.0f);
            total[r] *= shrink;
            for (int64_t d = 0; d < head_dim; d++) sums[r * head_dim + d] *= shrink;
            most[r] = highest;
          }
          total[r] += sum(added);
        }
        const Strided value_tile = tile(values, page, j - page_start, some, value_buffer);
        if (few) {
          few_sums(scores, value_tile, sums, count, some, head_dim);
        } else {
          add_product({scores, TILE}, value_tile, sums, head_dim, count, head_dim, some);
        }
      }
    };
    if (task.sinks > 0)
      read(task.sink_queries ? task.sink_queries + offset : queries, start, std::min(task.sinks, high), everything);
    if (task.share_left < 0) {
      // Where rows have to be exact, tiles lie on a grid from the first real row on, whatever page and block they are in.
      const int64_t from = exact_rows() && low > start ? std::max(start + (low - start) / TILE * TILE, task.sinks) : low;
      read(queries, from, high, window);
    } else {
      by_bounds(queries, low, high, [&](int64_t first, int64_t last) {
        read(queries, first, last, window);
        return std::pair{most[0], total[0]};
      });
    }
    float* out = task.out + batch * task.out_batch + head * task.out_head + first_row * task.out_row;
    for (int64_t r = 0; r < count; r++) {
      const float factor = total[r] > 0.0f ? 1.0f / total[r] : 0.0f;
      for (int64_t d = 0; d < head_dim; d++) out[r * task.out_row + d] = sums[r * head_dim + d] * factor;
    }
  }

  // Reads keys low .. high of one row page by page: the newest and the oldest first, the others in falling order of their bounds (of
  // equal ones the older first), as long as those left may have more than the share that may be left. `read` takes keys in and
  // gives the largest score so far, and the sum of exponentials relative to it.
  template <class Read>
  void by_bounds(const float* query, int64_t low, int64_t high, const Read& read) const {
    struct Some {
      int64_t first, last;
      float bound;
      double left;  // what this page and those behind it may add, relative to the largest bound
    };
    thread_local std::vector<Some> pages;
    pages.clear();
    int64_t begins = 0;
    for (const PageView& page : keys) {
      const int64_t first = std::max(low, begins), last = std::min(high, begins += page.rows);
      if (first < last) pages.push_back({first, last, bound(query, page), 0.0});
    }
    if (pages.empty()) return;
    std::swap(pages[0], pages.back());
    if (pages.size() > 2) {
      std::swap(pages[1], pages.back());
      std::sort(pages.begin() + 2, pages.end(), [](const Some& a, const Some& b) { return a.bound != b.bound ? a.bound > b.bound : a.first < b.first; });
    }
    const float highest = std::max_element(pages.begin(), pages.end(), [](const Some& a, const Some& b) { return a.bound < b.bound; })->bound;
    double left = 0.0;
    for (auto each = pages.rbegin(); each != pages.rend(); each++)
      each->left = left += (each->last - each->first) * std::exp(double(each->bound) - highest);
    int64_t done = 0;
    float most = NOTHING, total = 0.0f;
    for (const Some& each : pages) {
      if (done > 0 && each.left * std::exp(double(highest) - most) < double(task.share_left) * total) break;
      std::tie(most, total) = read(each.first, each.last);
      done++;
    }
    if (task.counts) task.counts->add(task.layer, done, pages.size());
  }
};

}  // namespace

void attend(const std::vector<AttentionJob>& jobs) {
  // An item is a block of rows of a head; its work stands in multiplications of a channel.
  const auto blocks_of = [](const AttentionTask& task) { return (task.rows + ROW_BLOCK - 1) / ROW_BLOCK; };
  const auto items_of = [&](const AttentionTask& task) { return task.batch * task.heads * blocks_of(task); };
  // A multiplication of few rows comes with a load of its own, and with its share of an exponential.
  const auto work_of = [](const AttentionTask& task) { return (task.rows <= FEW_ROWS ? 4 : 2) * std::min(task.rows, ROW_BLOCK) * std::max<int64_t>(1, task.total); };
  int64_t all = 0, head_dim = 1;
  for (const AttentionJob& job : jobs) all += items_of(job.task) * work_of(job.task), head_dim = job.task.head_dim;
  over_threads(all, head_dim, [&](int64_t first, int64_t last) {
    int64_t before = 0;
    for (const AttentionJob& job : jobs) {
      const AttentionTask& task = job.task;
      const int64_t items = items_of(task), work = work_of(task), blocks = blocks_of(task);
      // Those whose work begins in this part.
      const auto item_at = [&](int64_t place) { return std::clamp<int64_t>((place - before + work - 1) / work, 0, items); };
      for (int64_t item = item_at(first), end = item_at(last); item < end; item++) {
        const int64_t block = item % blocks, batch = item / blocks / task.heads, row = block * ROW_BLOCK;
        const Head head{task, job.keys, job.values, batch, item / blocks % task.heads,
                        task.left_padding ? task.left_padding[batch] : 0,
                        task.lengths ? std::min<int64_t>(task.lengths[batch], task.total) : task.total};
        const int64_t some = std::min(ROW_BLOCK, task.rows - row), together = task.share_left < 0 ? some : 1;  // each chooses its own pages
        for (int64_t r = 0; r < some; r += together) head.rows(row + r, together);
      }
      before += items * work;
    }
  });
}

void attend(const AttentionTask& task, const std::vector<PageView>& keys, const std::vector<PageView>& values) {
  attend({AttentionJob{task, keys, values}});
}

namespace {

class FlashAttention : public CpuPrimitive {
 public:
  struct Shape {
    std::vector<int> key_bits, value_bits;  // by page
    float scale;
    bool causal;
    int window;
    bool left_padding, lengths, relative_bias;
  };

  FlashAttention(mx::Stream stream, Shape shape) : CpuPrimitive(stream), shape_(std::move(shape)) {}
  const char* name() const override { return "MarlinFlashAttention"; }

 protected:
  std::function<void()> task(const std::vector<mx::array>& inputs, mx::array& out) const override {
    const auto& queries = inputs[0];
    size_t next = 1;
    std::vector<Copy> copies;
    const auto views = [&](const std::vector<int>& bits) {
      std::vector<PageView> pages;
      for (int each : bits) {
        const auto& data = inputs[next++];
        const int64_t heads = data.shape(1), rows = data.shape(2), width = data.shape(3);
        if (each == 32) {
          // As it lies: a cache that grows hands out the first rows of its storage, and to copy them takes longer than to read them.
          if (data.strides(3) == 1 || width == 1) {
            pages.push_back({data.data<float>(), nullptr, nullptr, Kind::nvfp4, data.strides(0), data.strides(1), data.strides(2), rows});
          } else {
            copies.push_back({data, std::make_shared<std::vector<float>>(data.size())});
            pages.push_back({copies.back().second->data(), nullptr, nullptr, Kind::nvfp4, heads * rows * width, rows * width, width, rows});
          }
        } else {
          pages.push_back({nullptr, reinterpret_cast<const uint8_t*>(data.data<uint32_t>()), inputs[next++].data<uint8_t>(),
                           each == 8 ? Kind::mxfp8 : Kind::nvfp4, heads * rows, rows, 1, rows});
        }
      }
      return pages;
    };
    const int64_t kv_heads = inputs[1].shape(1);
    auto keys = views(shape_.key_bits), values = views(shape_.value_bits);
    int64_t total = 0;
    for (const auto& page : keys) total += page.rows;
    AttentionTask task{queries.shape(0), queries.shape(1), kv_heads, queries.shape(3), queries.shape(2), total - queries.shape(2), total, shape_.scale};
    task.causal = shape_.causal;
    task.window = shape_.window;
    if (shape_.left_padding) task.left_padding = inputs[next++].data<int32_t>();
    if (shape_.lengths) task.lengths = inputs[next++].data<int32_t>();
    if (shape_.relative_bias) {
      task.most = inputs[next].shape(1) / 2;
      task.relative_bias = inputs[next++].data<float>();
    }
    task.queries = queries.data<float>();
    task.out = out.data<float>();
    task.query_row = task.out_row = task.head_dim;
    task.query_head = task.out_head = task.rows * task.head_dim;
    task.query_batch = task.out_batch = task.heads * task.query_head;
    return [task, keys = std::move(keys), values = std::move(values), copies = std::move(copies)] {
      for (const auto& [from, to] : copies) copy_rows(from, to->data());
      attend(task, keys, values);
    };
  }

 private:
  // A page whose channels do not lie side by side, and where they will.
  using Copy = std::pair<mx::array, std::shared_ptr<std::vector<float>>>;

  static void copy_rows(const mx::array& from, float* to) {
    const float* data = from.data<float>();
    for (int64_t batch = 0; batch < from.shape(0); batch++)
      for (int64_t head = 0; head < from.shape(1); head++)
        for (int64_t row = 0; row < from.shape(2); row++)
          for (int64_t channel = 0; channel < from.shape(3); channel++)
            *to++ = data[batch * from.strides(0) + head * from.strides(1) + row * from.strides(2) + channel * from.strides(3)];
  }

  Shape shape_;
};

}  // namespace

mx::array flash_attention(const mx::array& queries, const std::vector<PageArrays>& keys, const std::vector<PageArrays>& values,
                          float scale, bool causal, int window, const std::optional<mx::array>& left_padding,
                          const std::optional<mx::array>& lengths, const std::optional<mx::array>& relative_bias) {
  auto stream = mx::default_stream(mx::Device::cpu);
  std::vector<mx::array> inputs{contiguous_input(queries)};
  const auto add = [&](const std::vector<PageArrays>& pages) {
    std::vector<int> bits;
    for (const auto& page : pages) {
      bits.push_back(page.bits);
      inputs.push_back(page.scales ? contiguous_input(page.data) : page.data);
      if (page.scales) inputs.push_back(contiguous_input(*page.scales));
    }
    return bits;
  };
  auto key_bits = add(keys), value_bits = add(values);
  for (const auto& counts : {left_padding, lengths})
    if (counts) inputs.push_back(contiguous_input(mx::astype(*counts, mx::int32, stream)));
  if (relative_bias) inputs.push_back(contiguous_input(*relative_bias));
  FlashAttention::Shape shape{std::move(key_bits), std::move(value_bits), scale, causal, window,
                              left_padding.has_value(), lengths.has_value(), relative_bias.has_value()};
  return mx::array(queries.shape(), mx::float32, std::make_shared<FlashAttention>(stream, std::move(shape)), std::move(inputs));
}

}  // namespace marlin
