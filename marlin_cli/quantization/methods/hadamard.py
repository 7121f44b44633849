"""Rotates the channels of a MegaByte by Hadamard matrices of one mxfp4 group, so that no channel of a group stands out.

Norms divide by a root mean square, which a rotation leaves as it is once their gains stand in the layers that follow;
so the residual stream of each stage can be turned, in what writes it and in what reads it, and the values of each head,
in `v_proj` and `o_proj`. Nothing is added to the network. What goes into `down_proj` is a product of two layers'
outputs, which no rotation passes: it stays. (Block rotations for mxfp4: arXiv 2511.04214; MR-GPTQ: arXiv 2509.23202.)
"""

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from marlin_cli.errors import QuantizationError
from marlin_cli.models.megabyte import MegaByte

BLOCK = 32  # weights that share a scale in mxfp4


def rotated(network: MegaByte) -> MegaByte:
    """A copy that computes the same from rotated weights, in the types they are stored in.

    Raises:
        QuantizationError: another layout than prefix, another norm than rmsnorm, or widths that blocks do not divide.
    """
    config = network.config
    if config.layout != "prefix" or config.norm != "rmsnorm":
        raise QuantizationError(
            f"only layout prefix with rmsnorm can be rotated; this model has {config.layout} with {config.norm}"
        )
    unit = 2 * BLOCK if config.token_shift else BLOCK  # half of the channels may come from another row
    for name, width in (("global_dim", config.global_dim), ("local_dim", config.local_dim)):
        if width % unit:
            raise QuantizationError(f"{name} {width} is not divisible by {unit}, the block that is rotated")
    stored = dict(tree_flatten(network.parameters()))
    arrays = {path: np.array(array.astype(mx.float32)) for path, array in stored.items()}
    for number, (name, reader) in enumerate((("global", "global_to_local"), ("local", "output"))):
        stage = config.stages[number]
        for index in range(stage.layers):
            block = f"{name}.layers.{index}"
            for norm, readers in (
                ("attention_norm", ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
                ("ffn_norm", ("ffn.up_proj", "ffn.gate_proj")),
            ):
                _move_gain(arrays, f"{block}.{norm}.weight", [f"{block}.{path}" for path in readers])
                for path in readers:
                    _turn_inputs(arrays, f"{block}.{path}")
            for path in ("attention.o_proj", "ffn.down_proj"):
                _turn_outputs(arrays, f"{block}.{path}")
            if stage.width_of_head % BLOCK == 0:
                _turn_outputs(arrays, f"{block}.attention.v_proj")
                _turn_inputs(arrays, f"{block}.attention.o_proj")
        _move_gain(arrays, f"{name}.norm.weight", [reader])
        _turn_inputs(arrays, reader)
        _turn_outputs(arrays, ("patch_projection", "global_to_local")[number])
        for path in (f"{name}_start", f"{name}_positions.weight", *(["local_byte_embedding.weight"] if number else [])):
            if path in arrays:
                arrays[path] = _turned(arrays[path])
    copy = MegaByte(config)
    copy.load_weights([(path, mx.array(array).astype(stored[path].dtype)) for path, array in arrays.items()])
    copy.eval()
    return copy


def hadamard(size: int) -> npt.NDArray[np.float32]:
    """The orthogonal, symmetric matrix of +-1 / sqrt(size) by Sylvester's doubling; `size` is a power of two."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / np.sqrt(np.float32(size))).astype(np.float32)


def _turned(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows [..., channels], every block of channels rotated."""
    return (rows.reshape(-1, BLOCK) @ hadamard(BLOCK)).reshape(rows.shape)


def _turn_inputs(arrays: dict[str, npt.NDArray[np.float32]], layer: str) -> None:
    if f"{layer}.weight" in arrays:
        arrays[f"{layer}.weight"] = _turned(arrays[f"{layer}.weight"])


def _turn_outputs(arrays: dict[str, npt.NDArray[np.float32]], layer: str) -> None:
    arrays[f"{layer}.weight"] = _turned(arrays[f"{layer}.weight"].T).T
    if f"{layer}.bias" in arrays:
        arrays[f"{layer}.bias"] = _turned(arrays[f"{layer}.bias"])


def _move_gain(arrays: dict[str, npt.NDArray[np.float32]], norm: str, readers: list[str]) -> None:
    """Into the columns of the layers that read a norm's output; the gain becomes 1."""
    for layer in readers:
        if f"{layer}.weight" in arrays:
            arrays[f"{layer}.weight"] = arrays[f"{layer}.weight"] * arrays[norm]
    arrays[norm] = np.ones_like(arrays[norm])
