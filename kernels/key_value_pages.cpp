// Keys or values in pages: storage, and packing as rows come. Scales are chosen as for weights, data-free.
#include "key_value_pages.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "common.hpp"
#include "decode.hpp"
#include "layer_parts.hpp"

namespace marlin {

namespace {

// E4M3 of a magnitude, to nearest, ties to even, at most 448.
inline uint8_t to_e4m3(float magnitude) {
  if (magnitude < 0x1p-6f) return uint8_t(std::nearbyint(magnitude * 512.0f));
  uint32_t bits;
  std::memcpy(&bits, &magnitude, sizeof(bits));
  bits += 0x7ffff + ((bits >> 20) & 1);
  return uint8_t(std::min<uint32_t>((bits >> 20) - ((127 - 7) << 3), 0x7e));
}

// E2M1 of a magnitude, to nearest, ties to even.
inline uint8_t to_e2m1(float magnitude) {
  return (magnitude > 0.25f) + (magnitude >= 0.75f) + (magnitude > 1.25f) + (magnitude >= 1.75f) + (magnitude > 2.5f) +
         (magnitude >= 3.5f) + (magnitude > 5.0f);
}

inline float largest(const float* from, int64_t count) {
  float most = 0.0f;
  for (int64_t k = 0; k < count; k++) most = std::max(most, std::fabs(from[k]));
  return most;
}

// Sixteen floats as nvfp4. Of the scale that maps the largest to 6 and the one that maps it to 4, the nearer one stays
// (Four Over Six, arXiv 2512.02010).
void pack_nvfp4(const float* from, uint8_t* weight, uint8_t* code) {
  const float most = largest(from, 16);
  float best = std::numeric_limits<float>::infinity();
  std::memset(weight, 0, 8);
  *code = 0;
  for (float top : {6.0f, 4.0f}) {
    const uint8_t candidate = to_e4m3(most / top);
    const float scale = e4m3(candidate);
    if (scale == 0.0f) continue;
    uint8_t packed[8] = {};
    float error = 0.0f;
    for (int k = 0; k < 16; k++) {
      const uint8_t bits = to_e2m1(std::fabs(from[k]) / scale);
      const float off = std::fabs(from[k]) - E2M1[bits] * scale;
      error += off * off;
      packed[k / 2] |= uint8_t(bits | (std::signbit(from[k]) ? 8 : 0)) << (k % 2 * 4);
    }
    if (error < best) {
      best = error;
      std::memcpy(weight, packed, 8);
      *code = candidate;
    }
  }
}

// Thirty-two floats as mxfp8: the smallest power of two under which none is clipped.
void pack_mxfp8(const float* from, uint8_t* weight, uint8_t* code) {
  int exponent;
  const float fraction = std::frexp(largest(from, 32) / 448.0f, &exponent);
  if (fraction == 0.5f) exponent--;
  *code = uint8_t(std::clamp(exponent + 127, 0, 254));
  const float scale = e8m0(*code);
  for (int k = 0; k < 32; k++) weight[k] = to_e4m3(std::fabs(from[k]) / scale) | (std::signbit(from[k]) ? 0x80 : 0);
}

std::shared_ptr<uint8_t> allocate(int64_t bytes) {
  mx::array memory({int(bytes)}, mx::uint8, nullptr, {});
  memory.set_data(mx::allocator::malloc(bytes));
  return {memory.data<uint8_t>(), [memory](uint8_t*) {}};
}

}  // namespace

KeyValuePages::KeyValuePages(int64_t batch, int64_t heads, int64_t head_dim, int bits, int64_t rows_per_page, bool bounded)
    : batch_(batch), heads_(heads), head_dim_(head_dim), rows_per_page_(rows_per_page), bits_(bits), bounded_(bounded) {
  if (bits != 32 && bits != 8 && bits != 4) throw std::invalid_argument("keys and values have 32, 8 or 4 bits");
  if (head_dim % (bits == 8 ? 32 : bits == 4 ? 16 : 1)) throw std::invalid_argument("head_dim is not a multiple of the group");
  row_bytes_ = head_dim * bits / 8;
  row_codes_ = bits == 8 ? head_dim / 32 : bits == 4 ? head_dim / 16 : 0;
}

KeyValuePages::Page KeyValuePages::new_page() const {
  Page page{allocate(page_rows() * row_bytes_), allocate(page_rows() * row_codes_), nullptr};
  page.bounds = new_bounds();
  return page;
}

std::shared_ptr<float> KeyValuePages::new_bounds() const {
  return bounded_ ? std::shared_ptr<float>(new float[batch_ * bounds_width()], std::default_delete<float[]>()) : nullptr;
}

void KeyValuePages::reserve(int64_t count) {
  const int64_t pages = (rows_ + count + rows_per_page_ - 1) / rows_per_page_;
  for (int64_t number = rows_ / rows_per_page_; number < std::min<int64_t>(pages, pages_.size()); number++) {
    Page& page = pages_[number];
    if (page.data.use_count() == 1) {
      std::atomic_thread_fence(std::memory_order_acquire);  // whoever shared it until now may have read it in another thread
      continue;
    }
    Page own = new_page();
    std::memcpy(own.data.get(), page.data.get(), page_rows() * row_bytes_);
    std::memcpy(own.codes.get(), page.codes.get(), page_rows() * row_codes_);
    if (bounded_) std::copy_n(page.bounds.get(), batch_ * bounds_width(), own.bounds.get());
    page = std::move(own);
  }
  while (int64_t(pages_.size()) < pages) pages_.push_back(new_page());
}

void KeyValuePages::cut(int64_t rows) {
  rows_ = std::min(rows_, rows);
  pages_.resize(std::min<size_t>(pages_.size(), (rows_ + rows_per_page_ - 1) / rows_per_page_));
  const int64_t open = rows_ % rows_per_page_;
  if (!bounded_ || !open) return;
  Page& page = pages_.back();
  page.bounds = new_bounds();  // a copy may share those that are there
  bound(page, open);
}

int64_t KeyValuePages::drop(int64_t sinks, int64_t first) {
  const int64_t from = (sinks + rows_per_page_ - 1) / rows_per_page_, to = first / rows_per_page_;
  if (to <= from) return 0;
  pages_.erase(pages_.begin() + from, pages_.begin() + to);
  rows_ -= (to - from) * rows_per_page_;
  return (to - from) * rows_per_page_;
}

void KeyValuePages::widen(Page& page, int64_t row, bool begins) const {
  thread_local std::vector<float> unpacked;
  const float* keys = reinterpret_cast<const float*>(page.data.get()) + row * head_dim_;
  if (bits_ != 32) {
    unpacked.resize(head_dim_);
    const Matrix packed{page.data.get() + row * row_bytes_, page.codes.get() + row * row_codes_, nullptr, nullptr, 1, head_dim_, row_bytes_,
                        bits_ == 8 ? 32 : 16};
    unpack(bits_ == 8 ? Kind::mxfp8 : Kind::nvfp4, packed, 0, 1, unpacked.data());
    keys = unpacked.data();
  }
  float *low = page.bounds.get() + row / rows_per_page_ * 2 * head_dim_, *high = low + head_dim_;
  for (int64_t d = 0; d < head_dim_; d++) {
    low[d] = begins ? keys[d] : std::min(low[d], keys[d]);
    high[d] = begins ? keys[d] : std::max(high[d], keys[d]);
  }
}

void KeyValuePages::bound(Page& page, int64_t rows) const {
  for (int64_t sequence = 0; sequence < batch_ * heads_; sequence++)
    for (int64_t r = 0; r < rows; r++) widen(page, sequence * rows_per_page_ + r, r == 0);
}

void KeyValuePages::write(int64_t batch, const float* from, int64_t count) {
  for (int64_t r = 0; r < count; r++) {
    Page& page = pages_[(rows_ + r) / rows_per_page_];
    for (int64_t h = 0; h < heads_; h++, from += head_dim_) {
      const int64_t row = (batch * heads_ + h) * rows_per_page_ + (rows_ + r) % rows_per_page_;
      uint8_t *data = page.data.get() + row * row_bytes_, *codes = page.codes.get() + row * row_codes_;
      if (bits_ == 32) std::memcpy(data, from, row_bytes_);
      if (bits_ == 8)
        for (int64_t g = 0; g < row_codes_; g++) pack_mxfp8(from + 32 * g, data + 32 * g, codes + g);
      if (bits_ == 4)
        for (int64_t g = 0; g < row_codes_; g++) pack_nvfp4(from + 16 * g, data + 8 * g, codes + g);
      if (bounded_) widen(page, row, row % rows_per_page_ == 0);
    }
  }
}

void KeyValuePages::keep(const std::vector<int>& streams) {
  batch_ = streams.size();
  for (Page& page : pages_) {
    Page kept = new_page();
    const auto copy = [&](const uint8_t* from, uint8_t* to, int64_t row_bytes) {
      const int64_t bytes = heads_ * rows_per_page_ * row_bytes;
      for (size_t b = 0; b < streams.size(); b++) std::memcpy(to + b * bytes, from + streams[b] * bytes, bytes);
    };
    copy(page.data.get(), kept.data.get(), row_bytes_);
    copy(page.codes.get(), kept.codes.get(), row_codes_);
    for (size_t b = 0; bounded_ && b < streams.size(); b++)
      std::copy_n(page.bounds.get() + streams[b] * bounds_width(), bounds_width(), kept.bounds.get() + b * bounds_width());
    page = std::move(kept);
  }
}

template <class Body>
void KeyValuePages::over_runs(const Body& body) const {
  for (int64_t first = 0; first < rows_; first += rows_per_page_)
    for (int64_t sequence = 0; sequence < batch_ * heads_; sequence++)
      body(pages_[first / rows_per_page_], sequence * rows_per_page_, sequence * rows_ + first, std::min(rows_per_page_, rows_ - first));
}

std::vector<mx::array> KeyValuePages::stored() const {
  const auto part = [&](int64_t width, mx::Dtype dtype) {
    const int64_t bytes = batch_ * heads_ * rows_ * width * mx::size_of(dtype);
    return mx::array(mx::allocator::malloc(bytes), {int(batch_), int(heads_), int(rows_), int(width)}, dtype);
  };
  std::vector<mx::array> parts;
  if (bits_ == 32) {
    parts = {part(head_dim_, mx::float32)};
  } else {
    parts = {part(row_bytes_, mx::uint8), part(row_codes_, mx::uint8)};
  }
  over_runs([&](const Page& page, int64_t from, int64_t to, int64_t count) {
    std::memcpy(parts[0].data<uint8_t>() + to * row_bytes_, page.data.get() + from * row_bytes_, count * row_bytes_);
    if (row_codes_) std::memcpy(parts[1].data<uint8_t>() + to * row_codes_, page.codes.get() + from * row_codes_, count * row_codes_);
  });
  return parts;
}

void KeyValuePages::restore(const std::vector<mx::array>& parts, int64_t rows) {
  std::vector<mx::array> given;
  for (const auto& part : parts) given.push_back(in_memory(part));
  const int64_t count = batch_ * heads_ * rows;
  if (given.size() != (bits_ == 32 ? 1 : 2) || int64_t(given[0].nbytes()) != count * row_bytes_ ||
      (row_codes_ && int64_t(given[1].nbytes()) != count * row_codes_))
    throw std::invalid_argument("these are no rows of such a cache");
  pages_.clear();
  rows_ = 0;
  reserve(rows);
  rows_ = rows;
  over_runs([&](const Page& page, int64_t to, int64_t from, int64_t some) {
    std::memcpy(page.data.get() + to * row_bytes_, given[0].data<uint8_t>() + from * row_bytes_, some * row_bytes_);
    if (row_codes_) std::memcpy(page.codes.get() + to * row_codes_, given[1].data<uint8_t>() + from * row_codes_, some * row_codes_);
  });
  for (int64_t first = 0; bounded_ && first < rows; first += rows_per_page_) bound(pages_[first / rows_per_page_], std::min(rows_per_page_, rows - first));
}

std::vector<std::pair<int64_t, int64_t>> KeyValuePages::places() const {
  std::vector<std::pair<int64_t, int64_t>> found;
  for (const Page& page : pages_) found.emplace_back(reinterpret_cast<intptr_t>(page.data.get()), page_rows() * (row_bytes_ + row_codes_));
  return found;
}

int64_t KeyValuePages::bytes_in_use() const { return rows_ * batch_ * heads_ * (row_bytes_ + row_codes_); }

int64_t KeyValuePages::bytes_allocated() const {
  return int64_t(pages_.size()) * page_rows() * (row_bytes_ + row_codes_);
}

std::vector<PageView> KeyValuePages::views(int64_t more) const {
  std::vector<PageView> views;
  for (int64_t first = 0; first < rows_ + more; first += rows_per_page_) {
    const Page& page = pages_[first / rows_per_page_];
    const int64_t rows = std::min(rows_per_page_, rows_ + more - first);
    PageView view{nullptr, page.data.get(), page.codes.get(), bits_ == 8 ? Kind::mxfp8 : Kind::nvfp4,
                  heads_ * rows_per_page_, rows_per_page_, 1, rows};
    if (bits_ == 32) {
      view.dense = reinterpret_cast<const float*>(page.data.get());
      view.batch *= head_dim_, view.head *= head_dim_, view.row = head_dim_;
    }
    view.bounds = page.bounds.get(), view.bounds_batch = bounds_width();
    views.push_back(view);
  }
  return views;
}

}  // namespace marlin
