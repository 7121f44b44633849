// sequence_costs: what given ids cost under the last stage, in one call.
#pragma once
#include "stack.hpp"

namespace marlin {

// Row i of a sequence predicts its expected id i; the first row is `lead`, row i + 1 the embedding of token i and its addition.
//   lead       [sequences, dim]
//   additions  [sequences or 1, tokens, dim], tokens = rows - 1
//   given      [sequences, tokens at least] int32: the ids that are read
//   expected   [sequences, rows] int32
// Returns [sequences, rows]: minus the logarithm of the probability of each expected id.
mlx::core::array sequence_costs(const Stack& stack, const mlx::core::array& table, const Product& head, const mlx::core::array& lead,
                                const mlx::core::array& additions, const mlx::core::array& given, const mlx::core::array& expected);

}  // namespace marlin
