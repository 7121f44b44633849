"""Rotates the channels of a network by Hadamard matrices of one mxfp4 group, so that no channel of a group stands out.

Norms divide by a root mean square, which a rotation leaves as it is once their gains stand in the layers that follow;
so the residual stream of each stage (of a ByT5, both in one) can be turned, in what writes it and in what reads it, and
the values of each head, in `v_proj` and `o_proj`. Nothing is added to the network. What goes into `down_proj` is a
product of two layers' outputs, which no rotation passes: it stays. (Block rotations for mxfp4: arXiv 2511.04214;
MR-GPTQ: arXiv 2509.23202.)
"""

from typing import TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from marlin_cli.errors import QuantizationError
from marlin_cli.models import Network
from marlin_cli.models.byt5 import ByT5, ByT5Config
from marlin_cli.models.megabyte import MegaByteConfig

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

    What a ByT5's encoder hands over is rotated with the rest: the decoder reads it as it did, `encode` alone sees it.

    Raises:
        QuantizationError: a MegaByte of another layout than prefix, or with another norm than rmsnorm; a ByT5 whose head
            is its embedding, whose encoder stands alone or takes maxima; or widths that blocks do not divide.
    """
    stored = dict(tree_flatten(network.parameters()))
    arrays = {path: np.array(array.astype(mx.float32)) for path, array in stored.items()}
    if isinstance(network, ByT5):
        _turn_byt5(arrays, network.config)
    else:
        _turn_megabyte(arrays, network.config)
    copy = type(network)(network.config)  # type: ignore[arg-type]  # its own configuration
    copy.load_weights([(path, mx.array(array).astype(stored[path].dtype)) for path, array in arrays.items()])
    copy.eval()
    return copy


def _turn_megabyte(arrays: Arrays, config: MegaByteConfig) -> None:
    if config.layout != "prefix" or config.norm != "rmsnorm":
        raise QuantizationError(
            f"only layout prefix with rmsnorm can be rotated; this model has {config.layout} with {config.norm}"
        )
    unit = 2 * BLOCK if config.token_shift else BLOCK  # half of the channels may come from another row
    _check_width("global_dim", config.global_dim, unit)
    _check_width("local_dim", config.local_dim, unit)
    for number, (name, reader) in enumerate((("global", "global_to_local"), ("local", "output"))):
        stage = config.stages[number]
        for index in range(stage.layers):
            _turn_block(arrays, f"{name}.layers.{index}", stage.width_of_head)
        _turn_readers(arrays, f"{name}.norm", [reader])
        _turn_outputs(arrays, ("patch_projection", "global_to_local")[number])
        for path in (f"{name}_start", f"{name}_positions.weight", *(["local_byte_embedding.weight"] if number else [])):
            if path in arrays:
                arrays[path] = _turned(arrays[path])


def _turn_byt5(arrays: Arrays, config: ByT5Config) -> None:
    if not config.decoder_layers:
        raise QuantizationError("an encoder alone cannot be rotated: its states are the answer, and would be others")
    if config.tied_head:
        raise QuantizationError("a ByT5 with a tied head cannot be rotated: its embedding cannot take the last norm's gain")
    if config.downsample_factor > 1 and config.pooling == "max":
        raise QuantizationError("an encoder that pools by the maximum cannot be rotated; one that pools by the mean can")
    _check_width("d_model", config.d_model, BLOCK)
    # Encoder and decoder read one embedding, so both streams are turned alike.
    arrays["embedding.weight"] = _turned(arrays["embedding.weight"])
    blocks = [path.removesuffix(".attention.q_proj.weight") for path in arrays if path.endswith(".attention.q_proj.weight")]
    for block in blocks:
        _turn_block(arrays, block, config.head_dim)
    reading = [f"{block}.cross.{name}" for block in blocks if block.startswith("decoder.") for name in ("k_proj", "v_proj")]
    _turn_readers(arrays, "encoder.norm", reading)
    _turn_readers(arrays, "decoder.norm", ["output"])


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


def _turn_readers(arrays: Arrays, norm: str, readers: list[str]) -> None:
    """Move a norm's gain into the columns of the layers that read its output, so that it becomes 1, and turn these."""
    for layer in readers:
        if f"{layer}.weight" in arrays:
            arrays[f"{layer}.weight"] = arrays[f"{layer}.weight"] * arrays[f"{norm}.weight"]
            _turn_inputs(arrays, layer)
    arrays[f"{norm}.weight"] = np.ones_like(arrays[f"{norm}.weight"])
