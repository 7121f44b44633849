"""A network as pieces that a batch passes one after the other, each by itself; what a piece is. Knows no network."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

# What a batch has become so far, by name. `rows` [.., channels] is what the next block reads; `real`, where there is
# filler, says which of the rows before their last axis are none.
State = dict[str, mx.array]


@dataclass(frozen=True)
class Piece:
    """What a batch passes at once: a block, or what leads to one.

    Attributes:
        run: (network, state of a batch) -> its state after the piece. The state that is given is not changed.
        sources: the inputs of the piece's linear layers in the order in which they come about, by `shared_inputs`.
        adds: layers of a block whose outputs are added to its rows, in that order.
    """

    run: Callable[[Any, State], State]
    sources: tuple[str, ...] = ()
    adds: tuple[str, ...] = ()
