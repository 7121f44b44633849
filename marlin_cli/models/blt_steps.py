"""What calibration, packing and decoding ask of a Byte Latent Transformer; see `models.architecture`."""

from collections.abc import Callable
from dataclasses import replace
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
    Tuning,
    Watch,
    neighbour_with_same_input,
    piece_of_block,
)
from marlin_cli.models.blt import Blt, seen_of
from marlin_cli.models.blt_config import FIRST_BYTE, BltConfig
from marlin_cli.models.decoding_shape import CachedStack, DecodingShape
from marlin_cli.models.unequal_patches import Patches, patches_of

Windows = npt.NDArray[np.uint8]  # [windows, window_bytes]

# Layers of an attention between patches and bytes whose inputs are measured, in the order in which they come about.
OF_READER = ("q_proj", "k_proj", "o_proj")

# Bytes of a patch, on average, by which costs count: what the released models' threshold was chosen for.
PATCH_BYTES = 4

# Places in a patch, and lengths of patches, by which inputs are told apart; the last stands for all that are more.
PLACES = 8


def ids_of(network: Blt, windows: Windows) -> mx.array:
    """What the network reads of windows: the mark of a beginning, and then one byte less."""
    return network.led(mx.array(windows[:, :-1].astype(np.int32) + FIRST_BYTE))


def pass_through(network: Blt, window: npt.NDArray[np.uint8], watch: Watch) -> None:
    """Run a window [bytes] through the network."""
    mx.eval(network(ids_of(network, window[None])))


def start(network: Blt, batch: Windows) -> State:
    """The state of windows before the first piece."""
    ids = ids_of(network, batch)
    return {"rows": network.patcher.embedding(ids), "ids": ids}


def pieces(network: Blt) -> list[Piece]:
    """The patcher; the encoder, and the patches that it makes; the global transformer; the decoder."""
    config = network.config
    stacks = {
        path: [
            piece_of_block(f"{path}.layers.{index}", partial(_run_block, path=path, index=index))
            for index in range(stack.layers)
        ]
        for path, stack in config.stacks.items()
    }
    readers = [
        Piece(partial(_run_reader, index=index), tuple(f"byte_decoder.readers.{index}.{source}" for source in OF_READER))
        for index in range(config.decoder_readers)
    ]
    decoder = [each for pair in zip(readers, stacks["byte_decoder"], strict=False) for each in pair]
    return [
        *stacks["patcher"],
        Piece(_end_patches, ("patcher.output",)),
        *stacks["byte_encoder"],
        Piece(_make_patches, ("byte_encoder.patch_proj", *(f"byte_encoder.reader.{source}" for source in OF_READER))),
        *([Piece(_widen, ("patches.input_proj",))] if "input_proj" in network.patches else []),
        *stacks["patches"],
        Piece(_begin_decoder, ("byte_decoder.patch_proj",)),
        *decoder,
        *stacks["byte_decoder"][len(readers) :],
    ]


def _run_block(network: Blt, state: State, path: str, index: int) -> State:
    return {**state, "rows": network[path].layers[index](state["rows"], None)}


def _end_patches(network: Blt, state: State) -> State:
    """From the patcher to the encoder: where patches end, which every later piece counts by."""
    ends = network.ends(network.patcher.entropies(state["rows"]))
    return {"rows": network.embedded(state["ids"]), "ends": mx.array(ends)}


def _patches(state: State) -> Patches:
    return patches_of(np.array(state["ends"]))


def _make_patches(network: Blt, state: State) -> State:
    patches = _patches(state)
    vectors = network.byte_encoder.patches(state["rows"], patches)
    counts = state["ends"].astype(mx.int32).sum(axis=1, keepdims=True)
    return {"rows": vectors, "bytes": state["rows"], "ends": state["ends"], "real": mx.arange(patches.count)[None] < counts}


def _widen(network: Blt, state: State) -> State:
    return {**state, "rows": network.patches.rows(state["rows"])}


def _begin_decoder(network: Blt, state: State) -> State:
    return {"rows": state["bytes"], "read": network.byte_decoder.rows_of(state["rows"]), "ends": state["ends"]}


def _run_reader(network: Blt, state: State, index: int) -> State:
    reader = network.byte_decoder.readers[index]
    return {**state, "rows": reader.of_bytes(state["rows"], reader.keys(state["read"]), seen_of(_patches(state)))}


def logits(network: Blt, batch: Windows) -> mx.array:
    """Logits [predictions, vocab] float32 of what follows every id."""
    found = network(ids_of(network, batch))
    return found.reshape(-1, found.shape[-1])


def input_of(path: str) -> str:
    """The layer in whose name a layer's input is measured: what asks a reader has other rows than what it reads."""
    parent, _, name = path.rpartition(".")
    if parent.endswith(".reader") or ".readers." in parent:
        return f"{parent}.k_proj" if name == "v_proj" else path
    return neighbour_with_same_input(path)


def of_patches(path: str) -> bool:
    """Does a layer read rows of patches, not of bytes?"""
    return (
        path.startswith("patches.")
        or path.endswith(".patch_proj")
        or path in ("byte_encoder.reader.q_proj", "byte_encoder.reader.o_proj")
        or (".readers." in path and path.endswith((".k_proj", ".v_proj")))
    )


def groups_of(network: Blt, window: npt.NDArray[np.uint8]) -> Callable[[str], npt.NDArray[np.int64]]:
    """Which group each row of a layer's input is of: a byte by its place in its patch, a patch by its length."""
    ends = network.ends(network.patcher(ids_of(network, window[None])))
    patches = patches_of(ends)
    lengths = np.diff(np.array(patches.last)[0], prepend=-1)
    begins = np.concatenate([[0], np.cumsum(lengths)])
    of_bytes = np.minimum(np.arange(ends.shape[1]) - begins[np.array(patches.own)[0]], PLACES - 1)
    of_lengths = np.minimum(lengths, PLACES) - 1
    of_rows = np.repeat(of_lengths, network.config.patch_rows)

    def placed(path: str) -> npt.NDArray[np.int64]:
        several = ".reader" in path and of_patches(path)  # rows that ask, or are asked
        found: npt.NDArray[np.int64] = of_rows if several else of_lengths if of_patches(path) else of_bytes
        return found

    return placed


def rotation(config: BltConfig) -> Rotation:
    """None.

    Raises:
        QuantizationError: always.
    """
    raise QuantizationError(
        "a Byte Latent Transformer cannot be rotated: a patch takes the largest of its bytes in each channel, and turned"
        " channels have other ones"
    )


def packed_keys(config: BltConfig) -> PackedKeys:
    """None: bytes keep a window, patches their own type."""
    return PackedKeys((), 1, config.patches.head_dim)


def stacks(config: BltConfig) -> tuple[CachedStack, ...]:
    """The global transformer, which keeps a row a patch; the others, which keep a window of bytes."""
    windows = {"patcher": config.patcher_window, "byte_encoder": config.local_window, "byte_decoder": config.local_window}
    own = config.patches
    return (
        CachedStack("global", own.layers, own.heads, own.heads, own.head_dim, row_bytes=PATCH_BYTES),
        *(
            CachedStack("window", each.layers, each.heads, each.heads, each.head_dim, window=windows[path] or config.max_bytes)
            for path, each in config.stacks.items()
            if path in windows
        ),
    )


def part_bytes(config: BltConfig) -> dict[str, int]:
    """A patch passes the global transformer at once."""
    return {"global": PATCH_BYTES}


def layer_bytes(path: str, config: BltConfig) -> int:
    """Bytes from one pass through a linear layer to the next."""
    return PATCH_BYTES if of_patches(path) else 1


def miniature_of(config: BltConfig) -> BltConfig:
    """The same model with patches of the mean length, small tables and twice the context."""
    return replace(
        config,
        threshold=1e6,  # above every entropy
        max_patch_bytes=PATCH_BYTES,
        hash_buckets=min(config.hash_buckets, 1024),
        max_bytes=min(2 * config.max_bytes, 1 << 30),
    )


def beside_bytes(config: BltConfig) -> int:
    """Windows, which are cut when they are twice as long, and the rows of the open patch."""
    rows = sum(2 * stack.layers * stack.heads * stack.head_dim * 2 * (stack.window or 0) for stack in stacks(config)[1:])
    return 4 * (rows + config.encoder.d_model * (config.local_window or config.max_bytes))


def ids_of_prompt(config: BltConfig, prompt: bytes, sentinels: bool) -> list[int]:
    """An id a byte.

    Raises:
        UsageError: sentinels, of which there are none.
    """
    if sentinels:
        raise UsageError("--sentinel: a Byte Latent Transformer knows none; leave it out")
    return [value + FIRST_BYTE for value in prompt]


BLT = Architecture(
    name="blt",
    title="Byte Latent Transformer",
    config=BltConfig,
    network=Blt,
    capability=Capability.CONTINUES,
    parts=frozenset({"hash", "patcher", "encoder", "global", "decoder"}),
    pass_through=pass_through,
    start=start,
    pieces=pieces,
    logits=logits,
    rotation=rotation,
    packed_keys=packed_keys,
    is_gated=lambda config: True,
    input_of=input_of,
    rows_of_sequence=lambda path, config: PLACES,
    groups_of=groups_of,
    overflows_in_float16=True,  # trained in bfloat16
    looked_up=frozenset({"hash_embedding"}),
    decoding=DecodingShape(stacks, part_bytes, layer_bytes, miniature_of, True, beside_bytes),
    tuning=Tuning(parts=("encoder", "global", "decoder", "head")),  # where patches end has no slope
    continuing=Continuing(
        Reading.LATENT_PATCHES,
        predictions=lambda network, windows: network.predictions(windows),
        ids=ids_of_prompt,
        ends=lambda config: config.end_ids,
        first_byte=FIRST_BYTE,
    ),
)
