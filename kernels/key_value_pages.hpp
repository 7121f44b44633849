// Keys or values of one layer, in pages that grow on demand: float32, or packed in 8 bits (mxfp8) or 4 (nvfp4).
#pragma once
#include <memory>
#include <vector>

#include "marlin_gemm.hpp"

namespace marlin {

// Rows of keys or values as attention reads them. Dense: floats, `batch`, `head` and `row` floats apart. Packed: rows of a
// head one after another, `batch` and `head` rows apart. Of keys the smallest and the largest of each channel may be known:
// [heads, 2, head_dim] of each sequence, `bounds_batch` floats apart.
struct PageView {
  const float* dense;
  const uint8_t *weight, *codes;
  Kind kind;
  int64_t batch, head, row, rows;
  const float* bounds = nullptr;
  int64_t bounds_batch = 0;
};

// A copy shares the pages: whichever of the two writes into one first has a page of its own from then on.
class KeyValuePages {
 public:
  // bits: 32 (float32), 8 or 4. bounded: each page knows the smallest and the largest of its rows by channel.
  KeyValuePages(int64_t batch, int64_t heads, int64_t head_dim, int bits, int64_t rows_per_page, bool bounded = false);

  // Makes room for `count` more rows. What is there stays where it is, but for a page that a copy shares.
  void reserve(int64_t count);
  // Writes rows [count, heads * head_dim] of stream `batch` behind the `rows` that are there; `advance` counts them in.
  void write(int64_t batch, const float* from, int64_t count);
  void advance(int64_t count) { rows_ += count; }
  void clear() { rows_ = 0; }
  // Forgets all but the first `rows` rows.
  void cut(int64_t rows);
  // Lets go of the whole pages between the first `sinks` rows and row `first`, and closes the gap: how many rows fewer there are.
  int64_t drop(int64_t sinks, int64_t first);
  void keep(const std::vector<int>& streams);

  // The rows as they stand in the pages: [batch, heads, rows, head_dim] float32, or of packed ones their bytes
  // [batch, heads, rows, ..] and the scales of their groups [batch, heads, rows, groups], both uint8.
  std::vector<mlx::core::array> stored() const;
  // Takes `rows` rows as `stored` gives them, in place of those that are there.
  void restore(const std::vector<mlx::core::array>& parts, int64_t rows);

  int64_t rows() const { return rows_; }
  int64_t bytes_in_use() const;     // of the rows so far
  int64_t bytes_allocated() const;  // of the pages
  // Where each page lies, and its bytes: what two caches both name they share.
  std::vector<std::pair<int64_t, int64_t>> places() const;
  // Pages that hold the rows so far and `more`.
  std::vector<PageView> views(int64_t more) const;

 private:
  struct Page {
    std::shared_ptr<uint8_t> data, codes;  // MLX's memory, so that its accounts are whole
    std::shared_ptr<float> bounds;         // [batch, heads, 2, head_dim]
  };
  Page new_page() const;
  std::shared_ptr<float> new_bounds() const;
  int64_t page_rows() const { return batch_ * heads_ * rows_per_page_; }
  // Calls body(page, row of the page's memory, row of [batch, heads, rows], rows) on rows that stand together in both.
  template <class Body>
  void over_runs(const Body& body) const;
  int64_t bounds_width() const { return bounded_ ? 2 * heads_ * head_dim_ : 0; }
  // Widens the bounds of a page by a row of its memory, which belongs to one head of one sequence; `begins`: nothing was before.
  void widen(Page& page, int64_t row, bool begins) const;
  // Takes the bounds of a page anew from its first `rows` rows.
  void bound(Page& page, int64_t rows) const;

  int64_t batch_, heads_, head_dim_, rows_per_page_, row_bytes_, row_codes_, rows_ = 0;
  int bits_;
  bool bounded_;
  std::vector<Page> pages_;
};

}  // namespace marlin
