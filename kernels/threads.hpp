// Work spread over threads, and memory that stays with one. Knows nothing of MLX, whose headers take a compiler longer than most kernels.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "vectors.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace marlin {

// Threads that kernels may use; set once from Python.
int threads();
void set_threads(int count);

// Whether a row of a result has to be the same bits whichever rows are beside it; set once from Python.
bool exact_rows();
void set_exact_rows(bool exact);

inline bool in_parallel() {
#ifdef _OPENMP
  return omp_in_parallel();
#else
  return false;
#endif
}

// Calls body(first, last) on contiguous parts of 0 .. count, one part a thread, when the work is worth waking threads.
template <class Body>
void over_threads(int64_t count, int64_t work_per_item, const Body& body) {
  constexpr int64_t WORK_WORTH_A_THREAD = 1 << 16;  // multiplications: 5 to 10 microseconds, of which a thread that waits awake takes one
  int64_t parts = std::min<int64_t>({threads(), count, 1 + count * work_per_item / WORK_WORTH_A_THREAD});
  if (parts <= 1 || in_parallel()) return body(int64_t(0), count);
#pragma omp parallel for num_threads(parts) schedule(static, 1)
  for (int64_t part = 0; part < parts; part++) body(count * part / parts, count * (part + 1) / parts);
}

// Memory that starts where a line of the caches does. Growing loses what was in it.
class AlignedBytes {
 public:
  AlignedBytes() = default;
  AlignedBytes(const AlignedBytes&) = delete;  // a copy would start elsewhere

  uint8_t* of(int64_t bytes) {
    if (int64_t(held_.size()) < bytes + 63) held_.resize(bytes + 63);
    return held_.data() + to_a_line();
  }
  uint8_t* data() { return held_.data() + to_a_line(); }
  const uint8_t* data() const { return held_.data() + to_a_line(); }

 private:
  int64_t to_a_line() const { return (64 - reinterpret_cast<uintptr_t>(held_.data()) % 64) % 64; }

  std::vector<uint8_t> held_;
};

}  // namespace marlin
