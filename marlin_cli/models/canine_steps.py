"""What calibration and packing ask of CANINE and LA-CANINE; see `models.architecture`. They read texts, padded or not."""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import mlx.core as mx

from marlin_cli.errors import QuantizationError
from marlin_cli.models.architecture import Architecture, Capability, PackedKeys, Piece, Rotation, State, Watch
from marlin_cli.models.canine import Block, Canine, CanineConfig, CharacterShape
from marlin_cli.models.la_canine import LaCanine, LaCanineConfig
from marlin_cli.models.text_batch import TextBatch, batch_of

CharacterNetwork: TypeAlias = "Canine | LaCanine"

# Layers of a block whose inputs are measured, in the order in which they come about; the last two where there are adapters.
SOURCES = ("attention.q_proj", "attention.o_proj", "ffn.up_proj", "ffn.down_proj", "adapter.down_proj", "adapter.up_proj")
ADDS = ("attention.o_proj", "ffn.down_proj", "adapter.up_proj")


def start(network: CharacterNetwork, batch: TextBatch) -> State:
    """The state of texts before the first piece."""
    state = {"rows": network.embedding(batch.ids, batch.types)}
    return _with_lengths(state, batch.lengths)


def pieces(network: CharacterNetwork) -> list[Piece]:
    """The first layer, the convolution down, the deep layers, the convolution back, and the last layer."""
    deep = [_block(network.layers[index], f"layers.{index}") for index in range(network.config.layers)]
    down, up = Piece(_run_down, ("local.down.conv",)), Piece(_run_up, ("local.up.conv",))
    first, last = _block(network.local.first, "local.first"), _block(network.local.last, "local.last")
    return [first, Piece(_fold), down, *deep, Piece(_unfold), up, last]


def _block(block: Block, path: str) -> Piece:
    count = len(SOURCES) if "adapter" in block else len(SOURCES) - 2
    adds = tuple(f"{path}.{name}" for name in ADDS[: 3 if "adapter" in block else 2])
    return Piece(partial(_run_block, path=path), tuple(f"{path}.{name}" for name in SOURCES[:count]), adds)


def _run_block(network: CharacterNetwork, state: State, path: str) -> State:
    name, _, last = path.partition(".")
    block = network.layers[int(last)] if name == "layers" else network.local[last]
    return {**state, "rows": block(state["rows"], state.get("lengths"))}


def _fold(network: CharacterNetwork, state: State) -> State:
    """From characters to what the convolution reads of each molecule; the characters are kept."""
    rows, lengths = state["rows"], state.get("lengths")
    after = {"rows": network.local.down.windows(rows), "characters": rows}
    if lengths is not None:
        after["character lengths"] = lengths
        lengths = -(-lengths // network.config.downsample_factor)
    return _with_lengths(after, lengths)


def _run_down(network: CharacterNetwork, state: State) -> State:
    molecules = network.molecules(state["characters"], network.local.down(state["rows"]))
    lengths = state.get("character lengths")
    counts = None if lengths is None else network.molecule_lengths(lengths, molecules.shape[1])
    return _with_lengths({**state, "rows": molecules}, counts)


def _unfold(network: CharacterNetwork, state: State) -> State:
    """From molecules to what the convolution back reads of each character."""
    characters = state["characters"]
    windows = network.local.up.windows(characters, network.repeated(state["rows"], characters.shape[1]))
    return _with_lengths({"rows": windows}, state.get("character lengths"))


def _run_up(network: CharacterNetwork, state: State) -> State:
    return {**state, "rows": network.local.up(state["rows"])}


def _with_lengths(state: State, lengths: mx.array | None) -> State:
    """The state with the real rows of each sequence told from filler."""
    if lengths is None:
        return state
    return {**state, "lengths": lengths, "real": mx.arange(state["rows"].shape[1]) < lengths[:, None]}


def logits(network: CharacterNetwork, batch: TextBatch) -> mx.array:
    """The head's scores [predictions, rows] float32, of texts or of their real characters.

    Raises:
        QuantizationError: no head, so that nothing is predicted.
    """
    if "output" not in network:
        raise QuantizationError("this CANINE has no head and predicts nothing that could be measured; compare its states")
    types = () if isinstance(network, LaCanine) else (batch.types,)
    scores = network(batch.ids, batch.lengths, *types)
    if scores.ndim == 3 and batch.lengths is not None:
        counts: list[int] = batch.lengths.tolist()  # type: ignore[assignment]
        return mx.concatenate([row[:count] for row, count in zip(scores, counts, strict=True)])
    return scores.reshape(-1, scores.shape[-1])


def pass_through(network: CharacterNetwork, sample: bytes, watch: Watch) -> None:
    """Run a text; nothing is cached.

    Raises:
        InputError: it is no UTF-8.
    """
    batch = batch_of([sample], network.config)
    network.encode(batch.ids, batch.lengths)


def rotation(config: CharacterShape) -> Rotation:
    """None.

    Raises:
        QuantizationError: always.
    """
    raise QuantizationError("CANINE cannot be rotated: its norms follow the sums, with a gain and a bias of each channel")


def packed_keys(config: CharacterShape) -> PackedKeys:
    """None: nothing is cached."""
    return PackedKeys((), config.heads, config.d_model // config.heads)


def _architecture(name: str, title: str, config: type, network: Callable[..., object]) -> Architecture:
    return Architecture(
        name=name,
        title=title,
        config=config,
        network=network,  # type: ignore[arg-type]
        capability=Capability.ENCODES,
        pass_through=pass_through,
        start=start,
        pieces=pieces,
        logits=logits,
        rotation=rotation,
        packed_keys=packed_keys,
        is_gated=lambda config: False,
        most_bytes=lambda config: config.longest - (2 if config.marks else 0),  # a character has one at least
        shows_states=True,
    )


CANINE = _architecture("canine", "CANINE", CanineConfig, Canine)
LA_CANINE = _architecture("la_canine", "LA-CANINE", LaCanineConfig, LaCanine)
