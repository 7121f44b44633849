"""What calibration, packing and decoding ask of a SpaceByte; see `models.architecture`."""

import dataclasses
from collections.abc import Callable
from functools import partial

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.errors import QuantizationError, UsageError
from marlin_cli.models.architecture import (
    Architecture,
    Capability,
    Continuing,
    PackedKeys,
    Piece,
    Reading,
    Rotation,
    State,
    Watch,
    piece_of_block,
)
from marlin_cli.models.decoding_shape import CachedStack, DecodingShape
from marlin_cli.models.layers import part_of
from marlin_cli.models.spacebyte import SpaceByte
from marlin_cli.models.spacebyte_config import SpaceByteConfig
from marlin_cli.models.spacebyte_patches import Before, patches_begun
from marlin_cli.models.unequal_patches import patches_of

Windows = npt.NDArray[np.uint8]  # [windows, window_bytes]


# Places in a patch by which inputs are told apart; the last stands for all that are more.
PLACES = 8


def ids_of(network: SpaceByte, windows: Windows) -> mx.array:
    """What the network reads of windows: the mark of a beginning, and then one byte less."""
    return network.led(mx.array(windows[:, :-1].astype(np.int32)))


def pass_through(network: SpaceByte, window: npt.NDArray[np.uint8], watch: Watch) -> None:
    """Run a window [bytes] through the network."""
    mx.eval(network(ids_of(network, window[None])))


def start(network: SpaceByte, batch: Windows) -> State:
    """The state of windows before the first piece."""
    ids = ids_of(network, batch)
    return {"rows": network.embedded(ids), "first": mx.array(network.begun(ids).first)}


def pieces(network: SpaceByte) -> list[Piece]:
    """The initial blocks, the patches, the global blocks, the sum with the bytes, the final blocks."""
    config = network.config

    def blocks(name: str, layers: int) -> list[Piece]:
        run = (partial(_run_block, stack=name, index=index) for index in range(layers))
        return [piece_of_block(f"{name}.layers.{index}", each) for index, each in enumerate(run)]

    return [
        *blocks("initial", config.initial_layers),
        Piece(_begin_patches),
        *blocks("global", config.global_layers),
        Piece(_add_patches),
        *blocks("final", config.final_layers),
    ]


def _run_block(network: SpaceByte, state: State, stack: str, index: int) -> State:
    return {**state, "rows": network[stack].layers[index](state["rows"])}


def _begin_patches(network: SpaceByte, state: State) -> State:
    places = patches_of(np.array(state["first"])).last
    numbers = mx.arange(places.shape[1])[None]
    counts = state["first"].astype(mx.int32).sum(axis=1, keepdims=True)
    rows = network.rows_of_patches(state["rows"], places, numbers)
    return {"rows": rows, "bytes": state["rows"], "first": state["first"], "real": numbers < counts}


def _add_patches(network: SpaceByte, state: State) -> State:
    return {"rows": network.with_patches(state["bytes"], state["rows"], state["first"]), "first": state["first"]}


def logits(network: SpaceByte, batch: Windows) -> mx.array:
    """Logits [predictions, vocab] float32 of every byte."""
    found = network.predictions(mx.array(batch.astype(np.int32)))
    return found.reshape(-1, found.shape[-1])


def rows_of_sequence(path: str, config: SpaceByteConfig) -> int:
    """Places in a patch; patches are all alike."""
    return 1 if part_of(path) == "global" else PLACES


def groups_of(network: SpaceByte, window: npt.NDArray[np.uint8]) -> Callable[[str], npt.NDArray[np.int64]]:
    """Which group each row of a layer's input is of: a byte by its place in its patch."""
    first = network.begun(ids_of(network, window[None])).first[0]
    rows = np.arange(len(first))
    of_bytes = np.minimum(rows - np.maximum.accumulate(np.where(first, rows, 0)), PLACES - 1)
    of_patches = np.zeros(int(first.sum()), np.int64)
    return lambda path: of_patches if part_of(path) == "global" else of_bytes


def rotation(config: SpaceByteConfig) -> Rotation:
    """None.

    Raises:
        QuantizationError: always.
    """
    raise QuantizationError(
        "a SpaceByte cannot be rotated: the rows of bytes are some channels of the rows of patches, and turned ones are others"
    )


def packed_keys(config: SpaceByteConfig) -> PackedKeys:
    """None: bytes keep a window, patches their own type."""
    return PackedKeys((), 1, config.global_stage.width_of_head)


def stacks(config: SpaceByteConfig) -> tuple[CachedStack, ...]:
    """The global blocks, which keep a row a patch; the others, which keep a window of bytes."""
    first, local = config.global_stage, config.local_stage
    window = config.ids if config.local_window is None else config.local_window + 1
    return (
        CachedStack(
            "patches", first.layers, first.heads, first.kv_heads or first.heads, first.width_of_head,
            row_bytes=config.patch_bytes, window=config.global_window,
        ),
        CachedStack("window", local.layers, local.heads, local.kv_heads or local.heads, local.width_of_head, window=window),
    )  # fmt: skip


def beside_bytes(config: SpaceByteConfig) -> int:
    """Windows, which are cut when they are twice as long."""
    local = stacks(config)[1]
    return 4 * 2 * local.layers * local.kv_heads * local.head_dim * 2 * min(config.ids, local.window or config.ids)


def part_bytes(config: SpaceByteConfig) -> dict[str, int]:
    """A patch passes the global part at once."""
    return {"global": config.patch_bytes}


def layer_bytes(path: str, config: SpaceByteConfig) -> int:
    """Bytes from one pass through a linear layer to the next."""
    return config.patch_bytes if part_of(path) == "global" else 1


def miniature_of(config: SpaceByteConfig) -> SpaceByteConfig:
    """The same model with patches of the mean length, and twice the context."""
    patches = 2 * config.max_patches
    return dataclasses.replace(config, patch_rule="periodic", max_patches=patches, max_bytes=patches * config.patch_bytes - 1)


def ids_of_prompt(config: SpaceByteConfig, prompt: bytes, sentinels: bool) -> bytes:
    """The bytes, which are the ids.

    Raises:
        UsageError: sentinels, of which there are none, or more patches than the model has room for.
    """
    if sentinels:
        raise UsageError("--sentinel: a SpaceByte knows none; leave it out")
    ids = np.concatenate([[config.start_id], np.frombuffer(prompt, np.uint8)]).astype(np.int64)[None]
    patches = int(patches_begun(ids, config, Before.nothing(1)).after.patches[0])
    if patches > config.max_patches:
        raise UsageError(
            f"the prompt has {patches:,} patches, that before it among them, the model room for {config.max_patches:,};"
            " shorten the prompt"
        )
    return prompt


SPACEBYTE = Architecture(
    name="spacebyte",
    title="SpaceByte",
    config=SpaceByteConfig,
    network=SpaceByte,
    capability=Capability.CONTINUES,
    parts=frozenset({"global", "local"}),
    pass_through=pass_through,
    start=start,
    pieces=pieces,
    logits=logits,
    rotation=rotation,
    packed_keys=packed_keys,
    is_gated=lambda config: False,
    rows_of_sequence=rows_of_sequence,
    groups_of=groups_of,
    decoding=DecodingShape(stacks, part_bytes, layer_bytes, miniature_of, True, beside_bytes),
    continuing=Continuing(
        Reading.BEGUN_PATCHES,
        predictions=lambda network, windows: network.predictions(windows),
        ids=ids_of_prompt,
        ends=lambda config: (config.start_id, *range(256, config.vocab_size)),
    ),
)
