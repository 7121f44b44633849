"""What calibration, packing, rotation and decoding ask of an EvaByte; see `models.architecture`. It reads windows of bytes."""

import dataclasses
from functools import partial

import mlx.core as mx
import numpy as np
import numpy.typing as npt

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
    neighbour_with_same_input,
    piece_of_block,
)
from marlin_cli.models.decoding_shape import CachedStack, DecodingShape
from marlin_cli.models.evabyte import Attention, EvaByte, EvaByteConfig
from marlin_cli.models.evabyte_ids import FIRST_BYTE, bytes_of_mark, chat, ids_of_bytes, ids_with_marks

Windows = npt.NDArray[np.uint8]  # [windows, window_bytes]


class Watched:
    """A `models.evabyte.WindowMemory` that is empty, and shows what one would hold of the exact rows."""

    offset = 0

    def __init__(self, watch: Watch, path: str) -> None:
        self._watch, self._path = watch, path

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, by: Attention) -> mx.array:
        self._watch(self._path, keys, values)
        return by.over_windows(queries, keys, values)


def ids_of(network: EvaByte, windows: Windows) -> mx.array:
    """What the network reads of windows: the mark of a beginning, and then one byte less."""
    return network.led(mx.array(windows[:, :-1].astype(np.int32) + FIRST_BYTE))


def pass_through(network: EvaByte, window: npt.NDArray[np.uint8], watch: Watch) -> None:
    """Run a window [bytes] through the network, whose memories only show what they would hold."""
    network(ids_of(network, window[None]), [Watched(watch, f"{block}.attention") for block in network.config.blocks])


def start(network: EvaByte, batch: Windows) -> State:
    """The state of windows before the first piece."""
    return {"rows": network.embedding(ids_of(network, batch))}


def pieces(network: EvaByte) -> list[Piece]:
    """The blocks."""
    return [piece_of_block(block, partial(_run_block, index=index)) for index, block in enumerate(network.config.blocks)]


def _run_block(network: EvaByte, state: State, index: int) -> State:
    return {**state, "rows": network.layers[index](state["rows"], None)}


def logits(network: EvaByte, batch: Windows) -> mx.array:
    """Logits [predictions, vocab] float32 of what follows every id."""
    found = network(ids_of(network, batch))
    return found.reshape(-1, found.shape[-1])


def input_of(path: str) -> str:
    """The layer in whose name a layer's input is measured: all prediction heads read the same rows."""
    return "output" if path == "drafts" else neighbour_with_same_input(path)


def rotation(config: EvaByteConfig) -> Rotation:
    """The stream of the blocks. Chunks weigh keys, which no stream's rotation turns, and add values, which are linear."""
    heads = ("output", "drafts") if config.prediction_heads > 1 else ("output",)
    return Rotation(
        widths={"d_model": config.d_model},
        blocks=dict.fromkeys(config.blocks, config.head_dim),
        readers={"norm": heads},
        rows=("embedding.weight",),
    )


def packed_keys(config: EvaByteConfig) -> PackedKeys:
    """Those of every layer, of the open window and of chunks."""
    paths = tuple(f"{block}.attention" for block in config.blocks)
    return PackedKeys(paths, config.heads, config.head_dim, rotated=True, queries_alone=False)


def rows_kept(config: EvaByteConfig, rows: int) -> int:
    """Of a context the rows that its last byte reads: its window, and the chunks of those before it."""
    before = max(rows - 1, 0) // config.window_bytes * config.window_bytes
    return rows - before + before // config.chunk_bytes


def stacks(config: EvaByteConfig) -> tuple[CachedStack, ...]:
    """The blocks, which keep a window and chunks."""
    kept, heads, cycle = partial(rows_kept, config), config.heads, config.window_bytes
    return (CachedStack("window", config.layers, heads, heads, config.head_dim, kept=kept, cycle=cycle),)


def beside_bytes(config: EvaByteConfig) -> int:
    """The rows of the open window's chunks, and of the open chunk as they came."""
    rows = config.window_bytes // config.chunk_bytes + config.chunk_bytes
    return 4 * 2 * config.layers * config.d_model * rows


def miniature_of(config: EvaByteConfig) -> EvaByteConfig:
    """The same model with a little more context."""
    return dataclasses.replace(config, max_bytes=config.max_bytes + 2)


def ids_of_prompt(config: EvaByteConfig, prompt: bytes, sentinels: bool) -> list[int]:
    """An id a byte; with `sentinels`, names of marks stand for one id each (chats of the tuned model)."""
    return ids_with_marks(prompt) if sentinels else ids_of_bytes(prompt)


EVABYTE = Architecture(
    name="evabyte",
    title="EvaByte",
    config=EvaByteConfig,
    network=EvaByte,
    capability=Capability.CONTINUES,
    parts=frozenset({"global"}),
    pass_through=pass_through,
    start=start,
    pieces=pieces,
    logits=logits,
    rotation=rotation,
    packed_keys=packed_keys,
    is_gated=lambda config: True,
    input_of=input_of,
    overflows_in_float16=True,  # trained in bfloat16
    decoding=DecodingShape(
        stacks,
        beside_bytes=beside_bytes,
        miniature=miniature_of,
        by_operations=True,
        open_bytes=lambda config: beside_bytes(config) // 2,
    ),  # fmt: skip
    tuning=Tuning(parts=None),
    continuing=Continuing(
        Reading.WINDOWS,
        predictions=lambda network, windows: network.predictions(windows),
        ids=ids_of_prompt,
        ends=lambda config: config.end_ids,
        first_byte=FIRST_BYTE,
        sentinel=bytes_of_mark,
        chat=lambda said: chat([("user", said)]),
    ),
)
