// What the CPU kernels share: rows spread over threads, and the caller's side of a primitive.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "mlx/backend/cpu/encoder.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"
#include "vectors.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace marlin {

namespace mx = mlx::core;

// Threads that kernels may use; set once from Python.
int threads();
void set_threads(int count);

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
  const uint8_t* data() const { return held_.data() + to_a_line(); }

 private:
  int64_t to_a_line() const { return (64 - reinterpret_cast<uintptr_t>(held_.data()) % 64) % 64; }

  std::vector<uint8_t> held_;
};

// A CPU primitive of one output. `task` gets the inputs and the output with its memory in place, and returns the work.
// MLX runs the work later, on its own thread, when this object may be gone: it must hold values and pointers to data.
class CpuPrimitive : public mx::Primitive {
 public:
  explicit CpuPrimitive(mx::Stream stream) : mx::Primitive(stream) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& out = outputs[0];
    out.set_data(mx::allocator::malloc(out.nbytes()));
    auto& encoder = mx::cpu::get_command_encoder(stream());
    for (const auto& input : inputs) encoder.set_input_array(input);
    encoder.set_output_array(out);
    encoder.dispatch(task(inputs, out));
  }

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("marlin's CPU kernels run on the CPU alone");
  }

 protected:
  virtual std::function<void()> task(const std::vector<mx::array>& inputs, mx::array& out) const = 0;
};

// Whether an array is in memory, its rows one after another.
inline bool lies_contiguous(const mx::array& array) { return array.is_available() && array.flags().row_contiguous; }

// What a primitive reads: `from` with its rows one after another. What is so already, in memory or from a primitive of these, goes in
// as it is: every other array costs MLX a node of its graph, about a microsecond.
inline mx::array contiguous_input(const mx::array& from) {
  const bool there = lies_contiguous(from);
  const bool ours = !there && from.has_primitive() && dynamic_cast<const CpuPrimitive*>(&from.primitive());
  return there || ours ? from : mx::contiguous(from, false, mx::Device::cpu);
}

}  // namespace marlin
