// local_patch_decode: all bytes that are left of a patch, in one call.
#pragma once
#include "logits.hpp"
#include "stack.hpp"

namespace marlin {

// Rows of the last stage in turn: `lead`, then a token's embedding and its addition for each id.
//   lead       [streams, dim]
//   additions  [streams or 1, tokens, dim]: what is added to the embedding of token i (positions, conditions)
//   given      [streams, n] int32: ids that stand in the patch already; they are fed, not drawn
//   noise      [steps, vocab] Gumbel noise, not read when the temperature is 0
//   seconds    learns what attention, head, drawing and the inputs take, if it is there
// Returns [streams, steps] int32: id i is drawn after n + i tokens.
mlx::core::array local_patch_decode(const Stack& stack, const mlx::core::array& table, const Product& head,
                                    const mlx::core::array& lead, const mlx::core::array& additions,
                                    const mlx::core::array& given, const mlx::core::array& noise, int steps, const Drawing& drawing,
                                    PartSeconds* seconds);

}  // namespace marlin
