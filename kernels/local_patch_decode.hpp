// local_patch_decode: all bytes that are left of a patch, in one call.
#pragma once
#include "logits.hpp"
#include "stack.hpp"

namespace marlin {

// Rows of the last stage in turn: `lead`, then a token's embedding and its addition for each id. Row i predicts the id at place i.
//   lead       [streams, dim]
//   additions  [streams or 1, tokens, dim]: what is added to the embedding of token i (positions, conditions)
//   given      [streams, n] int32: ids that stand in the patch already
//   known      by stream: how many of them are its own; they are fed, not drawn, and those behind them are drawn
//   places     how many ids each stream has in the end
//   noise      one for each stream, or one for all: [draws, vocab] Gumbel noise of the ids that a stream draws, in their order;
//              not read when its temperature is 0
//   drawings   one for each stream, or one for all
//   seconds    learns what attention, head, drawing and the inputs take, if it is there
// Returns the ids [streams, places] int32, those that were given among them, and -1 where the logits are no numbers; and, if they
// are asked for, the logits [streams, places, vocab], which are zeros where every stream's id was given.
std::pair<mlx::core::array, std::optional<mlx::core::array>> local_patch_decode(
    const Stack& stack, const mlx::core::array& table, const Product& head, const mlx::core::array& lead, const mlx::core::array& additions,
    const mlx::core::array& given, const std::vector<int>& known, int places, const std::vector<mlx::core::array>& noise,
    const std::vector<Drawing>& drawings, bool with_logits, PartSeconds* seconds);

}  // namespace marlin
