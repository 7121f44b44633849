"""Inputs that are read, and answers that are written, side by side by the CPU kernels; see `engine.answer_streams`."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from marlin_cli.engine.answer_streams import Encoding, GraphEncoding, Source
from marlin_cli.engine.fused_byt5 import SELF_CACHE_ROWS, FusedByT5, fuse_byt5
from marlin_cli.engine.speculation import ROWS_DEPEND
from marlin_cli.models.byt5 import ByT5


class FusedHeld:
    """A `Held` in the kernels' own pages."""

    def __init__(self, cache: Any, memory: Any, answers: int) -> None:
        self.cache, self.memory, self.answers = cache, memory, answers

    @property
    def nbytes(self) -> int:
        return int(self.cache.bytes_in_use + self.memory.bytes_in_use)

    def keep(self, answers: Sequence[int]) -> None:
        self.cache.keep(list(answers))


class FusedStreams:
    """`AnswerStreams` in one call a step, and one a slice. Made by `fuse_answers`."""

    number_bytes = 4

    def __init__(self, network: ByT5, fused: FusedByT5) -> None:
        self._network, self._fused = network, fused

    def read(self, sources: Sequence[Source]) -> Encoding[FusedHeld]:
        if self._fused.encoder is None:
            return _ByStates(self, GraphEncoding(self._network, sources), sources)
        return _Sliced(self, sources)

    @property
    def no_drafts(self) -> str | None:
        return None if self._fused.module.exact_rows() else ROWS_DEPEND

    def push(self, held: Sequence[FusedHeld], ids: Sequence[Sequence[int]]) -> mx.array:
        return self._push(held, ids, every=False)

    def push_all(self, held: Sequence[FusedHeld], ids: Sequence[Sequence[int]]) -> mx.array:
        return self._push(held, ids, every=True)

    def forget(self, held: FusedHeld, ids: int) -> None:
        held.cache.cut(held.cache.rows - ids)

    def _push(self, held: Sequence[FusedHeld], ids: Sequence[Sequence[int]], *, every: bool) -> mx.array:
        rows = [len(each) // one.answers for each, one in zip(ids, held, strict=True)]
        together = [value for each in ids for value in each]
        logits: mx.array = self._fused.module.answer_decode(
            *self._fused.decoder_parts, together, rows, [each.cache for each in held], [each.memory for each in held], every
        )
        return logits

    def rows(self, source: Source) -> mx.array:
        """What the encoder reads of an input: [rows, d_model]."""
        return self._network.rows(mx.array([list(source.ids)]), None)[0]

    def encoding(self, rows: mx.array, sizes: Sequence[int], sources: Sequence[Source]) -> Any:
        """The kernels' own part of reading inputs that stand one after the other in rows."""
        bits = [_kernel_bits(each) for each in sources]
        return self._fused.module.SlicedEncoding(self._fused.encoder, self._fused.decoder_parts[0], rows, list(sizes), bits)

    def remembered(self, states: mx.array, source: Source) -> FusedHeld:
        """What decoding starts from, of the encoder's states [1, states, d_model]."""
        return self.held(self._fused.decoder_parts[0].remember(states, [], _kernel_bits(source)), source)

    def held(self, memory: Any, source: Source) -> FusedHeld:
        """What decoding starts from."""
        config = self._network.config
        shape = config.decoder_layers, source.answers, config.heads, config.head_dim
        return FusedHeld(self._fused.module.StackCache(*shape, 32, 32, SELF_CACHE_ROWS, []), memory, source.answers)


class _Sliced:
    """An `Encoding` whose slices may end within a layer."""

    def __init__(self, streams: FusedStreams, sources: Sequence[Source]) -> None:
        self._streams, self._sources = streams, list(sources)
        rows = [streams.rows(each) for each in sources]
        self._encoding = streams.encoding(mx.concatenate(rows), [len(each) for each in rows], sources)

    def advance(self, rows: int) -> bool:
        return bool(self._encoding.advance(rows))

    def keep(self, inputs: Sequence[int]) -> None:
        self._encoding.keep(list(inputs))
        self._sources = [self._sources[index] for index in inputs]

    def held(self) -> list[FusedHeld]:
        memories = self._encoding.memories()
        return [self._streams.held(memory, source) for memory, source in zip(memories, self._sources, strict=True)]


class _ByStates:
    """An `Encoding` by operations, of an encoder that the kernels do not know."""

    def __init__(self, streams: FusedStreams, encoding: GraphEncoding, sources: Sequence[Source]) -> None:
        self._streams, self._encoding, self._sources = streams, encoding, list(sources)

    def advance(self, rows: int) -> bool:
        return self._encoding.advance(rows)

    def keep(self, inputs: Sequence[int]) -> None:
        self._encoding.keep(inputs)
        self._sources = [self._sources[index] for index in inputs]

    def held(self) -> list[FusedHeld]:
        states = self._encoding.states()
        return [self._streams.remembered(each, source) for each, source in zip(states, self._sources, strict=True)]


def fuse_answers(network: ByT5) -> FusedStreams | None:
    """A network's streams by the kernels, or None where they do not run or do not know a layer of it."""
    fused = fuse_byt5(network)
    return None if fused is None else FusedStreams(network, fused)


def _kernel_bits(source: Source) -> int:
    return 32 if source.memory_bits == 16 else source.memory_bits
