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

#ifdef _OPENMP
#include <omp.h>
#endif

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

inline Vector splat(float value) { return value - Vector{}; }  // less zero is no operation; zero plus it would be one, for -0

inline float sum(Vector value) {
#if MARLIN_AVX512
  return _mm512_reduce_add_ps(__m512(value));
#endif
  float total = 0.0f;
  for (int lane = 0; lane < LANES; lane++) total += value[lane];
  return total;
}

// The first `count` of sixteen floats; the others are `fill`.
inline Vector load_some(const float* from, int64_t count, float fill = 0.0f) {
  if (count >= LANES) return load(from);
  Vector value = splat(fill);
  std::memcpy(&value, from, count * sizeof(float));
  return value;
}

inline void store_some(Vector value, float* to, int64_t count) {
  std::memcpy(to, &value, std::min<int64_t>(count, LANES) * sizeof(float));
}

// e^x for x up to 88, to two units in the last place: 2^n times a polynomial on half an octave (Cephes, expf).
inline Vector exponential(Vector x) {
  typedef int32_t Integers __attribute__((vector_size(64)));
  x = x < -87.0f ? splat(-87.0f) : x > 88.0f ? splat(88.0f) : x;
  const Vector shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum rounds to an integer
  const Vector whole = shifted - 12582912.0f;
  const Vector rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Vector y = splat(1.9875691500e-4f);
  for (float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) y = y * rest + next;
  y = y * rest * rest + rest + 1.0f;
  const Integers power = (__builtin_convertvector(whole, Integers) + 127) << 23;
  Vector scale;
  std::memcpy(&scale, &power, sizeof(scale));
  return y * scale;
}

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
  constexpr int64_t WORK_WORTH_A_THREAD = 1 << 20;  // multiplications: about a tenth of a millisecond
  int64_t parts = std::min<int64_t>({threads(), count, 1 + count * work_per_item / WORK_WORTH_A_THREAD});
  if (parts <= 1 || in_parallel()) return body(int64_t(0), count);
#pragma omp parallel for num_threads(parts) schedule(static, 1)
  for (int64_t part = 0; part < parts; part++) body(count * part / parts, count * (part + 1) / parts);
}

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
