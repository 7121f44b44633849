"""ByT5's decoder step as one compiled graph of fused parts: what the host asks of Metal. One answer to each input.

As in `compiled_patches` the last rows of each layer's own cache are in tails that a step copies, and those before them are in
storage that is longer than its rows, so that the graph stays the same from step to step.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from marlin_cli.engine.cache import Rows
from marlin_cli.engine.fused_byt5 import SELF_CACHE_ROWS
from marlin_cli.models.byt5 import ByT5, Decoder, DecoderBlock
from marlin_cli.ops import Linear, step
from marlin_cli.ops.few_rows import Norm, Place, Projections, Reading, Tail
from marlin_cli.ops.metal_few_rows import MOST_STREAMS
from marlin_cli.ops.reference import KeyValueRows, Packed

TAIL_ROWS = 16  # rows that are copied by every step, before they are moved to the storage


class MemoryRows(NamedTuple):
    """What one layer reads of the inputs."""

    keys: KeyValueRows  # [inputs, heads, states, head_dim]
    values: KeyValueRows
    lengths: mx.array | None
    rotated: bool  # whether keys are turned by a Hadamard matrix a head


class Layer(NamedTuple):
    """A decoder layer as the parts of a step take it."""

    attention_norm: Norm
    projections: Projections
    reading: Reading
    cross_norm: Norm
    cross_query: nn.Module
    cross_reading: Reading
    ffn_norm: Norm
    gate: nn.Module | None
    up: nn.Module
    down: nn.Module
    activation: str

    def __call__(
        self, rows: mx.array, stored: Tail | None, tail: Tail, place: Place, memory: MemoryRows
    ) -> tuple[mx.array, Tail]:
        """A new row of each answer [answers, d_model] through the layer, and the tail with its keys and values."""
        queries, tail = step.projections(rows, self.attention_norm, self.projections, tail, place)
        rows = step.attention_out(queries, stored, tail, place, self.reading, rows)
        queries = step.normed_linear(rows, self.cross_norm, self.cross_query, None, rows.dtype).reshape(queries.shape)
        queries = mx.hadamard_transform(queries) if memory.rotated else queries
        rows = step.memory_attention_out(queries, memory.keys, memory.values, memory.lengths, self.cross_reading, rows)
        wide = step.feed_forward(rows, self.ffn_norm, self.gate, self.up, self.activation)
        return step.linear_added(wide, self.down, rows), tail


class CompiledAnswers:
    """What the decoder remembers; an `Answers` of `encoder_decoder`. Made by `compiled_answers`."""

    def __init__(self, network: ByT5, memory: Sequence[MemoryRows]) -> None:
        self._network, self._memory = network, list(memory)
        bias = network.decoder.relative_bias()
        self._layers = [_layer(network, block, bias) for block in network.decoder.layers]
        mx.eval(bias)
        self._head = _head(network)
        self._caches = [(Rows(SELF_CACHE_ROWS), Rows(SELF_CACHE_ROWS)) for _ in self._layers]
        self._stored = self._filled = 0
        self._tails = self._empty(memory[0])
        self._function: Callable[..., tuple[mx.array, list[Tail]]] = mx.compile(self._step)

    @property
    def memory_bytes(self) -> int:
        return sum(array.nbytes for each in self._memory for rows in (each.keys, each.values) for array in _arrays(rows))

    def push(self, ids: mx.array) -> mx.array:
        """Append ids [answers]; logits [answers, vocab] of what follows."""
        if self._filled == TAIL_ROWS:
            self._move()
        counts = mx.array([self._stored, self._filled], dtype=mx.int32)
        storage = [Tail(*(rows.with_room() for rows in pair)) for pair in self._caches] if self._stored else []
        memory = [(_arrays(each.keys), _arrays(each.values), each.lengths) for each in self._memory]
        logits, tails = self._function(ids, counts, storage, self._tails, memory)
        self._tails, self._filled = [Tail(*tail) for tail in tails], self._filled + 1
        return logits

    def keep(self, answers: Sequence[int], streams: Sequence[int] | None) -> None:
        """See `Answers.keep`."""
        chosen = mx.array(list(answers))
        for pair in self._caches:
            for rows in pair:
                rows.keep(chosen)
        self._tails = [Tail(*(array[chosen] for array in tail)) for tail in self._tails]
        if streams is not None:
            kept = mx.array(list(streams))
            self._memory = [_kept(each, kept) for each in self._memory]

    def _move(self) -> None:
        """Move the tails' rows to the storage."""
        for pair, tail in zip(self._caches, self._tails, strict=True):
            for rows, array in zip(pair, tail, strict=True):
                rows.append(array)
        self._stored, self._filled = self._stored + self._filled, 0

    def _step(
        self, ids: mx.array, counts: mx.array, storage: list[Tail], tails: list[Tail], memory: list[Any]
    ) -> tuple[mx.array, list[Tail]]:
        rows, place, new = self._network.embedding(ids), Place(counts, None), []
        for index, layer in enumerate(self._layers):
            keys, values, lengths = memory[index]
            known = self._memory[index]
            read = MemoryRows(_like(known.keys, keys), _like(known.values, values), lengths, known.rotated)
            stored = Tail(*storage[index]) if storage else None
            rows, tail = layer(rows, stored, Tail(*tails[index]), place, read)
            new.append(tail)
        logits = step.normed_linear(rows, Norm("rmsnorm", self._network.decoder.norm), self._head, None, mx.float32)
        config = self._network.config
        return logits * config.d_model**-0.5 if config.scaled_head else logits, new

    def _empty(self, memory: MemoryRows) -> list[Tail]:
        config = self._network.config
        shape = (_inputs(memory.keys), config.heads, TAIL_ROWS, config.head_dim)
        zeros = mx.zeros(shape, dtype=self._network.embedding.weight.dtype)
        mx.eval(zeros)
        return [Tail(zeros, zeros)] * config.decoder_layers


def compiled_answers(network: ByT5, memory: Sequence[MemoryRows], answers: int) -> CompiledAnswers | None:
    """The state of a decoder, or None for a network or a batch that goes operation by operation."""
    known = type(network.decoder) is Decoder and type(network.embedding) is nn.Embedding
    if not known or answers != 1 or _inputs(memory[0].keys) > MOST_STREAMS:
        return None
    return CompiledAnswers(network, memory)


def _layer(network: ByT5, block: DecoderBlock, bias: mx.array) -> Layer:
    own, cross, ffn, config = block.attention, block.cross, block.ffn, network.config
    parts = Projections(own.q_proj, own.k_proj, own.v_proj, config.heads, config.heads, config.head_dim, None, None, False)
    return Layer(
        attention_norm=Norm("rmsnorm", block.attention_norm),
        projections=parts,
        reading=Reading(1.0, None, bias, own.o_proj),
        cross_norm=Norm("rmsnorm", block.cross_norm),
        cross_query=cross.q_proj,
        cross_reading=Reading(1.0, None, None, cross.o_proj),
        ffn_norm=Norm("rmsnorm", block.ffn_norm),
        gate=ffn["gate_proj"] if "gate_proj" in ffn else None,
        up=ffn.up_proj,
        down=ffn.down_proj,
        activation=config.activation,
    )


def _head(network: ByT5) -> nn.Module:
    if not network.config.tied_head:
        return network.output
    head = Linear(1, 1, bias=False)
    head.weight = network.embedding.weight
    return head


def _inputs(rows: KeyValueRows) -> int:
    return rows.packed.shape[0] if isinstance(rows, Packed) else rows.shape[0]


def _arrays(rows: KeyValueRows) -> tuple[mx.array, ...]:
    return (rows.packed, rows.scales) if isinstance(rows, Packed) else (rows,)


def _like(known: KeyValueRows, arrays: Sequence[mx.array]) -> KeyValueRows:
    """Rows that stand in memory as known ones, of arrays that the graph has in their place."""
    return Packed(arrays[0], arrays[1], known.bits) if isinstance(known, Packed) else arrays[0]


def _kept(memory: MemoryRows, streams: mx.array) -> MemoryRows:
    keys, values = (_like(rows, [array[streams] for array in _arrays(rows)]) for rows in (memory.keys, memory.values))
    return memory._replace(keys=keys, values=values, lengths=None if memory.lengths is None else memory.lengths[streams])
