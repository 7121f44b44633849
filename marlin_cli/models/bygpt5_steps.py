"""What calibration, packing, rotation and tuning ask of a ByGPT5; see `models.architecture`. It reads windows of bytes."""

from functools import partial

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.errors import QuantizationError
from marlin_cli.models.architecture import (
    Architecture,
    Capability,
    Continuing,
    PackedKeys,
    Piece,
    Reading,
    Rotation,
    State,
    Tuning,
    Watch,
    piece_of_block,
)
from marlin_cli.models.bygpt5 import ByGPT5, ByGPT5Config
from marlin_cli.models.byt5_ids import FIRST_BYTE, bytes_with_sentinels, ids_of_bytes, ids_with_sentinels
from marlin_cli.models.byt5_steps import WatchedCache
from marlin_cli.models.decoding_shape import CachedStack, DecodingShape

Windows = npt.NDArray[np.uint8]  # [windows, window_bytes]


def ids_of(network: ByGPT5, windows: Windows) -> mx.array:
    """What the network reads of windows: the mark of a beginning where it leads every text, and then one byte less."""
    ids = windows.astype(np.int32) + FIRST_BYTE
    if network.config.starts_all:
        ids = np.pad(ids, ((0, 0), (1, 0)), constant_values=network.config.start_id)[:, :-1]
    return mx.array(ids)


def pass_through(network: ByGPT5, window: npt.NDArray[np.uint8], watch: Watch) -> None:
    """Run a window [bytes] through the network, whose caches only show what they would hold."""
    caches = [WatchedCache(watch, f"{block}.attention") for block in network.config.blocks]
    network(ids_of(network, window[None]), caches)


def start(network: ByGPT5, batch: Windows) -> State:
    """The state of windows before the first piece."""
    return {"rows": network.embedding(ids_of(network, batch))}


def pieces(network: ByGPT5) -> list[Piece]:
    """The blocks."""
    return [piece_of_block(block, partial(_run_block, index=index)) for index, block in enumerate(network.config.blocks)]


def logits(network: ByGPT5, batch: Windows) -> mx.array:
    """Logits [predictions, vocab] float32 of what follows every id."""
    found = network(ids_of(network, batch))
    return found.reshape(-1, found.shape[-1])


def rotation(config: ByGPT5Config) -> Rotation:
    """The stream of the decoder.

    Raises:
        QuantizationError: a head that is the embedding.
    """
    if config.tied_head:
        raise QuantizationError("a ByGPT5 with a tied head cannot be rotated: its embedding cannot take the last norm's gain")
    return Rotation(
        widths={"d_model": config.d_model},
        blocks=dict.fromkeys(config.blocks, config.head_dim),
        readers={"decoder.norm": ("output",)},
        rows=("embedding.weight",),
    )


def packed_keys(config: ByGPT5Config) -> PackedKeys:
    """Those of every layer."""
    return PackedKeys(tuple(f"{block}.attention" for block in config.blocks), config.heads, config.head_dim)


def stacks(config: ByGPT5Config) -> tuple[CachedStack, ...]:
    """The decoder, which keeps a row a byte."""
    return (CachedStack("decoder", config.layers, config.heads, config.heads, config.head_dim),)


def _run_block(network: ByGPT5, state: State, index: int) -> State:
    decoder = network.decoder
    return {**state, "rows": decoder.layers[index](state["rows"], decoder.relative_bias(), None)}


def ids_of_prompt(config: ByGPT5Config, prompt: bytes, sentinels: bool) -> list[int]:
    """An id a byte; with `sentinels`, `<extra_id_N>` stands for one id (the styles of fine-tuned models)."""
    return ids_with_sentinels(prompt, config.vocab_size) if sentinels else ids_of_bytes(prompt)


BYGPT5 = Architecture(
    name="bygpt5",
    title="ByGPT5",
    config=ByGPT5Config,
    network=ByGPT5,
    capability=Capability.CONTINUES,
    parts=frozenset({"decoder"}),
    pass_through=pass_through,
    start=start,
    pieces=pieces,
    logits=logits,
    rotation=rotation,
    packed_keys=packed_keys,
    decoding=DecodingShape(stacks),
    is_gated=lambda config: config.gated_ffn,
    overflows_in_float16=True,  # as a ByT5
    tuning=Tuning(share=0.05, parts=None),  # as a ByT5
    continuing=Continuing(
        Reading.BYTES,
        predictions=lambda network, windows: network.predictions(windows),
        ids=ids_of_prompt,
        ends=lambda config: config.ends,
        first_byte=FIRST_BYTE,
        sentinel=lambda value: bytes_with_sentinels([value]),
    ),
)
