"""What an architecture is to the rest of the house: its classes, what its networks can do, and what each step asks of it.

Calibration, packing, rotation, tuning and measuring know no architecture: what they need is data or a function here,
which stands with the network. Adding one is a file with an `Architecture` in it, and a line in `models.ARCHITECTURES`.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.models.decoding_shape import DecodingShape


class Network(Protocol):
    """What every network is: an MLX module that knows its configuration, with `model_type` in it."""

    config: Any

    def parameters(self) -> dict[str, Any]:
        """The arrays, as a tree."""

    def named_modules(self) -> list[tuple[str, Any]]:
        """The modules with their paths, the inner ones first."""

    def load_weights(self, weights: list[tuple[str, mx.array]], strict: bool = True) -> Any:
        """Take arrays by path."""

    def update(self, parameters: dict[str, Any]) -> Any:
        """Take arrays as a tree, all of them or some."""

    def eval(self) -> Any:
        """Not training."""


class Capability(str, Enum):
    """What a network does with bytes; commands ask for one of these."""

    CONTINUES = "continues"  # bytes: predicts the next one
    ANSWERS = "answers"  # an input, or where it has no decoder encodes it
    ENCODES = "encodes"  # a text: states, vectors, labels


class Reading(str, Enum):
    """What a network that continues bytes takes at a step; `engine.continuation` has a way of decoding for each."""

    PATCHES = "patches"  # of bytes, in stages: a `models.megabyte.MegaByte`
    BYTES = "bytes"  # one after the other: an `engine.byte_decoding.ByteReader`
    BLOCKS = "blocks"  # the same, with a memory that blocks of bytes hand on: an `engine.block_decoding.MemoryReader`
    LATENT_PATCHES = "latent_patches"  # bytes one after the other, of patches that end where it says: a `models.blt.Blt`
    BEGUN_PATCHES = "begun_patches"  # the same, of patches that begin where bytes say: a `models.spacebyte.SpaceByte`
    WINDOWS = "windows"  # the same, with a memory of a window and of chunks before it: a `models.evabyte.EvaByte`


@dataclass(frozen=True)
class Continuing:
    """How networks continue bytes: what decoding and scoring ask of them.

    Attributes:
        predictions: (network, windows of bytes [n, length]) -> logits [n, length, vocab] float32, of which row i is of byte
            i given those before it. Byte b has column first_byte + b.
        ids: (config, prompt, sentinels) -> what the network reads of a prompt, an id a byte; with `sentinels`, texts that
            stand for other ids are read as these.
        ends: (config) -> ids that end a text.
        first_byte: id of the byte 0.
        sentinel: (id) -> the text that stands for an id that is neither a byte nor an end.
        chat: (what a user says) -> the chat in which it stands, up to the answer, to be read with `sentinels`; None where
            there is no form of chats.
    """

    reading: Reading
    predictions: Callable[[Any, mx.array], mx.array]
    ids: Callable[[Any, bytes, bool], Sequence[int]]
    ends: Callable[[Any], Container[int]]
    first_byte: int = 0
    sentinel: Callable[[int], bytes] = lambda value: b""
    chat: Callable[[bytes], bytes] | None = None


# What a batch has become so far, by name. `rows` [.., channels] is what the next block reads; `real`, where there is
# filler, says which of the rows before their last axis are none.
State = dict[str, mx.array]


@dataclass(frozen=True)
class Piece:
    """What a batch passes at once: a block, or what leads to one.

    Attributes:
        run: (network, state of a batch) -> its state after the piece. The state that is given is not changed.
        sources: the inputs of the piece's linear layers in the order in which they come about, by `shared_inputs`.
        adds: layers of a block whose outputs are added to its rows, in that order.
    """

    run: Callable[[Any, State], State]
    sources: tuple[str, ...] = ()
    adds: tuple[str, ...] = ()


# Layers of a block whose inputs are measured, in the order in which they come about.
SOURCES_OF_BLOCK = ("attention.q_proj", "attention.o_proj", "ffn.up_proj", "ffn.down_proj")


def piece_of_block(path: str, run: Callable[[Any, State], State]) -> Piece:
    """The piece of the block at `path`: an attention and a feed-forward, each added to the rows."""
    sources = tuple(f"{path}.{source}" for source in SOURCES_OF_BLOCK)
    return Piece(run, sources, (f"{path}.attention.o_proj", f"{path}.ffn.down_proj"))


@dataclass(frozen=True)
class PackedKeys:
    """The attentions whose keys a cache of few bits holds, all of one shape.

    Attributes:
        rotated: do positions rotate channels, in pairs of the two halves of a head (interleaved: of neighbours)?
        queries_alone: do queries alone read keys, so that both can be scaled against each other?
    """

    paths: tuple[str, ...]
    heads: int
    head_dim: int
    rotated: bool = False
    interleaved: bool = False
    queries_alone: bool = True


@dataclass(frozen=True)
class Rotation:
    """The residual streams of a network, for turning their channels: what writes to them and what reads them.

    Attributes:
        widths: of the streams, by the names of their fields; blocks of channels divide them.
        blocks: path -> width of a head.
        readers: norm -> layers that read its output, beside those of the blocks.
        writers: layers whose outputs are a stream, beside those of the blocks.
        rows: arrays [.., channels] that are a stream: embeddings, positions, start vectors.
        halves: may half of a row's channels come from another row (token shift)?
    """

    widths: Mapping[str, int]
    blocks: Mapping[str, int]
    readers: Mapping[str, tuple[str, ...]]
    writers: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    halves: bool = False


@dataclass(frozen=True)
class Tuning:
    """How distillation treats an architecture.

    Attributes:
        share: how long its steps are, in parts of the usual ones.
        parts: what is tuned, see `models.part_of`; None: all.
    """

    share: float = 1.0
    parts: tuple[str, ...] | None = ("local", "head")


@dataclass(frozen=True)
class Split:
    """The blocks that ranks may share (`models.splitting`): each has an `attention` and an `ffn`, named as everywhere.

    Attributes:
        part: their part of the model, see `models.part_of`.
        blocks: (config) -> their paths.
        heads: (config) -> heads of the queries, and of the keys and values.
        by_head: weights whose last axis counts the heads.
    """

    part: str
    blocks: Callable[[Any], Sequence[str]]
    heads: Callable[[Any], tuple[int, int]]
    by_head: tuple[str, ...] = ()


# A layer whose input is that of its neighbour, which is measured in its place.
SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "gate_proj": "up_proj"}


def neighbour_with_same_input(path: str) -> str:
    """The layer in whose name the input of the layer `path` is measured."""
    parent, _, name = path.rpartition(".")
    return f"{parent}.{SAME_INPUT[name]}" if name in SAME_INPUT else path


def _all_alike(path: str, config: Any) -> int:
    return 1


# (path of an attention, keys, values), both [batch, heads, rows, head_dim].
Watch = Callable[[str, mx.array, mx.array], None]


@dataclass(frozen=True)
class Architecture:
    """An architecture; what a batch is (windows of bytes, or pairs), follows from its capability.

    Attributes:
        name: the `model_type` of config.json.
        title: what messages call it.
        capability: what its networks do with bytes.
        parts: those that layers may belong to, beside the head; see `models.part_of`.
        pass_through: (network, sample, watch) runs the network on one sample (a window [bytes], or an input and its answer)
            from an empty context, and shows what caches would hold; nothing needs to be evaluated.
        start: (network, batch) -> the state that the first piece takes.
        pieces: (network) -> its pieces in the order in which a batch passes them.
        logits: (network, batch) -> [predictions, vocab] float32, without those of filler; it can be differentiated.
        rotation: (config) -> its streams; raises `QuantizationError` where they cannot be turned.
        packed_keys: (config) -> the attentions that `--kv-bits` is about.
        is_gated: (config) -> do the feed-forwards multiply two layers' outputs?
        norms_lead: do the norms of a block stand before its layers, which alone read them? Else they follow a sum.
        unit_bytes: (config) -> bytes that pass together, of a text characters; less of them is no sample. Of what
            continues bytes a sample is cut to a multiple of it.
        most_bytes: (config) -> bytes that the network takes at once, whatever they are.
        input_of: (path of a layer) -> path of the layer in whose name its input is measured.
        rows_of_sequence: (path of a layer, config) -> rows that its inputs are told apart by; 1 where all are alike.
        groups_of: (network, sample) -> (path of a layer) -> which of its `rows_of_sequence` each row of its input counts with,
            in the order in which they come; None where rows follow each other in sequences of so many.
        decoding: what decoding is made of, by shape; None where its costs and times are not known.
        shows_states: does the network hand out rows of its stream, which a rotation changes?
        overflows_in_float16: are activations too large for it? Where a device leaves the type open, it is bfloat16 then.
        tuning: how distillation treats it.
        continuing: how its networks continue bytes, where that is what they do.
        split: what ranks may share of one; None where each holds all of it.
        looked_up: tables of which single rows are read, and so many that they keep the type in which they are stored.
    """

    name: str
    title: str
    config: type[Any]
    network: type[Any]
    capability: Capability
    parts: frozenset[str]
    pass_through: Callable[[Any, Any, Watch], None]
    start: Callable[[Any, Any], State]
    pieces: Callable[[Any], list[Piece]]
    logits: Callable[[Any, Any], mx.array]
    rotation: Callable[[Any], Rotation]
    packed_keys: Callable[[Any], PackedKeys]
    is_gated: Callable[[Any], bool]
    norms_lead: bool = True
    unit_bytes: Callable[[Any], int] = lambda config: 1
    most_bytes: Callable[[Any], int] = lambda config: int(config.max_bytes)
    input_of: Callable[[str], str] = neighbour_with_same_input
    rows_of_sequence: Callable[[str, Any], int] = _all_alike
    groups_of: Callable[[Any, Any], Callable[[str], npt.NDArray[np.int64]]] | None = None
    decoding: DecodingShape | None = None
    shows_states: bool = False
    overflows_in_float16: bool = False
    tuning: Tuning = field(default_factory=Tuning)
    continuing: Continuing | None = None
    split: Split | None = None
    looked_up: frozenset[str] = frozenset()
