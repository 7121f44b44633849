// answer_decode: what follows the next id of every answer, in one call.
#pragma once
#include "stack.hpp"

namespace marlin {

// Feeds an id to each answer: its embedding, the layers, the head.
//   table   [vocab, dim] float32
//   ids     one for each answer
//   cache   of the answers so far; grows by a row
//   memory  of the inputs, each with equally many answers; null where the layers read nothing else
// Returns [answers, vocab] logits.
mlx::core::array answer_decode(const Stack& stack, const mlx::core::array& table, const Product& head, const std::vector<int>& ids,
                               StackCache& cache, const StackMemory* memory);

}  // namespace marlin
