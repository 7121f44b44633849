"""How windows of bytes pass a MegaByte: its stages as pieces, and what it predicts. See `passes`."""

from functools import partial

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.models.megabyte import MegaByte
from marlin_cli.quantization.pieces import Piece, State
from marlin_cli.statistics.collect import shared_inputs

Windows = npt.NDArray[np.uint8]  # [windows, window_bytes]


def megabyte_start(network: MegaByte, windows: Windows) -> State:
    """The state of windows before the first piece."""
    return {"ids": mx.array(windows.astype(np.int32))}


def megabyte_pieces(network: MegaByte) -> list[Piece]:
    """Stage after stage, what leads to it and then its blocks."""
    sources = list(dict.fromkeys(shared_inputs(network).values()))
    numbers = range(len(network.config.stages))
    names = ["global", *(f"middle.{number - 1}" for number in numbers[1:-1]), "local"]
    pieces = []
    for number, name in enumerate(names):
        # What the stage before gives, and what reads the patches; the global stage's own stand outside of it.
        before = None if number == 0 else "global_to_local" if number == 1 else f"{names[number - 1]}.to_next"
        patches = "patch_projection" if number == 0 else f"{name}.patch_projection"
        leading = tuple(path for path in (before, patches) if path in sources)
        pieces.append(Piece(partial(_enter_stage, number=number), leading))
        for index in range(network.config.stages[number].layers):
            block = f"{name}.layers.{index}"
            within = tuple(source for source in sources if source.startswith(f"{block}."))
            adds = (f"{block}.attention.o_proj", f"{block}.ffn.down_proj")
            pieces.append(Piece(partial(_run_block, number=number, index=index), within, adds))
    return pieces


def megabyte_logits(network: MegaByte, windows: Windows) -> mx.array:
    """Logits [bytes, vocab] float32 of every byte."""
    logits = network(mx.array(windows.astype(np.int32)))
    return logits.reshape(-1, logits.shape[-1])


def megabyte_bytes(windows: Windows) -> int:
    """Bytes of the corpus that went into windows."""
    return windows.size


def _enter_stage(network: MegaByte, state: State, number: int) -> State:
    """Keep the hidden rows of the stage before, and make the rows that enter stage `number` of all before it."""
    state = dict(state)
    if number:
        stack = network.stages[number - 1].stack
        state[f"stage {number - 1}"] = stack.norm(state["rows"]) if "norm" in stack else state["rows"]
    found: list[mx.array] = []

    def run(stage: int, rows: mx.array) -> mx.array:
        if stage == number:
            found.append(rows)
        return state[f"stage {stage}"] if stage < number else rows

    network(state["ids"], run)
    return {**state, "rows": found[0]}


def _run_block(network: MegaByte, state: State, number: int, index: int) -> State:
    return {**state, "rows": network.stages[number].stack.layers[index](state["rows"])}
