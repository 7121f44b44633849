"""What calibration, packing, rotation and tuning ask of a MegaByte; see `models.architecture`."""

from collections.abc import Sequence
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
    Split,
    State,
    Watch,
    neighbour_with_same_input,
)
from marlin_cli.models.byte_ids import ends, ids_of_prompt_of
from marlin_cli.models.layers import inputs_by_layer, part_of
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.models.megabyte_decoding import MEGABYTE_DECODING
from marlin_cli.models.megabyte_layers import LayerCache
from marlin_cli.ops import attention, delay_one_row

Windows = npt.NDArray[np.uint8]  # [windows, window_bytes]


def rows_of_sequence(path: str, config: MegaByteConfig) -> int:
    """Rows of a sequence that the inputs of a linear layer are told apart by; 1 where all rows are alike."""
    part = part_of(path)
    if part in ("local", "head"):
        return config.stages[-1].length + (1 if config.layout == "megabyte_pytorch" else 0)
    if part == "middle":
        names = path.split(".")
        # The last token of a sequence is never embedded: it would only predict beyond the end.
        return config.stages[1 + int(names[1])].length - (1 if names[2] == "patch_projection" else 0)
    if path == "global_to_local" and config.layout == "paper":
        return config.patch_size  # a slice of the global state for each byte
    return 1


def pass_through(network: MegaByte, window: npt.NDArray[np.uint8], watch: Watch) -> None:
    """Run a window [bytes] through the network, whose caches only show what they would hold."""
    caches: list[list[LayerCache]] = []
    for name, stage in zip(stage_names(network.config), network.config.stages, strict=True):
        caches.append([_WatchedCache(watch, f"{name}.layers.{index}.attention") for index in range(stage.layers)])
    network(mx.array(window.astype(np.int32))[None], lambda n, rows: network.stages[n].stack(rows, caches[n]))


class _WatchedCache:
    """A `LayerCache` for one call, which shows what a real one would hold after it."""

    offset = 0

    def __init__(self, watch: Watch, path: str) -> None:
        self._watch, self._path = watch, path

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, window: int | None) -> mx.array:
        self._watch(self._path, keys, values)
        return attention(queries, keys, values, scale, window=window)

    def delay(self, slot: int, rows: mx.array) -> mx.array:
        return delay_one_row(rows)


def stage_names(config: MegaByteConfig) -> list[str]:
    """First words of the paths of the stages, coarse to fine."""
    return ["global", *(f"middle.{index}" for index in range(len(config.stages) - 2)), "local"]


def start(network: MegaByte, windows: Windows) -> State:
    """The state of windows before the first piece."""
    return {"ids": mx.array(windows.astype(np.int32))}


def pieces(network: MegaByte) -> list[Piece]:
    """Stage after stage, what leads to it and then its blocks."""
    sources = list(dict.fromkeys(inputs_by_layer(network, neighbour_with_same_input).values()))
    names = stage_names(network.config)
    found = []
    for number, name in enumerate(names):
        # What the stage before gives, and what reads the patches; the global stage's own stand outside of it.
        before = None if number == 0 else "global_to_local" if number == 1 else f"{names[number - 1]}.to_next"
        patches = "patch_projection" if number == 0 else f"{name}.patch_projection"
        leading = tuple(path for path in (before, patches) if path in sources)
        found.append(Piece(partial(_enter_stage, number=number), leading))
        for index in range(network.config.stages[number].layers):
            block = f"{name}.layers.{index}"
            within = tuple(source for source in sources if source.startswith(f"{block}."))
            adds = (f"{block}.attention.o_proj", f"{block}.ffn.down_proj")
            found.append(Piece(partial(_run_block, number=number, index=index), within, adds))
    return found


def logits(network: MegaByte, windows: Windows) -> mx.array:
    """Logits [bytes, vocab] float32 of every byte."""
    rows = network(mx.array(windows.astype(np.int32)))
    return rows.reshape(-1, rows.shape[-1])


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


def rotation(config: MegaByteConfig) -> Rotation:
    """The streams of the global and the local stage.

    Raises:
        QuantizationError: another layout than prefix, or another norm than rmsnorm.
    """
    if config.layout != "prefix" or config.norm != "rmsnorm":
        raise QuantizationError(
            f"only layout prefix with rmsnorm can be rotated; this model has {config.layout} with {config.norm}"
        )
    names: Sequence[str] = ("global", "local")
    return Rotation(
        widths={f"{name}_dim": stage.dim for name, stage in zip(names, config.stages, strict=True)},
        blocks={
            f"{name}.layers.{index}": stage.width_of_head
            for name, stage in zip(names, config.stages, strict=True)
            for index in range(stage.layers)
        },
        readers={"global.norm": ("global_to_local",), "local.norm": ("output",)},
        writers=("patch_projection", "global_to_local"),
        rows=(
            *(path for name in names for path in (f"{name}_start", f"{name}_positions.weight")),
            "local_byte_embedding.weight",
        ),
        halves=config.token_shift,
    )


def packed_keys(config: MegaByteConfig) -> PackedKeys:
    """Those of the global stage."""
    stage = config.stages[0]
    return PackedKeys(
        paths=tuple(f"global.layers.{index}.attention" for index in range(stage.layers)),
        heads=stage.kv_heads or stage.heads,
        head_dim=stage.width_of_head,
        rotated=stage.rope,
        interleaved=config.rope_interleaved,
    )


def shared_blocks(config: MegaByteConfig) -> list[str]:
    """The blocks of the global stage, which run once a patch: the sums of the others would come with every byte."""
    return [f"global.layers.{index}" for index in range(config.stages[0].layers)]


MEGABYTE = Architecture(
    name="megabyte",
    title="MegaByte",
    config=MegaByteConfig,
    network=MegaByte,
    capability=Capability.CONTINUES,
    parts=frozenset({"global", "middle", "local"}),
    pass_through=pass_through,
    start=start,
    pieces=pieces,
    logits=logits,
    rotation=rotation,
    packed_keys=packed_keys,
    is_gated=lambda config: config.ffn == "swiglu",
    unit_bytes=lambda config: config.patch_size,
    rows_of_sequence=rows_of_sequence,
    continuing=Continuing(Reading.PATCHES, lambda network, windows: network(windows), ids_of_prompt_of("MegaByte"), ends),
    decoding=MEGABYTE_DECODING,
    split=Split("global", shared_blocks, lambda config: (config.global_heads, config.global_kv_heads or config.global_heads)),
)
