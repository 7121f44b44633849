// Keys or values of one layer, in pages that grow on demand: float32, or packed in 8 bits (mxfp8) or 4 (nvfp4).
#pragma once
#include <memory>
#include <vector>

#include "marlin_gemm.hpp"

namespace marlin {

// Rows of keys or values as attention reads them. Dense: floats, `batch`, `head` and `row` floats apart. Packed: rows of a
// head one after another, `batch` and `head` rows apart.
struct PageView {
  const float* dense;
  const uint8_t *weight, *codes;
  Kind kind;
  int64_t batch, head, row, rows;
};

class KeyValuePages {
 public:
  // bits: 32 (float32), 8 or 4.
  KeyValuePages(int64_t batch, int64_t heads, int64_t head_dim, int bits, int64_t rows_per_page);

  // Makes room for `count` more rows. What is there stays where it is.
  void reserve(int64_t count);
  // Writes rows [count, heads * head_dim] of stream `batch` behind the `rows` that are there; `advance` counts them in.
  void write(int64_t batch, const float* from, int64_t count);
  void advance(int64_t count) { rows_ += count; }
  void clear() { rows_ = 0; }
  void keep(const std::vector<int>& streams);

  int64_t rows() const { return rows_; }
  int64_t bytes_in_use() const;     // of the rows so far
  int64_t bytes_allocated() const;  // of the pages
  // Pages that hold the rows so far and `more`.
  std::vector<PageView> views(int64_t more) const;

 private:
  struct Page {
    std::shared_ptr<uint8_t> data, codes;  // MLX's memory, so that its accounts are whole
  };
  Page new_page() const;

  int64_t batch_, heads_, head_dim_, rows_per_page_, row_bytes_, row_codes_, rows_ = 0;
  int bits_;
  std::vector<Page> pages_;
};

}  // namespace marlin
