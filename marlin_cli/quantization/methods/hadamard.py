"""Rotates the channels of a network by Hadamard matrices of one mxfp4 group, so that no channel of a group stands out.

Norms divide by a root mean square, which a rotation leaves as it is once their gains stand in the layers that follow;
so the residual stream of each stage can be turned, in what writes it and in what reads it, and
the values of each head, in `v_proj` and `o_proj`. Nothing is added to the network. What goes into `down_proj` is a
product of two layers' outputs, which no rotation passes: it stays. (Block rotations for mxfp4: arXiv 2511.04214;
MR-GPTQ: arXiv 2509.23202.)
"""

from collections.abc import Sequence
from typing import TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from marlin_cli.errors import QuantizationError
from marlin_cli.models import Network, architecture_of, with_weights

Arrays = dict[str, npt.NDArray[np.float32]]
AnyNetwork = TypeVar("AnyNetwork", bound=Network)

BLOCK = 32  # weights that share a scale in mxfp4

# The norms of a block, and the layers that read their output.
READERS = {
    "attention_norm": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "cross_norm": ("cross.q_proj",),
    "ffn_norm": ("ffn.up_proj", "ffn.gate_proj"),
}


def rotated(network: AnyNetwork) -> AnyNetwork:
    """A copy that computes the same from rotated weights, in the types they are stored in.

    What an encoder hands over is rotated with the rest: the decoder reads it as it did, `encode` alone sees it.

    Raises:
        QuantizationError: the architecture cannot be turned as this one is configured; or widths that blocks do not divide.
    """
    stored = dict(tree_flatten(network.parameters()))
    arrays = {path: np.array(array.astype(mx.float32)) for path, array in stored.items()}
    streams = architecture_of(network).rotation(network.config)
    unit = 2 * BLOCK if streams.halves else BLOCK
    for name, width in streams.widths.items():
        _check_width(name, width, unit)
    for block, head_width in streams.blocks.items():
        _turn_block(arrays, block, head_width)
    for norm, readers in streams.readers.items():
        _turn_readers(arrays, norm, readers)
    for layer in streams.writers:
        _turn_outputs(arrays, layer)
    for path in streams.rows:
        if path in arrays:
            arrays[path] = _turned(arrays[path])
    return with_weights(network, {path: mx.array(array).astype(stored[path].dtype) for path, array in arrays.items()})


def _check_width(name: str, width: int, unit: int) -> None:
    if width % unit:
        raise QuantizationError(f"{name} {width} is not divisible by {unit}, the block that is rotated")


def _turn_block(arrays: Arrays, block: str, head_width: int) -> None:
    """Everything in a block that reads the residual stream or adds to it, and the values of its heads."""
    for norm, readers in READERS.items():
        if f"{block}.{norm}.weight" in arrays:
            _turn_readers(arrays, f"{block}.{norm}", [f"{block}.{path}" for path in readers])
    for path in ("attention.o_proj", "cross.o_proj", "ffn.down_proj"):
        if f"{block}.{path}.weight" in arrays:
            _turn_outputs(arrays, f"{block}.{path}")
    for part in ("attention", "cross"):
        if head_width % BLOCK == 0 and f"{block}.{part}.v_proj.weight" in arrays:
            _turn_outputs(arrays, f"{block}.{part}.v_proj")
            _turn_inputs(arrays, f"{block}.{part}.o_proj")


def hadamard(size: int) -> npt.NDArray[np.float32]:
    """The orthogonal, symmetric matrix of +-1 / sqrt(size) by Sylvester's doubling; `size` is a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / np.sqrt(np.float32(size))).astype(np.float32)


def _turned(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows [..., channels], every block of channels rotated."""
    return (rows.reshape(-1, BLOCK) @ hadamard(BLOCK)).reshape(rows.shape)


def _turn_inputs(arrays: Arrays, layer: str) -> None:
    arrays[f"{layer}.weight"] = _turned(arrays[f"{layer}.weight"])


def _turn_outputs(arrays: Arrays, layer: str) -> None:
    arrays[f"{layer}.weight"] = _turned(arrays[f"{layer}.weight"].T).T
    if f"{layer}.bias" in arrays:
        arrays[f"{layer}.bias"] = _turned(arrays[f"{layer}.bias"])


def _turn_readers(arrays: Arrays, norm: str, readers: Sequence[str]) -> None:
    """Move a norm's gain into the columns of the layers that read its output, so that it becomes 1, and turn these."""
    for layer in readers:
        if f"{layer}.weight" in arrays:
            arrays[f"{layer}.weight"] = arrays[f"{layer}.weight"] * arrays[f"{norm}.weight"]
            _turn_inputs(arrays, layer)
    arrays[f"{norm}.weight"] = np.ones_like(arrays[f"{norm}.weight"])
