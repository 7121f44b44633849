// marlin_gemm_fp4 (and fp8, int4, int8): out[M, N] = x[M, K] @ W[N, K]^T for W in MLX's packed bytes, x in float32. Chooses the way of
// multiplying, and holds none.
#include "marlin_gemm.hpp"

#include "common.hpp"
#include "marlin_gemm_amx.hpp"
#include "marlin_gemm_e4m3.hpp"
#include "marlin_gemm_fixed.hpp"
#include "marlin_gemm_floats.hpp"
#include "marlin_gemm_lines.hpp"
#include "marlin_gemm_panels.hpp"
#include "marlin_gemm_rounded.hpp"
#include "ways.hpp"

namespace marlin {

Matrix matrix_of(const mx::array& weight, const mx::array& scales, const mx::array* biases, Kind kind, int group_size) {
  Matrix w;
  w.weight = reinterpret_cast<const uint8_t*>(weight.data<uint32_t>());
  w.columns = weight.shape(0);
  w.row_bytes = weight.shape(1) * 4;
  w.depth = w.row_bytes * (kind == Kind::mxfp8 || kind == Kind::int8 ? 1 : 2);
  w.group_size = group_size;
  w.codes = biases ? nullptr : scales.data<uint8_t>();
  w.scales = biases ? scales.data<float>() : nullptr;
  w.biases = biases ? biases->data<float>() : nullptr;
  return w;
}

namespace {

// Whether x becomes numbers of 8 bits for a product.
bool rounds(Kind kind, int activation_bits) { return activation_bits == 8 && has_whole_weights(kind); }

}  // namespace

bool takes_tiles(Kind kind, int64_t rows, int activation_bits) {
  Matrix w{};
  return way_of(kind, w, rows, rounds(kind, activation_bits)) == Way::tiles;
}

namespace {

// body(targets, x, count) for `most` rows at a time.
template <class Body>
void by_few_rows(Targets targets, const float* x, int64_t rows, int64_t most, const Body& body) {
  std::vector<Target> own(targets.begin(), targets.end());
  for (int64_t m = 0; m < rows; m += most) {
    body(own, x + m * own[0].w.depth, std::min(most, rows - m));
    for (Target& target : own) target.out += most * target.w.columns;
  }
}

void multiply_lines_or_registers(Kind kind, Targets targets, const float* x, int64_t rows) {
  if (kind == Kind::mxfp8) return multiply_e4m3(targets, x, rows);
  if (!multiply_lines(kind, targets, x, rows)) multiply_registers(kind, targets, x, rows);
}

// A row whose values do not fit a fixed point: the same way whichever way the others go.
void multiply_alone(Kind kind, Targets targets, const float* x) { multiply_lines_or_registers(kind, targets, x, 1); }

}  // namespace

void multiply_packed(Kind kind, Targets targets, const float* x, int64_t rows, int activation_bits) {
  constexpr int64_t LINES_AT_ONCE = 4;
  if (rows == 0) return;
  const bool rounded = rounds(kind, activation_bits);
  const Way way = way_of(kind, targets[0].w, rows, rounded);
  if (way == Way::tiles) return multiply_amx(kind, targets, x, rows, rounded);
  thread_local std::vector<float> kept;
  if (rounded && !multiplies_whole_numbers(way)) {
    round_to_8_bits(x, rows, targets[0].w.depth, kept);
    x = kept.data();
  }
  switch (way) {
    case Way::fixed:
      if (multiply_fixed(kind, targets, x, rows, multiply_alone)) return;
      return multiply_registers(kind, targets, x, rows);
    case Way::lines:
      if (kind == Kind::mxfp8) return multiply_e4m3(targets, x, rows);
      return by_few_rows(targets, x, rows, LINES_AT_ONCE, [&](Targets own, const float* from, int64_t count) {
        multiply_lines_or_registers(kind, own, from, count);
      });
    case Way::registers: return multiply_registers(kind, targets, x, rows);
    case Way::whole_lines: return multiply_rounded_lines(kind, targets, x, rows);
    case Way::whole_columns: return multiply_rounded_columns(kind, targets, x, rows);
    default:
      if (!multiply_panels(kind, targets, x, rows)) multiply_blocks(kind, targets, x, rows);
  }
}

namespace {

class Gemm : public CpuPrimitive {
 public:
  Gemm(mx::Stream stream, Kind kind, int64_t group_size, int activation_bits)
      : CpuPrimitive(stream), kind_(kind), group_size_(group_size), activation_bits_(activation_bits) {}
  const char* name() const override { return "MarlinGemm"; }

 protected:
  std::function<void()> task(const std::vector<mx::array>& inputs, mx::array& out) const override {
    const Matrix w = matrix_of(inputs[1], inputs[2], inputs.size() > 3 ? &inputs[3] : nullptr, kind_, group_size_);
    const int64_t rows = inputs[0].size() / w.depth;
    return [kind = kind_, w, x = inputs[0].data<float>(), result = out.data<float>(), rows, bits = activation_bits_] {
      const Target target{w, result};
      multiply_packed(kind, {&target, 1}, x, rows, bits);
    };
  }

 private:
  Kind kind_;
  int64_t group_size_;
  int activation_bits_;
};

}  // namespace

mx::array marlin_gemm(const mx::array& x, const mx::array& weight, const mx::array& scales,
                      const std::optional<mx::array>& biases, Kind kind, int group_size, int activation_bits) {
  auto shape = x.shape();
  shape.back() = weight.shape(0);
  auto stream = mx::default_stream(mx::Device::cpu);
  std::vector<mx::array> inputs;
  for (const auto& input : {x, weight, scales}) inputs.push_back(contiguous_input(input));
  if (biases) inputs.push_back(contiguous_input(*biases));
  return mx::array(shape, mx::float32, std::make_shared<Gemm>(stream, kind, group_size, activation_bits), std::move(inputs));
}

}  // namespace marlin
