// local_patch_decode: embed, layers, head and draw, step by step on plain memory. The cache lives for one call.
#include "local_patch_decode.hpp"

#include <cmath>
#include <limits>

#include "common.hpp"

namespace marlin {

namespace {

// The id drawn from one row of logits, which is overwritten.
int32_t draw(float* logits, int64_t vocab, const Drawing& drawing, const float* noise) {
  constexpr float NOTHING = -std::numeric_limits<float>::infinity();
  if (drawing.temperature > 0) {
    for (int64_t k = 0; k < vocab; k++) logits[k] /= drawing.temperature;
    std::vector<float> ordered(logits, logits + vocab);
    std::sort(ordered.begin(), ordered.end(), std::greater<>());
    float floor = NOTHING;
    if (drawing.top_k > 0 && drawing.top_k < vocab) floor = ordered[drawing.top_k - 1];
    if (drawing.top_p < 1) {
      double total = 0.0, before = 0.0;
      for (float each : ordered) total += each < floor ? 0.0 : std::exp(double(each) - ordered[0]);
      // The likeliest id always stays: what counts is the probability before each.
      for (float each : ordered) {
        if (each < floor || before >= drawing.top_p) {
          floor = std::max(floor, std::nextafter(each, std::numeric_limits<float>::infinity()));
          break;
        }
        before += std::exp(double(each) - ordered[0]) / total;
      }
    }
    if (drawing.min_p > 0) floor = std::max(floor, ordered[0] + std::log(drawing.min_p));
    for (int64_t k = 0; k < vocab; k++) logits[k] = logits[k] < floor ? NOTHING : logits[k] + noise[k];
  }
  return int32_t(std::max_element(logits, logits + vocab) - logits);
}

}  // namespace

mx::array local_patch_decode(const Stack& stack, const mx::array& table, const Product& head, const mx::array& lead,
                             const mx::array& additions, const mx::array& given, const mx::array& noise, int steps,
                             const Drawing& drawing) {
  std::vector<mx::array> inputs;
  for (const auto& each : {table, lead, additions, given, noise}) inputs.push_back(mx::contiguous(each, false, mx::Device::cpu));
  mx::eval(inputs);
  const int64_t streams = lead.shape(0), dim = stack.dim(), vocab = head.columns(), known = given.shape(1), tokens = additions.shape(1);
  const float *embeddings = inputs[0].data<float>(), *added = inputs[2].data<float>(), *random = inputs[4].data<float>();
  const int32_t* fed = inputs[3].data<int32_t>();
  StackCache cache = stack.cache(streams, known + steps);
  std::vector<float> rows(inputs[1].data<float>(), inputs[1].data<float>() + streams * dim), logits(streams * vocab);
  std::vector<int32_t> ids(streams), drawn(streams * steps);
  for (int64_t token = 0; token < known + steps; token++) {
    stack(rows.data(), streams, 1, &cache);
    if (token < known) {
      for (int64_t b = 0; b < streams; b++) ids[b] = fed[b * known + token];
    } else {
      head(rows.data(), logits.data(), streams);
      for (int64_t b = 0; b < streams; b++) {
        ids[b] = draw(logits.data() + b * vocab, vocab, drawing, random + (token - known) * vocab);
        drawn[b * steps + token - known] = ids[b];
      }
    }
    for (int64_t b = 0; b < streams && token < tokens; b++) {
      const float *from = embeddings + ids[b] * dim, *addition = added + ((additions.shape(0) == 1 ? 0 : b) * tokens + token) * dim;
      for (int64_t k = 0; k < dim; k++) rows[b * dim + k] = from[k] + addition[k];
    }
  }
  return mx::array(drawn.data(), {int(streams), steps}, mx::int32);
}

}  // namespace marlin
