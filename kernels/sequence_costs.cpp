// sequence_costs: embed, layers, head and the sum of exponentials for a few sequences at a time, whose rows stay in the cache of
// the thread that has them. No logits leave it.
#include "sequence_costs.hpp"

#include "common.hpp"
#include "logits.hpp"

namespace marlin {

namespace {

constexpr int64_t ROWS_OF_A_CHUNK = 256, LOGITS_AT_ONCE = 1 << 16;

}  // namespace

mx::array sequence_costs(const Stack& stack, const mx::array& table, const Product& head, const mx::array& lead, const mx::array& additions,
                         const mx::array& given, const mx::array& expected) {
  std::vector<mx::array> inputs;
  for (const auto& each : {table, lead, additions, given, expected}) inputs.push_back(contiguous_input(each));
  mx::eval(inputs);
  const float *embeddings = inputs[0].data<float>(), *leads = inputs[1].data<float>(), *added = inputs[2].data<float>();
  const int32_t *ids = inputs[3].data<int32_t>(), *wanted = inputs[4].data<int32_t>();
  const int64_t sequences = lead.shape(0), dim = stack.dim(), vocab = head.columns(), rows = expected.shape(1), width = given.shape(1);
  const int64_t apart = additions.shape(0) == 1 ? 0 : (rows - 1) * dim;
  std::vector<float> costs(sequences * rows);
  const auto chunk = [&](int64_t first, int64_t count) {
    const int64_t n = count * rows, at_once = std::clamp<int64_t>(LOGITS_AT_ONCE / vocab, 1, n);
    std::vector<float> hidden(n * dim), logits(at_once * vocab);
    for (int64_t s = 0; s < count; s++) {
      float* to = &hidden[s * rows * dim];
      std::copy_n(leads + (first + s) * dim, dim, to);
      for (int64_t token = 0; token + 1 < rows; token++) {
        const float *from = embeddings + ids[(first + s) * width + token] * dim, *addition = added + (first + s) * apart + token * dim;
        for (int64_t k = 0; k < dim; k++) to[(token + 1) * dim + k] = from[k] + addition[k];
      }
    }
    stack(hidden.data(), {{count, rows}});
    for (int64_t m = 0; m < n; m += at_once) {
      const int64_t some = std::min(at_once, n - m);
      head(&hidden[m * dim], logits.data(), some);
      for (int64_t r = 0; r < some; r++) costs[first * rows + m + r] = cost_of(&logits[r * vocab], vocab, wanted[first * rows + m + r]);
    }
  };
  const int64_t each = std::max<int64_t>(1, ROWS_OF_A_CHUNK / rows), chunks = (sequences + each - 1) / each;
  const auto run = [&](int64_t number) { chunk(number * each, std::min(each, sequences - number * each)); };
  if (chunks >= threads()) {
#pragma omp parallel for num_threads(threads()) schedule(dynamic, 1)
    for (int64_t number = 0; number < chunks; number++) run(number);
  } else {
    for (int64_t number = 0; number < chunks; number++) run(number);
  }
  return mx::array(costs.data(), {int(sequences), int(rows)}, mx::float32);
}

}  // namespace marlin
