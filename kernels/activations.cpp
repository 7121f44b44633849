// activation: of every value of an array.
#include "activations.hpp"

namespace marlin {

void activate(Activation kind, const float* x, const float* gate, float* to, int64_t count) {
  constexpr int64_t AT_ONCE = 4096, WORK_OF_A_VALUE = 16;  // a row of most models is too little to wake a thread
  over_threads((count + AT_ONCE - 1) / AT_ONCE, AT_ONCE * WORK_OF_A_VALUE, [&](int64_t first, int64_t last) {
    const int64_t end = std::min(count, last * AT_ONCE);
    for (int64_t k = first * AT_ONCE; k < end; k += LANES) {
      const int64_t left = end - k;
      const Vector value = load_some(x + k, left);
      store_some(gate ? activate(kind, load_some(gate + k, left)) * value : activate(kind, value), to + k, left);
    }
  });
}

namespace {

class Activated : public CpuPrimitive {
 public:
  Activated(mx::Stream stream, Activation kind) : CpuPrimitive(stream), kind_(kind) {}
  const char* name() const override { return "MarlinActivation"; }

 protected:
  std::function<void()> task(const std::vector<mx::array>& inputs, mx::array& out) const override {
    return [kind = kind_, x = inputs[0].data<float>(), to = out.data<float>(), count = int64_t(out.size())] { activate(kind, x, nullptr, to, count); };
  }

 private:
  Activation kind_;
};

}  // namespace

mx::array activation(const mx::array& x, Activation kind) {
  auto stream = mx::default_stream(mx::Device::cpu);
  return mx::array(x.shape(), mx::float32, std::make_shared<Activated>(stream, kind), {contiguous_input(x)});
}

}  // namespace marlin
