// What the CPU kernels share: a vector of sixteen floats, rows spread over threads, and the caller's side of a primitive.
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

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define MARLIN_AVX512 1
#elif defined(__AVX2__) && defined(__F16C__) && defined(__FMA__)
#include <immintrin.h>
#define MARLIN_AVX2 1
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#define MARLIN_NEON 1
#endif

namespace marlin {

namespace mx = mlx::core;

// Sixteen floats. The compiler lowers its arithmetic to whatever registers the machine has.
typedef float Vector __attribute__((vector_size(64)));
constexpr int LANES = 16;

inline Vector load(const float* from) {
  Vector value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

inline Vector splat(float value) { return Vector{} + value; }

inline float sum(Vector value) {
#if MARLIN_AVX512
  return _mm512_reduce_add_ps(__m512(value));
#endif
  float total = 0.0f;
  for (int lane = 0; lane < LANES; lane++) total += value[lane];
  return total;
}

// Threads that kernels may use; set once from Python.
int threads();
void set_threads(int count);

// Calls body(first, last) on contiguous parts of 0 .. count, one part a thread, when the work is worth waking threads.
template <class Body>
void over_threads(int64_t count, int64_t work_per_item, const Body& body) {
  constexpr int64_t WORK_WORTH_A_THREAD = 1 << 20;  // multiplications: about a tenth of a millisecond
  int64_t parts = std::min<int64_t>({threads(), count, 1 + count * work_per_item / WORK_WORTH_A_THREAD});
  if (parts <= 1) return body(int64_t(0), count);
#pragma omp parallel for num_threads(parts) schedule(static, 1)
  for (int64_t part = 0; part < parts; part++) body(count * part / parts, count * (part + 1) / parts);
}

// out[rows, columns] (row stride `stride`) = x[rows, depth] @ weight[columns, depth]^T by OpenBLAS.
void product(const float* x, const float* weight, float* out, int64_t rows, int64_t columns, int64_t depth, int64_t stride);

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

}  // namespace marlin
