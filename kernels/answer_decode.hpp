// answer_decode: what follows the next ids of every answer or text, in one call.
#pragma once
#include "stack.hpp"

namespace marlin {

// Feeds ids to texts that stand at unlike places: their embeddings, the layers, the head.
//   table     [vocab, dim] float32
//   ids       those of the first cache's texts, then of the second's: each text's in their order
//   rows      by cache: ids of each of its texts, one at least
//   caches    of the texts so far; a cache grows by its rows
//   memories  by cache: of the inputs, each with equally many of its texts; none at all where the layers read nothing else
//   every     is what follows each id asked for, not only the last of each text?
// Returns [texts, vocab] logits of what follows, or [ids, vocab].
mlx::core::array answer_decode(const Stack& stack, const mlx::core::array& table, const Product& head, const std::vector<int>& ids,
                               const std::vector<int>& rows, const std::vector<StackCache*>& caches,
                               const std::vector<const StackMemory*>& memories, bool every);

}  // namespace marlin
