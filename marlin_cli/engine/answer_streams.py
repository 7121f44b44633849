"""Inputs that are read, and answers that are written, side by side at places of their own: by operations, on every device.

Inputs stand one after the other as rows, without filler: products take the rows of all, attention goes input by input. So what
is remembered of an input belongs to it alone, and nothing moves when another comes or goes.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import mlx.core as mx

from marlin_cli.engine.encoder_decoder import GrowingCache, PackedMemory
from marlin_cli.models.byt5 import ByT5, DownsamplingEncoder, EncoderBlock, Memory, PlainMemory


@dataclass(frozen=True)
class Source:
    """An input, and how its answers will read it."""

    ids: Sequence[int]
    answers: int  # that are written side by side, as beams are
    memory_bits: int  # of keys and values: 4, 8 or 16


class Held(Protocol):
    """What decoding remembers of one input and its answers so far."""

    @property
    def nbytes(self) -> int:
        """Bytes in use."""

    def keep(self, answers: Sequence[int]) -> None:
        """Go on with these answers, in this order; one may come twice."""


AnyHeld = TypeVar("AnyHeld", bound=Held)


class Encoding(Protocol[AnyHeld]):
    """Inputs that are read together."""

    def advance(self, rows: int) -> bool:
        """Go on by about the work of reading `rows` rows, a little at least; whether all is read."""

    def keep(self, inputs: Sequence[int]) -> None:
        """Go on with these inputs."""

    def held(self) -> list[AnyHeld]:
        """What decoding starts from, for each input, once all is read."""


class AnswerStreams(Protocol[AnyHeld]):
    """How a network reads inputs and writes answers that stand at places of their own."""

    def read(self, sources: Sequence[Source]) -> Encoding[AnyHeld]:
        """Begin to read inputs."""

    def push(self, held: Sequence[AnyHeld], ids: Sequence[Sequence[int]]) -> mx.array:
        """Append ids to every answer; logits [answers, vocab] of what follows them.

        Args:
            ids: for each input, equally many for each of its answers, those of the first answer first.
        """

    def push_all(self, held: Sequence[AnyHeld], ids: Sequence[Sequence[int]]) -> mx.array:
        """As `push`, with the logits of what follows each of the ids, [ids, vocab], where `no_drafts` is None."""

    def forget(self, held: AnyHeld, ids: int) -> None:
        """Forget so many of the ids that the answer had last."""

    @property
    def no_drafts(self) -> str | None:
        """Why no drafts are verified; None: they are."""

    @property
    def number_bytes(self) -> int:
        """Bytes of a number of keys or values that are not packed."""


class GraphHeld:
    """A `Held` in the network's own arrays."""

    def __init__(self, memory: Sequence[PlainMemory], source: Source) -> None:
        self.answers = source.answers
        self.memory: list[PlainMemory | PackedMemory] = [
            each if source.memory_bits == 16 else PackedMemory(each, source.memory_bits) for each in memory
        ]
        self.caches = [GrowingCache() for _ in memory]

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in (*self.memory, *self.caches))

    def keep(self, answers: Sequence[int]) -> None:
        chosen = mx.array(list(answers))
        for cache in self.caches:
            cache.keep(chosen)


class GraphStreams:
    """`AnswerStreams` by the network itself."""

    no_drafts = "only the CPU kernels verify drafts, and this model goes by others"

    def __init__(self, network: ByT5) -> None:
        self._network = network

    def push_all(self, held: Sequence[GraphHeld], ids: Sequence[Sequence[int]]) -> mx.array:
        raise NotImplementedError(self.no_drafts)

    def forget(self, held: GraphHeld, ids: int) -> None:
        raise NotImplementedError(self.no_drafts)

    @property
    def number_bytes(self) -> int:
        return int(self._network.embedding.weight.dtype.size)

    def read(self, sources: Sequence[Source]) -> "GraphEncoding":
        return GraphEncoding(self._network, sources)

    def push(self, held: Sequence[GraphHeld], ids: Sequence[Sequence[int]]) -> mx.array:
        ends = list(itertools.accumulate(map(len, ids)))
        layers = range(self._network.config.decoder_layers)
        memory: list[Memory] = [_Memories([each.memory[layer] for each in held], ends) for layer in layers]
        caches = [_Caches([(each.caches[layer], each.answers) for each in held], ends) for layer in layers]
        hidden = self._network.decode(mx.array([[value for each in ids for value in each]]), memory, caches)[0]
        last = [
            start + (end - start) // each.answers * (answer + 1) - 1
            for each, (start, end) in zip(held, itertools.pairwise((0, *ends)), strict=True)
            for answer in range(each.answers)
        ]
        return self._network.head(hidden[mx.array(last)])


class GraphEncoding:
    """An `Encoding` by the network itself, which goes on by whole layers."""

    def __init__(self, network: ByT5, sources: Sequence[Source]) -> None:
        self._network, self._sources, self._done = network, list(sources), 0
        inputs = [network.rows(mx.array([list(each.ids)]), None) for each in sources]
        self._sizes = [each.shape[1] for each in inputs]
        self._x = mx.concatenate(inputs, axis=1)
        self._over_bytes: tuple[mx.array, mx.array, list[int]] | None = (
            None  # of an encoder that pools: rows, what was pooled, sizes
        )

    def advance(self, rows: int) -> bool:
        encoder = self._network.encoder
        layers: list[EncoderBlock] = encoder.layers
        local: list[EncoderBlock] = encoder.local_layers if isinstance(encoder, DownsamplingEncoder) else []
        work = rows * len(local + layers)
        while work > 0 and self._done < len(local + layers):
            if self._done < len(local):
                bias, window = encoder.local_bias(), encoder.window
            else:
                bias, window = encoder.relative_bias(), None
            if local and self._done == len(local):
                self._pool(encoder)
            self._x = (local + layers)[self._done].of_inputs(self._x, bias, list(itertools.accumulate(self._sizes)), window)
            self._done, work = self._done + 1, work - self._x.shape[1]
        mx.eval(self._x)
        return self._done == len(local + layers)

    def keep(self, inputs: Sequence[int]) -> None:
        def kept(rows: mx.array, sizes: Sequence[int]) -> mx.array:
            parts = _parts(rows, sizes)
            return mx.concatenate([parts[index] for index in inputs], axis=1)

        self._x = kept(self._x, self._sizes)
        if self._over_bytes is not None:
            rows, before, sizes = self._over_bytes
            self._over_bytes = kept(rows, sizes), kept(before, self._sizes), [sizes[index] for index in inputs]
        self._sizes = [self._sizes[index] for index in inputs]
        self._sources = [self._sources[index] for index in inputs]

    def held(self) -> list[GraphHeld]:
        return [
            GraphHeld(self._network.memory(each), source) for each, source in zip(self.states(), self._sources, strict=True)
        ]

    def states(self) -> list[mx.array]:
        """The encoder's states of each input, once all is read: [1, states, d_model]."""
        encoder, x, sizes = self._network.encoder, self._x, self._sizes
        if self._over_bytes is not None:
            rows, before, sizes = self._over_bytes
            parts = zip(_parts(rows, sizes), _parts(before, self._sizes), _parts(x, self._sizes), strict=True)
            x = mx.concatenate([encoder.joined(*each) for each in parts], axis=1)
        return _parts(encoder.norm(x), sizes)

    def _pool(self, encoder: DownsamplingEncoder) -> None:
        pooled = [encoder.pooled(each, None) for each in _parts(self._x, self._sizes)]
        rows, sizes = self._x, self._sizes
        self._x, self._sizes = mx.concatenate(pooled, axis=1), [each.shape[1] for each in pooled]
        self._over_bytes = rows, self._x, sizes


class _Caches:
    """The caches of several inputs' answers in one layer, as one `SelfCache` whose rows are those of all, in one sequence."""

    def __init__(self, caches: Sequence[tuple[GrowingCache, int]], ends: Sequence[int]) -> None:
        self._caches, self._ends = caches, ends

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, bias: mx.array) -> mx.array:
        _, heads, _, width = queries.shape
        found = []
        for (cache, answers), (start, end) in zip(self._caches, itertools.pairwise((0, *self._ends)), strict=True):
            shape = heads, answers, (end - start) // answers, width
            own = (each[0, :, start:end].reshape(shape).swapaxes(0, 1) for each in (queries, keys, values))
            own_queries, own_keys, own_values = own
            found.append(
                cache.attend(own_queries, own_keys, own_values, bias).swapaxes(0, 1).reshape(1, heads, end - start, width)
            )
        return mx.concatenate(found, axis=2)


class _Memories:
    """What several inputs' answers read in one layer, as one `Memory` of one sequence, whose rows are those of all."""

    def __init__(self, memory: Sequence[Memory], ends: Sequence[int]) -> None:
        self._memory, self._ends = memory, ends

    @property
    def streams(self) -> int:
        return 1

    def attend(self, queries: mx.array) -> mx.array:
        rows = zip(self._memory, itertools.pairwise((0, *self._ends)), strict=True)
        return mx.concatenate([memory.attend(queries[:, :, start:end]) for memory, (start, end) in rows], axis=2)


def _parts(rows: mx.array, sizes: Sequence[int]) -> list[mx.array]:
    """Rows [1, rows, width] as those of each input."""
    return [rows[:, start:end] for start, end in itertools.pairwise((0, *itertools.accumulate(sizes)))]
