"""What the steps that run calibration bytes through a network need of its architecture, an entry for each.

The steps are sequential packing, the choice of formats, and distillation; none of them knows an architecture. Adding
one is a file of functions like `megabyte_passes`, and a line here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from marlin_cli.models import Network
from marlin_cli.quantization.byt5_passes import byt5_bytes, byt5_logits, byt5_pieces, byt5_start
from marlin_cli.quantization.megabyte_passes import megabyte_bytes, megabyte_logits, megabyte_pieces, megabyte_start
from marlin_cli.quantization.pieces import Piece, State


@dataclass(frozen=True)
class Passes:
    """How batches pass the networks of one architecture; what a batch is, the architecture says.

    Attributes:
        start: (network, batch) -> the state that the first piece takes.
        pieces: (network) -> its pieces in the order in which a batch passes them.
        logits: (network, batch) -> [predictions, vocab] float32, without those of filler; it can be differentiated.
        size_bytes: (batch) -> bytes of the corpus that went into it.
    """

    start: Callable[[Any, Any], State]
    pieces: Callable[[Any], list[Piece]]
    logits: Callable[[Any, Any], mx.array]
    size_bytes: Callable[[Any], int]


# model_type -> its passes.
PASSES = {
    "megabyte": Passes(megabyte_start, megabyte_pieces, megabyte_logits, megabyte_bytes),
    "byt5": Passes(byt5_start, byt5_pieces, byt5_logits, byt5_bytes),
}


def passes_of(network: Network) -> Passes:
    """The passes of a network's architecture."""
    return PASSES[network.config.model_type]
