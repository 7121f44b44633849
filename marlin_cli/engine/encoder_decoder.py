"""State of ByT5's decoding: inputs encoded once, what the decoder reads of them, and what it has written so far."""

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from marlin_cli.engine.cache import Rows, check_cache_bits
from marlin_cli.engine.compiled_answers import CompiledAnswers, MemoryRows, compiled_answers
from marlin_cli.engine.compiled_encoder import CompiledEncoder
from marlin_cli.engine.cuda_answers import CudaAnswers, cuda_answers
from marlin_cli.engine.fused_byt5 import SELF_CACHE_ROWS, fuse_byt5
from marlin_cli.engine.sampling import Noise, Sampling, draw
from marlin_cli.errors import UsageError
from marlin_cli.models.byt5 import ByT5, Memory, PlainMemory
from marlin_cli.models.byt5_ids import padded
from marlin_cli.ops import attention, paged_attention
from marlin_cli.ops.dispatch import by_operations, gpu
from marlin_cli.ops.reference import pack_rows


class GrowingCache:
    """Keys and values of the rows that one decoder layer has seen; a `marlin_cli.models.byt5.SelfCache`."""

    def __init__(self) -> None:
        self._keys, self._values = Rows(SELF_CACHE_ROWS), Rows(SELF_CACHE_ROWS)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use."""
        return self._keys.nbytes + self._values.nbytes

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, bias: mx.array) -> mx.array:
        everything = self._keys.append(keys), self._values.append(values)
        return attention(queries, *everything, 1.0, causal=True, relative_bias=bias)

    def keep(self, rows: mx.array) -> None:
        """Go on with these sequences, in this order; one may come twice."""
        self._keys.keep(rows)
        self._values.keep(rows)


class PackedMemory:
    """A `marlin_cli.models.byt5.Memory` in 4 bits (nvfp4) or 8 (mxfp8).

    Keys and queries are rotated by a Hadamard matrix per head, which leaves their inner products as they are and
    spreads the few large channels of a key over all.
    """

    def __init__(self, plain: PlainMemory, bits: int) -> None:
        self._keys = pack_rows(mx.hadamard_transform(plain.keys), bits)
        self._values = pack_rows(plain.values, bits)
        self._lengths = plain.lengths

    @property
    def streams(self) -> int:
        return self._keys.packed.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.packed.nbytes + part.scales.nbytes for part in (self._keys, self._values))

    @property
    def rows(self) -> MemoryRows:
        """What is held, as a compiled step reads it."""
        return MemoryRows(self._keys, self._values, self._lengths, rotated=True)

    def attend(self, queries: mx.array) -> mx.array:
        rotated = mx.hadamard_transform(queries)
        return paged_attention(rotated, [self._keys], [self._values], 1.0, causal=False, lengths=self._lengths)

    def keep(self, streams: mx.array) -> None:
        """Go on with these inputs, in this order."""
        self._keys, self._values = (
            part._replace(packed=part.packed[streams], scales=part.scales[streams]) for part in (self._keys, self._values)
        )
        self._lengths = None if self._lengths is None else self._lengths[streams]


class Answers(Protocol):
    """What decoding remembers of the inputs and the answers so far, and how it goes on."""

    @property
    def memory_bytes(self) -> int:
        """Bytes of what is held of the inputs."""

    def push(self, ids: mx.array) -> mx.array:
        """Append ids [inputs x answers]; logits [inputs x answers, vocab] of what follows."""

    def keep(self, answers: Sequence[int], streams: Sequence[int] | None) -> None:
        """Go on with these answers, in this order, and of the inputs with `streams` (all of them if None)."""


class GraphAnswers:
    """`Answers` by the network itself, an operation at a time."""

    def __init__(self, network: ByT5, plain: list[PlainMemory], memory_bits: int) -> None:
        self._network = network
        self.memory: list[PlainMemory] | list[PackedMemory] = (
            plain if memory_bits == 16 else [PackedMemory(each, memory_bits) for each in plain]
        )
        self._caches = [GrowingCache() for _ in plain]

    @property
    def memory_bytes(self) -> int:
        return sum(each.nbytes for each in self.memory)

    def push(self, ids: mx.array) -> mx.array:
        memory: Sequence[Memory] = self.memory
        return self._network.head(self._network.decode(ids[:, None], memory, self._caches)[:, -1])

    def keep(self, answers: Sequence[int], streams: Sequence[int] | None) -> None:
        for cache in self._caches:
            cache.keep(mx.array(list(answers)))
        if streams is not None:
            for memory in self.memory:
                memory.keep(mx.array(list(streams)))


class AnswerState:
    """Decoding state of a batch of inputs with equally many answers each, of which every one grows by an id a step.

    `logits` [inputs x answers, vocab] always predicts the next id of each answer; the answers to an input stand
    together.

    Args:
        sources: ids of each input, one at least.
        answers: answers to each input.
        memory_bits: bits of the keys and values that the decoder reads of the inputs: 4, 8 or 16. The cache of its own
            rows is short and never packed.

    Raises:
        UsageError: `memory_bits` do not fit the heads, or the network has no decoder.
    """

    def __init__(self, network: ByT5, sources: Sequence[Sequence[int]], *, answers: int = 1, memory_bits: int = 16) -> None:
        config = network.config
        check_answers(network)
        if memory_bits != 16:
            check_cache_bits(memory_bits, memory_bits, config.head_dim)
        source, lengths = padded(sources, config.pad_id)
        fused = fuse_byt5(network)
        self._answers: Answers | CudaAnswers
        self._logits: mx.array | None = None
        if fused is None:
            self._answers = _by_graph(network, encode(network, source, lengths), lengths, answers, memory_bits)
        else:
            self._answers = fused.answers(fused.encode(source, lengths), lengths, answers, memory_bits)
        self.push([config.start_id] * len(sources) * answers)

    @property
    def memory_bytes(self) -> int:
        """Bytes of what is held of the inputs."""
        return self._answers.memory_bytes

    @property
    def logits(self) -> mx.array:
        if self._logits is None:
            assert isinstance(self._answers, CudaAnswers)
            self._logits = self._answers.logits()
        return self._logits

    def push(self, ids: Sequence[int] | mx.array) -> None:
        """Append ids [inputs x answers] to the answers and predict what follows."""
        if isinstance(self._answers, CudaAnswers):
            self._answers.push(ids)
            self._logits = None
        else:
            self._logits = self._answers.push(ids if isinstance(ids, mx.array) else mx.array(list(ids), dtype=mx.int32))

    def draw(self, forbidden: Sequence[int], sampling: Sampling, noise: Noise, most: int) -> tuple[list[int], list[float]]:
        """See `sampling.draw`, with the noise of the next step; from here on at most `most` ids will be drawn."""
        if isinstance(self._answers, CudaAnswers):
            return self._answers.draw(forbidden, sampling, noise, most)
        return draw(self.logits, [forbidden], [sampling], noise.take(1) if sampling.temperature else None)

    def keep(self, answers: Sequence[int], streams: Sequence[int] | None = None) -> None:
        """Go on with these answers, in this order, and of the inputs with `streams` (all of them if None)."""
        self._logits = None if self._logits is None else self._logits[mx.array(list(answers))]
        self._answers.keep(answers, streams)


def check_answers(network: ByT5) -> None:
    """Raise `UsageError` for a network that has no decoder."""
    if not network.config.decoder_layers:
        labels = " (marlin encode), or to label (marlin label)" if network.config.labels else " (marlin encode)"
        raise UsageError(f"the model is an encoder alone and cannot answer; ask it to encode{labels}")


def _by_graph(
    network: ByT5, states: mx.array, lengths: mx.array | None, answers: int, memory_bits: int
) -> GraphAnswers | CompiledAnswers | CudaAnswers:
    """Decoding over the encoder's states: by what the GPU in use has for whole steps, else by operations."""
    device = None if by_operations() else gpu()
    encoder = CompiledEncoder(network) if device == "cuda" else network
    graph = GraphAnswers(network, encoder.memory(states, lengths), memory_bits)
    if device is None:
        return graph
    memory = [_rows(each) for each in graph.memory]
    return (compiled_answers if device == "metal" else cuda_answers)(network, memory, answers) or graph


def _rows(memory: PlainMemory | PackedMemory) -> MemoryRows:
    if isinstance(memory, PackedMemory):
        return memory.rows
    return MemoryRows(memory.keys, memory.values, memory.lengths, rotated=False)


def encode(network: ByT5, ids: mx.array, lengths: mx.array | None = None) -> mx.array:
    """See `ByT5.encode`: in one call where the kernels run, as a compiled graph on an NVIDIA GPU."""
    fused = fuse_byt5(network)
    if fused is not None:
        return fused.encode(ids, lengths)
    compiled = gpu() == "cuda" and not by_operations()
    return CompiledEncoder(network).encode(ids, lengths) if compiled else network.encode(ids, lengths)
