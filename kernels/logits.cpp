// One row of logits at a time.
#include "logits.hpp"

#include <cmath>
#include <limits>

#include "common.hpp"
#include "stack.hpp"

namespace marlin {

namespace {

// Whether something can be drawn of them: none is NaN, and the largest is finite.
bool are_numbers(const float* logits, int64_t vocab) {
  float most = -std::numeric_limits<float>::infinity();
  bool numbers = true;
  for (int64_t k = 0; k < vocab; k++) {
    most = std::max(most, logits[k]);
    numbers &= logits[k] == logits[k];
  }
  return numbers && std::isfinite(most);
}

}  // namespace

int32_t draw(float* logits, int64_t vocab, const Drawing& drawing, const float* noise) {
  constexpr float NOTHING = -std::numeric_limits<float>::infinity();
  if (!are_numbers(logits, vocab)) return -1;
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

float cost_of(const float* logits, int64_t vocab, int32_t id) {
  constexpr float NOTHING = -std::numeric_limits<float>::infinity();
  Vector most = splat(NOTHING), total{};
  for (int64_t k = 0; k < vocab; k += LANES) {
    const Vector some = load_some(logits + k, vocab - k, NOTHING);
    most = chosen(some > most, some, most);
  }
  const float highest = largest(most);
  for (int64_t k = 0; k < vocab; k += LANES) {
    const Vector some = load_some(logits + k, vocab - k, NOTHING);
    // e^-87, which stands for less, would count where many are impossible.
    total += chosen(some == NOTHING, splat(0.0f), exponential(some - highest));
  }
  return std::log(sum(total)) + highest - logits[id];
}

std::tuple<std::vector<int>, std::vector<float>> draw_ids(const mx::array& logits, const std::vector<std::vector<int>>& forbidden,
                                                          const std::vector<Drawing>& drawings, const std::optional<mx::array>& noise) {
  const auto rows = in_memory(logits);
  const std::optional<mx::array> random = noise ? std::optional(in_memory(*noise)) : std::nullopt;
  const int64_t count = logits.shape(0), vocab = logits.shape(1), apart = noise && noise->shape(0) > 1 ? vocab : 0;
  const auto of_row = [](const auto& several, int64_t m) -> const auto& { return several.size() == 1 ? several[0] : several.at(m); };
  std::vector<int> ids(count);
  std::vector<float> costs(count), row(vocab);
  for (int64_t m = 0; m < count; m++) {
    const float* from = rows.data<float>() + m * vocab;
    std::copy_n(from, vocab, row.begin());
    for (int id : of_row(forbidden, m)) row.at(id) = -std::numeric_limits<float>::infinity();
    ids[m] = draw(row.data(), vocab, of_row(drawings, m), random ? random->data<float>() + m * apart : nullptr);
    costs[m] = ids[m] < 0 ? std::numeric_limits<float>::quiet_NaN() : cost_of(from, vocab, ids[m]);
  }
  return {ids, costs};
}

}  // namespace marlin
