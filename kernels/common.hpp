// What the CPU kernels share that MLX calls: the caller's side of a primitive.
#pragma once

#include <functional>
#include <vector>

#include "mlx/backend/cpu/encoder.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"
#include "threads.hpp"

namespace marlin {

namespace mx = mlx::core;

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
