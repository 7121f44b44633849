// What is done with a row of logits: an id is drawn, and the cost of an id is found.
#pragma once
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "mlx/mlx.h"

namespace marlin {

// How an id is drawn; the filters are those of `marlin_cli.engine.sampling`, in the same order.
struct Drawing {
  float temperature = 0.0f;
  int top_k = 0;
  float top_p = 1.0f, min_p = 0.0f;
};

// The id drawn from one row of logits, which is overwritten; -1 where they are no numbers. `noise` [vocab] is not read when the
// temperature is 0.
int32_t draw(float* logits, int64_t vocab, const Drawing& drawing, const float* noise);

// Minus the logarithm of the probability of `id`.
float cost_of(const float* logits, int64_t vocab, int32_t id);

// An id for each row of logits [rows, vocab], and its cost under them; -1 and NaN where they are no numbers.
//   forbidden  by row, or one for all: ids that are not drawn, but count in costs
//   drawings   by row, or one for all
//   noise      [rows, vocab], or [1, vocab] for all
std::tuple<std::vector<int>, std::vector<float>> draw_ids(const mlx::core::array& logits, const std::vector<std::vector<int>>& forbidden,
                                                          const std::vector<Drawing>& drawings,
                                                          const std::optional<mlx::core::array>& noise);

}  // namespace marlin
