"""Decoding of whole patches as one compiled graph of fused steps: what the host asks of Metal. Prefix layout alone.

Shapes are fixed, so that MLX traces a patch once and repeats it: the rows of a patch, and the last few of the global cache, are
in tails of constant length that each step copies, and what is before these is in storage that is longer than its rows. Nothing
is changed in place.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from marlin_cli.engine.cache import KeyValueCache
from marlin_cli.engine.fused import NORMS
from marlin_cli.engine.sampling import Noise, Sampling, filter_numbers, sample
from marlin_cli.models.megabyte import MegaByte, Stage
from marlin_cli.models.megabyte_config import MegaByteConfig, StageConfig
from marlin_cli.models.megabyte_layers import Block
from marlin_cli.ops import step
from marlin_cli.ops.few_rows import Drawing, Norm, Place, Projections, Reading, Tail
from marlin_cli.ops.metal_few_rows import MOST_STREAMS, MOST_TAIL_ROWS

# Rows of the global cache that its tail takes before they are moved to the storage: copied by every step, so few.
TAIL_ROWS = 16


class Layer(NamedTuple):
    """A transformer layer as the parts of a step take it."""

    attention_norm: Norm
    projections: Projections
    reading: Reading
    ffn_norm: Norm
    gate: nn.Module | None
    up: nn.Module
    down: nn.Module
    activation: str

    def __call__(self, rows: mx.array, stored: Tail | None, tail: Tail, place: Place) -> tuple[mx.array, Tail]:
        """A new row of each stream [streams, dim] through the layer, and the tail with its keys and values."""
        queries, tail = step.projections(rows, self.attention_norm, self.projections, tail, place)
        rows = step.attention_out(queries, stored, tail, place, self.reading, rows)
        wide = step.feed_forward(rows, self.ffn_norm, self.gate, self.up, self.activation)
        return step.linear_added(wide, self.down, rows), tail


class Patch(NamedTuple):
    """A patch that has been queued."""

    ids: mx.array  # [streams, patch_size]
    following: mx.array | None  # the condition of the patch that follows, where it is made
    drawn: mx.array | None  # the noise of its ids
    noise: Noise  # where that came from

    @property
    def more(self) -> bool:
        """Is the condition of the patch that follows made?"""
        return self.following is not None


class CompiledPatches:
    """Queues patches of streams that stand at the beginning of one: `WholePatches`, made by `compiled_patches`."""

    checks_logits = False  # they stay within the graph, and those that are no numbers draw id 0

    def __init__(self, network: MegaByte, streams: int) -> None:
        self._network, self._streams = network, streams
        self._global, self._local = (_layers(network.config, stage, number) for number, stage in enumerate(network.stages))
        self._functions: dict[tuple[Sampling, bool], Callable[..., tuple[mx.array, mx.array | None, list[Tail]]]] = {}
        self._filters: dict[Sampling, mx.array] = {}
        self._make_constants()
        self._tails: list[Tail] = []
        self._storage: list[Tail] = []
        self._stored = self._filled = 0  # rows of the global cache: in its storage, and in the tails
        self._condition: mx.array | None = None  # of the patch to queue
        self._padding: mx.array | None = None

    @property
    def part_seconds(self) -> dict[str, float] | None:
        """Nothing tells parts apart."""
        return None

    @property
    def sequence_cache_bytes(self) -> int:
        """Bytes of the local stage's tails."""
        return sum(array.nbytes for tail in self._empty_local for array in tail)

    def keep(self, streams: int) -> None:
        """Go on with fewer streams, all that was queued being settled."""
        self._streams = streams
        self._functions.clear()
        self._make_constants()

    @staticmethod
    def takes(given: int) -> bool:
        """Can it go on in a patch in which so many ids stand already?"""
        return given == 0

    def enter(
        self, condition: mx.array, before: mx.array, given: mx.array, caches: Sequence[KeyValueCache], padding: mx.array | None
    ) -> None:
        """Go on from what MLX has made; see `WholePatches`."""
        self._condition, self._padding = condition, padding

    def queue(self, caches: Sequence[KeyValueCache], sampling: Sampling, noise: Noise, more: bool) -> Patch:
        """Queue the next patch, and the global step after it if there is to be `more`."""
        drawn = noise.take(self._network.config.patch_size) if sampling.temperature else None
        if more and (self._filled == TAIL_ROWS or not self._storage):
            self.count(caches)
            self._storage = [Tail(*cache.with_room()) for cache in caches]
            self._stored, self._tails = caches[0].rows, self._empty_global
        key = sampling, more
        if key not in self._functions:
            self._functions[key] = mx.compile(self._patch_function(sampling, more))
        counts = mx.array([self._stored, self._filled], dtype=mx.int32)
        filters = self._filters_of(sampling) if sampling.temperature else None
        caches_read = (self._padding, self._storage, self._tails) if more else (None, [], [])
        ids, following, tails = self._functions[key](self._condition, counts, drawn, filters, *caches_read)
        if more:
            self._tails, self._filled = [Tail(*tail) for tail in tails], self._filled + 1
        mx.async_eval(ids, following, tails)  # type: ignore[no-untyped-call]
        self._condition = following
        return Patch(ids, following if more else None, drawn, noise)

    def read(self, patch: Patch) -> np.ndarray:
        """The ids [streams, patch_size] of a patch, waited for, on the host."""
        return np.array(patch.ids)

    def condition(self, patch: Patch) -> mx.array:
        """The condition [streams, 1, dim] of the patch after this one."""
        assert patch.following is not None
        return patch.following

    def take_back(self, patch: Patch, sampling: Sampling, steps: int) -> None:
        """Forget the last steps of the patch that was queued last, and what followed it."""
        if patch.drawn is not None:
            patch.noise.give_back(patch.drawn[patch.drawn.shape[0] - steps :])
        if patch.more:
            self._filled -= 1

    def count(self, caches: Sequence[KeyValueCache]) -> None:
        """Move the rows of the tails to the caches; the next patch reads them there."""
        if self._filled:
            for cache, tail in zip(caches, self._tails, strict=True):
                cache.append(*(array[:, :, : self._filled] for array in tail))
        self._filled, self._storage, self._tails = 0, [], []

    def settle(self, caches: Sequence[KeyValueCache]) -> None:
        """Before MLX goes on where patches have been."""
        self.count(caches)

    def give_back_noise(self, noise: Noise) -> None:
        """Nothing is drawn ahead."""

    def _make_constants(self) -> None:
        """What every patch begins with: made once, as each would be a launch of its own."""
        config = self._network.config

        def empty(stage: StageConfig, rows: int) -> list[Tail]:
            shape = (self._streams, stage.kv_heads or stage.heads, rows, stage.width_of_head)
            zeros = mx.zeros(shape, dtype=self._network.byte_embedding.weight.dtype)
            return [Tail(zeros, zeros)] * stage.layers

        self._empty_global, self._empty_local = empty(config.stages[0], TAIL_ROWS), empty(config.stages[-1], config.patch_size)
        self._no_ids = mx.zeros((self._streams, config.patch_size), dtype=mx.int32)
        positions = self._network.stages[-1].positions
        self._first_position = None if positions is None else mx.contiguous(positions.weight[:1])
        self._places = [Place(mx.array([0, row], dtype=mx.int32), None) for row in range(config.patch_size)]
        mx.eval([self._empty_global, self._empty_local, self._no_ids, self._places, self._first_position])

    def _filters_of(self, sampling: Sampling) -> mx.array:
        if sampling not in self._filters:
            self._filters[sampling] = mx.array(filter_numbers(sampling), dtype=mx.float32)
        return self._filters[sampling]

    def _patch_function(self, sampling: Sampling, more: bool) -> Callable[..., tuple[mx.array, mx.array | None, list[Tail]]]:
        """The graph of a patch, and of the global step behind it where there is to be `more`."""
        network = self._network

        def patch(
            condition: mx.array, counts: mx.array, noise: mx.array | None, filters: mx.array | None, padding: mx.array | None,
            storage: list[Tail], tails: list[Tail],
        ) -> tuple[mx.array, mx.array | None, list[Tail]]:  # fmt: skip
            drawing = Drawing(lambda logits, now: sample(logits, sampling, now), filters, noise)
            ids = self._local_steps(condition, drawing)
            if not more:
                return ids, None, []
            place = Place(counts, padding)
            index = counts.sum() - 1 if padding is None else counts.sum() - 1 - padding
            index = mx.broadcast_to(index, (ids.shape[0],))
            rows = network.token_rows(0, ids[:, None], index, None)[:, 0]
            new = []
            for layer, stored, tail in zip(self._global, storage, tails, strict=True):
                rows, tail = layer(rows, Tail(*stored), Tail(*tail), place)
                new.append(tail)
            stage = network.stages[0]
            assert stage.to_next is not None
            following = step.normed_linear(rows, _norm(network.config, stage.stack.norm), stage.to_next, None, rows.dtype)
            return ids, following[:, None], new

        return patch

    def _local_steps(self, condition: mx.array, drawing: Drawing) -> mx.array:
        """The ids [streams, patch_size] of the patch that `condition` [streams, 1, dim] leads."""
        network, stage = self._network, self._network.stages[-1]
        rows = condition[:, 0] if self._first_position is None else condition[:, 0] + self._first_position
        norm, positions = _norm(network.config, stage.stack.norm), None if stage.positions is None else stage.positions.weight
        ids, tails = self._no_ids, list(self._empty_local)
        for number, place in enumerate(self._places):
            for index, layer in enumerate(self._local):
                rows, tails[index] = layer(rows, None, tails[index], place)
            logits = step.normed_linear(rows, norm, network.output, None, mx.float32)
            ids, rows = step.draw_embed(logits, drawing, number, ids, stage.byte_embedding.weight, positions)
        return ids


def compiled_patches(network: MegaByte, streams: int) -> CompiledPatches | None:
    """The decoder of whole patches, or None for a network or a batch that goes operation by operation."""
    config = network.config
    known = config.layout == "prefix" and not config.token_shift and config.patch_size <= MOST_TAIL_ROWS
    embeddings = [stage.byte_embedding for stage in network.stages]
    if not known or streams > MOST_STREAMS or any(type(each) is not nn.Embedding for each in embeddings):
        return None
    return CompiledPatches(network, streams)


def _layers(config: MegaByteConfig, stage: Stage, number: int) -> list[Layer]:
    window = config.attention_window if number == 0 else None
    return [_layer(config, stage.config, block, window) for block in stage.stack.layers]


def _layer(config: MegaByteConfig, stage: StageConfig, block: Block, window: int | None) -> Layer:
    attention, ffn = block.attention, block.ffn
    gated = config.ffn == "swiglu"
    parts = Projections(
        attention.q_proj, attention.k_proj, attention.v_proj, attention.heads, attention.kv_heads, attention.head_dim,
        (attention.q_norm, attention.k_norm) if config.qk_norm else None, attention.rope_theta, config.rope_interleaved,
    )  # fmt: skip
    return Layer(
        attention_norm=_norm(config, block.attention_norm),
        projections=parts,
        reading=Reading(attention.scale, window, None, attention.o_proj),
        ffn_norm=_norm(config, block.ffn_norm),
        gate=ffn.gate_proj if gated else None,
        up=ffn.up_proj,
        down=ffn.down_proj,
        activation="silu" if gated else config.ffn,
    )


def _norm(config: MegaByteConfig, module: nn.Module) -> Norm:
    return Norm(NORMS[type(module)], module)
