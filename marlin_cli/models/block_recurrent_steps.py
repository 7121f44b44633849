"""What calibration, packing and decoding ask of a Block-Recurrent Transformer; see `models.architecture`."""

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
    neighbour_with_same_input,
)
from marlin_cli.models.block_recurrent import BlockRecurrent
from marlin_cli.models.block_recurrent_config import BlockRecurrentConfig
from marlin_cli.models.byte_ids import ends, ids_of_prompt_of
from marlin_cli.models.decoding_shape import CachedStack, DecodingShape

Windows = npt.NDArray[np.uint8]  # [windows, window_bytes]

# Layers of a block whose inputs are measured, in the order in which they come about; between them those of its states.
OF_ATTENTION = ("attention.q_proj",)
OF_STATES = ("q_proj", "out_proj", "update_proj")
# Of meliad's equations, by how states are updated.
OF_MELIAD_STATES = {
    "dual": ("q_proj", "out_proj", "ffn.up_proj", "ffn.down_proj"),
    "single": ("q_proj", "ffn.up_proj", "ffn.down_proj"),
    "skip": ("q_proj", "out_proj"),
}
# Gates read what the layer of the update reads that they share out.
INPUT_OF_GATE = {"gate": "out_proj", "ffn_gate": "ffn.down_proj"}
OF_BLOCK = ("attention.o_proj", "ffn.up_proj", "ffn.down_proj")


def ids_of(windows: Windows) -> mx.array:
    """The bytes, which are the ids."""
    return mx.array(windows.astype(np.int32))


def pass_through(network: BlockRecurrent, window: npt.NDArray[np.uint8], watch: Watch) -> None:
    """Run a window [bytes] through the network."""
    network(ids_of(window[None]))


def start(network: BlockRecurrent, batch: Windows) -> State:
    """The state of windows before the first piece."""
    return {"rows": network.embedding(ids_of(batch))}


def pieces(network: BlockRecurrent) -> list[Piece]:
    """The layers: states and memories stay within one, so that all blocks pass it before the next."""
    found, config = [], network.config
    sources = OF_STATES if config.state_update is None else OF_MELIAD_STATES[config.state_update]
    for index, block in enumerate(config.blocks):
        number = config.states_of(index)
        states = () if number is None else tuple(f"states.{number}.{source}" for source in sources)
        found.append(
            Piece(
                partial(_run_layer, index=index),
                (
                    *(f"{block}.{source}" for source in OF_ATTENTION),
                    *states,
                    *(f"{block}.{source}" for source in OF_BLOCK),
                ),
                (f"{block}.attention.o_proj", f"{block}.ffn.down_proj"),
            )
        )
    return found


def _run_layer(network: BlockRecurrent, state: State, index: int) -> State:
    return {**state, "rows": network.run_layer(index, state["rows"], network.layer_memory())}


def logits(network: BlockRecurrent, batch: Windows) -> mx.array:
    """Logits [predictions, vocab] float32 of what follows every id."""
    found = network(ids_of(batch))
    return found.reshape(-1, found.shape[-1])


def input_of(path: str) -> str:
    """The layer in whose name a layer's input is measured: queries, keys and values, of states too, read the same rows."""
    parent, _, name = path.rpartition(".")
    states, _, gate = parent.rpartition(".")
    if gate in INPUT_OF_GATE:
        return f"{states}.{INPUT_OF_GATE[gate]}"
    return f"{parent}.q_proj" if name in ("state_q_proj", "block_q_proj") else neighbour_with_same_input(path)


def rotation(config: BlockRecurrentConfig) -> Rotation:
    """None.

    Raises:
        QuantizationError: always.
    """
    why = "its norms subtract the mean" if config.equations == "lucidrains" else "its gates share out channel by channel"
    raise QuantizationError(f"a Block-Recurrent Transformer cannot be rotated: {why}, which turned channels do not have")


def packed_keys(config: BlockRecurrentConfig) -> PackedKeys:
    """None: what it remembers does not grow."""
    return PackedKeys((), 1, config.head_dim)


def stacks(config: BlockRecurrentConfig) -> tuple[CachedStack, ...]:
    """The layers, which keep two blocks at most; and the states, which are read like keys and values."""
    return (
        CachedStack(
            "memory", config.layers, config.heads, config.kv_heads, config.head_dim,
            kept=partial(rows_kept, config), cycle=config.block_bytes,
        ),
        CachedStack(
            "states", len(config.recurrent_layers), config.heads, config.kv_heads, config.head_dim,
            sequence_rows=config.state_vectors,
        ),
    )  # fmt: skip


def rows_kept(config: BlockRecurrentConfig, rows: int) -> int:
    """Rows of the block before and of the open one; by meliad's equations there is a block of zeros before the first."""
    most = config.block_bytes + (rows - 1) % config.block_bytes + 1 if rows else config.block_bytes
    return most if config.equations == "meliad" else min(rows, most)


def beside_bytes(config: BlockRecurrentConfig) -> int:
    """The open block's keys as they came, where they are turned; states as they are and as they are read."""
    keys = config.layers * config.block_bytes * config.head_dim if config.equations == "lucidrains" else 0
    width = config.d_model + config.kv_heads * config.head_dim
    return 4 * (keys + len(config.recurrent_layers) * config.state_vectors * 2 * width)


def open_bytes(config: BlockRecurrentConfig) -> int:
    """The keys of half a block as they came, and states."""
    half = 2 * config.layers * config.block_bytes * config.head_dim
    return beside_bytes(config) - (half if config.equations == "lucidrains" else 0)


def part_bytes(config: BlockRecurrentConfig) -> dict[str, int]:
    """What writes states is read once in a block; as it passes all of them then, its products are about a row a byte."""
    return {"states": config.block_bytes}


BLOCK_RECURRENT = Architecture(
    name="block_recurrent",
    title="Block-Recurrent Transformer",
    config=BlockRecurrentConfig,
    network=BlockRecurrent,
    capability=Capability.CONTINUES,
    parts=frozenset({"global", "states"}),
    pass_through=pass_through,
    start=start,
    pieces=pieces,
    logits=logits,
    rotation=rotation,
    packed_keys=packed_keys,
    is_gated=lambda config: config.equations == "lucidrains",
    input_of=input_of,
    decoding=DecodingShape(
        stacks,
        part_bytes,
        beside_bytes=beside_bytes,
        miniature=lambda config: config,
        by_operations=True,
        open_bytes=open_bytes,
        stored_rows=lambda rows: rows,
    ),  # fmt: skip
    tuning=Tuning(parts=None),
    continuing=Continuing(
        Reading.BLOCKS,
        predictions=lambda network, windows: network.predictions(windows),
        ids=ids_of_prompt_of("Block-Recurrent Transformer"),
        ends=ends,
    ),
)
