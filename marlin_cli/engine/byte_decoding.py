"""Cached decoding of networks that take bytes one after the other (ByGPT5), for streams of equally many bytes."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import mlx.core as mx

from marlin_cli.engine.cache import CacheBits, Pages, check_cache_bits
from marlin_cli.engine.encoder_decoder import GrowingCache
from marlin_cli.engine.finite import not_finite
from marlin_cli.engine.fused import rotates
from marlin_cli.engine.fused_bygpt5 import fuse_bygpt5
from marlin_cli.engine.sampling import Noise, Sampling, sample
from marlin_cli.engine.states import ArrayRows, Beginning, KeptRows, Part, Place, PromptKeeper, StreamState, Units, ids_of
from marlin_cli.models import Network, architecture_of
from marlin_cli.models.byt5 import SelfCache
from marlin_cli.ops import paged_attention
from marlin_cli.ops.long_attention import SCORES_AT_ONCE


class ByteReader(Network, Protocol):
    """A network that takes a byte at a step. Its configuration has `layers`, `heads`, `vocab_size` and `max_bytes`."""

    def led(self, ids: mx.array) -> mx.array:
        """What it reads of ids [n, total] of texts from their beginning: with whatever comes before them."""

    def decode(self, ids: mx.array, caches: Sequence[SelfCache]) -> mx.array:
        """Hidden rows [n, rows, width] of ids [n, rows], which follow those in the caches, one a layer."""

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden rows as float32 logits [..., vocab]."""


class Rows(Protocol):
    """What a network remembers of a batch of texts, and how it goes on."""

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values in use."""

    def read(self, ids: mx.array) -> mx.array:
        """Append ids [n, rows], one row at least: logits [n, vocab] of what follows."""

    def keep(self, streams: Sequence[int]) -> None:
        """Keep these members of the batch."""


@runtime_checkable
class KeptTexts(Rows, Protocol):
    """`Rows` from which another text may go on."""

    def kept(self) -> KeptRows:
        """The rows of a single text so far, which stay as they are."""

    def take_up(self, beginning: Beginning) -> None:
        """Go on from the beginning of a prompt, in place of nothing."""


def rows_of_layers(network: ByteReader, streams: int, bits: CacheBits) -> Rows:
    """What a network whose layers keep all keys and values remembers of so many texts that have no ids yet."""
    rotated = rotates(architecture_of(network).packed_keys(network.config).head_dim, bits)
    fused = fuse_bygpt5(network) if rotated else None
    return GraphRows(network, bits) if fused is None else fused.new_rows(streams, bits)


class ByteByByte:
    """Decoding state of a batch of streams of equally many ids; an `engine.continuation.Continuation`.

    Args:
        network: the model.
        prompts: ids of each stream.
        cache_bits: of the keys and values of every layer.
        keeper: where the beginning of a single prompt may be known, and what is read of it is kept.
        new_rows: (network, streams, bits) -> what is remembered of so many texts that have no ids yet.
        level: of the cache that this counts as, see `models.decoding_shape`.

    Raises:
        UsageError: `cache_bits` do not fit the network.
    """

    def __init__(
        self,
        network: Any,
        prompts: Sequence[Sequence[int]],
        cache_bits: CacheBits | None = None,
        keeper: PromptKeeper | None = None,
        *,
        new_rows: Callable[[Any, int, CacheBits], Rows] = rows_of_layers,
        level: str = "decoder",
    ) -> None:
        self.config, self._level = network.config, level
        bits = cache_bits or CacheBits()
        packed_keys = architecture_of(network).packed_keys(self.config)
        if bits != CacheBits() and packed_keys.paths:
            check_cache_bits(bits.keys, bits.values, packed_keys.head_dim)
        self._rows = new_rows(network, len(prompts), bits)
        self.positions = [len(prompt) for prompt in prompts]
        ids = mx.array([list(prompt) for prompt in prompts], dtype=mx.int32).reshape(len(prompts), -1)
        texts = self._rows if isinstance(self._rows, KeptTexts) and len(prompts) == 1 and ids.size else None
        beginning = None if keeper is None or texts is None else keeper.restore(prompts[0])
        if beginning is not None and texts is not None:
            texts.take_up(beginning)
        if beginning is None:
            self.logits = self._rows.read(network.led(ids))
        elif beginning.units < ids.shape[1]:
            self.logits = self._rows.read(ids[:, beginning.units :])
        else:
            self.logits = beginning.places[-1].last
        if keeper is not None and texts is not None:
            places = (Place(len(prompts[0]), self.logits),)
            keeper.keep(StreamState(ids_of(prompts[0]), Units(), texts.kept(), places))

    @staticmethod
    def phase(config: Any, prompt_ids: int) -> int:
        """Prompts of equal phase can be decoded together."""
        return prompt_ids

    @property
    def streams(self) -> int:
        """Streams in the batch."""
        return len(self.positions)

    @property
    def at_boundary(self) -> bool:
        """Every id ends a step."""
        return True

    def read_slice(self) -> bool:
        """Prompts are read at once."""
        return False

    def join(self, other: "ByteByByte") -> bool:
        """Batches stay apart."""
        return False

    @property
    def cache_bytes(self) -> dict[str, int]:
        """Bytes in use."""
        return {self._level: self._rows.nbytes}

    @property
    def part_seconds(self) -> dict[str, float] | None:
        """None: nothing tells parts apart."""
        return None

    def check_finite(self) -> None:
        """See that what comes next is predicted by numbers.

        Raises:
            CheckpointError: it is not.
        """
        if not mx.isfinite(mx.logsumexp(self.logits, axis=-1)).all().item():
            raise not_finite()

    def advance(self, sampling: Sampling, noise: Noise, most: int) -> mx.array:
        """Draw the next id of each stream and append it: [streams, 1]."""
        ids = sample(self.logits, sampling, noise.take(1)[0] if sampling.temperature else None)
        self.push(ids)
        return ids[:, None]

    def push(self, ids: mx.array) -> None:
        """Append ids [streams] to the streams; at the end of the model's context nothing follows, and `logits` stays."""
        self.positions = [position + 1 for position in self.positions]
        if max(self.positions) < self.config.max_bytes:
            self.logits = self._rows.read(ids[:, None])

    def keep(self, streams: Sequence[int]) -> None:
        """Go on with these streams alone, in this order."""
        self.positions = [self.positions[stream] for stream in streams]
        self.logits = self.logits[mx.array(list(streams))]
        self._rows.keep(streams)


class GraphRows:
    """`Rows` by the network itself, an operation at a time."""

    def __init__(self, network: ByteReader, bits: CacheBits) -> None:
        self._network = network
        self._caches: list[GrowingCache] | list[PackedSelfCache] = (
            [GrowingCache() for _ in range(network.config.layers)]
            if bits == CacheBits()
            else [PackedSelfCache(bits) for _ in range(network.config.layers)]
        )

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self._caches)

    def read(self, ids: mx.array) -> mx.array:
        n, total = ids.shape
        step = max(1, SCORES_AT_ONCE // (n * self._network.config.heads * total))
        for start in range(0, total, step):  # blocks whose scores fit the memory
            hidden = self._network.decode(ids[:, start : start + step], self._caches)
            if step < total:
                mx.eval(hidden)
        return self._network.head(hidden[:, -1])

    def keep(self, streams: Sequence[int]) -> None:
        for cache in self._caches:
            cache.keep(mx.array(list(streams)))

    def kept(self) -> ArrayRows:
        layers = [cache.stored() for cache in self._caches]
        return ArrayRows(layers, layers[0][0][0].shape[2])

    def take_up(self, beginning: Beginning) -> None:
        for number, parts in enumerate(beginning.rows.stored()):
            keys, values = ([array[:, :, : beginning.count] for array in part] for part in parts)
            self._caches[number].restore((keys, values))


class PackedSelfCache:
    """A `marlin_cli.models.byt5.SelfCache` in 4 bits (nvfp4) or 8 (mxfp8), in pages, packed as they come.

    Keys and queries are rotated by a Hadamard matrix per head, as in `cache.PackedKeyValueCache`.
    """

    def __init__(self, bits: CacheBits) -> None:
        self._keys, self._values = Pages(bits.keys), Pages(bits.values)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use."""
        return self._keys.nbytes + self._values.nbytes

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, bias: mx.array) -> mx.array:
        rotated = self._keys.append(mx.hadamard_transform(keys))
        return paged_attention(
            mx.hadamard_transform(queries), rotated, self._values.append(values), 1.0, relative_bias=bias
        )  # fmt: skip

    def stored(self) -> tuple[Part, Part]:
        """The rows in use, as `restore` takes them: keys, and values."""
        return self._keys.stored(), self._values.stored()

    def restore(self, parts: tuple[Part, Part]) -> None:
        """Take rows as `stored` gives them, in place of none."""
        self._keys.add(parts[0])
        self._values.add(parts[1])

    def keep(self, rows: mx.array) -> None:
        """Go on with these sequences, in this order."""
        self._keys.keep(rows)
        self._values.keep(rows)
