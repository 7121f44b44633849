"""What calibration and packing ask of CANINE and LA-CANINE; see `models.architecture`. They read texts, padded or not."""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import mlx.core as mx

from marlin_cli.errors import QuantizationError
from marlin_cli.models.architecture import Architecture, Capability, PackedKeys, Piece, Rotation, State, Tuning, Watch
from marlin_cli.models.canine import Block, Canine, CanineConfig, CharacterShape
from marlin_cli.models.la_canine import LaCanine, LaCanineConfig
from marlin_cli.models.text_batch import TextBatch, alone

CharacterNetwork: TypeAlias = "Canine | LaCanine"

# Methods of a block, in their order -> layers whose inputs are measured, of which the last adds to the block's rows.
PARTS = {
    "attended": ("attention.q_proj", "attention.o_proj"),
    "fed": ("ffn.up_proj", "ffn.down_proj"),
    "adapted": ("adapter.down_proj", "adapter.up_proj"),
}

NEVER = -1e4  # the score of what is no candidate; it is finite, so that nothing times it is 0

ADDS = ("attention.o_proj", "ffn.down_proj", "adapter.up_proj")


def start(network: CharacterNetwork, batch: TextBatch) -> State:
    """The state of texts before the first piece."""
    state = {"rows": network.embedding(batch.ids, batch.types)}
    return _with_lengths(state, batch.lengths)


def pieces(network: CharacterNetwork) -> list[Piece]:
    """The first layer, the convolution down, the deep layers, the convolution back, and the last layer."""
    deep = [piece for index in range(network.config.layers) for piece in _block(network.layers[index], f"layers.{index}")]
    down, up = Piece(_run_down, ("local.down.conv",)), Piece(_run_up, ("local.up.conv",))
    first, last = _block(network.local.first, "local.first"), _block(network.local.last, "local.last")
    return [*first, Piece(_fold), down, *deep, Piece(_unfold), up, *last]


def _block(block: Block, path: str) -> list[Piece]:
    """The parts of a block, a norm after each: what a layer adds to is the rows that come into its part."""
    parts = [name for name in PARTS if name != "adapted" or "adapter" in block]
    layers = {part: tuple(f"{path}.{name}" for name in PARTS[part]) for part in parts}
    return [Piece(partial(_run_part, path=path, part=part), layers[part], layers[part][-1:]) for part in parts]


def _run_part(network: CharacterNetwork, state: State, path: str, part: str) -> State:
    name, _, last = path.partition(".")
    block = network.layers[int(last)] if name == "layers" else network.local[last]
    lengths = (state.get("lengths"),) if part == "attended" else ()
    return {**state, "rows": getattr(block, part)(state["rows"], *lengths)}


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
    """What the head predicts, as distributions [predictions, values] float32 before a softmax.

    A label of a text or character is one of its labels; of those that stand side by side, and of the end of a sentence,
    each is a yes or no; the beginning and the end of an answer are one of the characters, and a choice is one of the texts.

    Raises:
        QuantizationError: no head, or one of values, so that nothing is predicted.
    """
    head = network.config.head
    if head == "none":
        raise QuantizationError("this CANINE has no head and predicts nothing that could be measured; compare its states")
    if isinstance(network, LaCanine):
        return _yes_or_no(_real(network(batch.ids, batch.lengths), batch)[:, :1])
    scores = network(batch.ids, batch.lengths, batch.types)
    if head == "sequence" and network.config.problem == "regression":
        raise QuantizationError("this CANINE's head gives values, not probabilities that could be compared; compare its states")
    if head == "sequence":
        return _yes_or_no(scores) if network.config.problem == "several_labels" else scores
    if head == "choice":
        return scores.reshape(1, -1)
    if head == "token":
        return _real(scores, batch)
    if batch.lengths is not None:
        real = mx.arange(scores.shape[1]) < batch.lengths[:, None]
        scores = mx.where(real[..., None], scores, NEVER)
    return scores.swapaxes(1, 2).reshape(-1, scores.shape[1])


def _yes_or_no(scores: mx.array) -> mx.array:
    """Each score as that of one of two: [scores, 2]."""
    flat = scores.reshape(-1, 1)
    return mx.concatenate([mx.zeros_like(flat), flat], axis=-1)


def _real(rows: mx.array, batch: TextBatch) -> mx.array:
    """Rows [real characters, channels] of [texts, total, channels]."""
    if batch.lengths is None:
        return rows.reshape(-1, rows.shape[-1])
    counts: list[int] = batch.lengths.tolist()  # type: ignore[assignment]
    return mx.concatenate([row[:count] for row, count in zip(rows, counts, strict=True)])


def pass_through(network: CharacterNetwork, sample: bytes, watch: Watch) -> None:
    """Run a text through every layer, also where the head reads no states; nothing is cached.

    Raises:
        InputError: it is no UTF-8.
    """
    ids = alone(sample, network.config)
    if isinstance(network, LaCanine):
        network(ids)
        return
    deep = network.deep(ids)
    states = network.states(deep)
    if network.config.head_rows:
        network.output(network.pooled(deep) if network.config.scores_texts else states)


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
        parts=frozenset({"global", "local"}),
        pass_through=pass_through,
        start=start,
        pieces=pieces,
        logits=logits,
        rotation=rotation,
        packed_keys=packed_keys,
        is_gated=lambda config: False,
        norms_lead=False,
        unit_bytes=lambda config: int(config.downsample_factor),
        most_bytes=lambda config: config.longest - (2 if config.marks else 0),  # a character has one at least
        shows_states=True,
        tuning=Tuning(share=0.05, parts=None),  # as ByT5, whose encoder is the nearest relative
    )


CANINE = _architecture("canine", "CANINE", CanineConfig, Canine)
LA_CANINE = _architecture("la_canine", "LA-CANINE", LaCanineConfig, LaCanine)
