"""What each byte of a stream costs a model, however long the stream is: the scorers of both kinds of windows.

A scorer is given bytes as they come and tells what each of them cost, given those before it that are in view. It takes as many
at once as it is given, a patch that is not whole yet included; where a stream is given in other portions numbers differ by
rounding alone, and not at all in portions of `portion` bytes.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.decoding import fused_stages
from marlin_cli.engine.endless import reach_of
from marlin_cli.engine.finite import not_finite
from marlin_cli.engine.scoring import costs, of_bytes
from marlin_cli.engine.stage_caches import GraphCache, StageCache, StageMemory
from marlin_cli.errors import UsageError
from marlin_cli.models import Network
from marlin_cli.models.megabyte import MegaByte

Floats = npt.NDArray[np.float32]

# Patches that go through the network together: bounds the memory of attention.
PATCHES_AT_ONCE = 512


class ScorerMemory(NamedTuple):
    """What a scorer remembers: arrays, evaluated, and plain facts beside them."""

    arrays: Mapping[str, mx.array]
    facts: Mapping[str, str]


class StreamScorer(Protocol):
    """Bits that each byte of one stream costs.

    Attributes:
        seen: bytes so far.
    """

    seen: int

    @property
    def portion(self) -> int:
        """How many bytes are best given next."""

    def score(self, data: bytes) -> Floats:
        """Bits that each of the next bytes costs: [len(data)].

        Raises:
            CheckpointError: predictions that are not finite.
        """

    def memory(self) -> ScorerMemory:
        """All that is remembered of the stream."""

    def remember(self, memory: ScorerMemory) -> None:
        """Go on from what `memory` gave, in place of nothing.

        Raises:
            ValueError, KeyError: it is not that of such a scorer.
        """


def stream_scorer(network: Network, bits: CacheBits) -> StreamScorer:
    """The scorer of a stream, in the window that `bits` names.

    Raises:
        UsageError: a network that cannot have such a window, or such a cache.
    """
    assert bits.window is not None
    if bits.window.restarts:
        if bits.is_packed or bits.share_left is not None:
            raise UsageError(
                "--window restart scores each context anew, without a cache: --kv-bits and --sparse change nothing"
            )
        return RestartingScorer(network)
    reach_of(network.config, bits.window)
    assert isinstance(network, MegaByte)
    return PatchScorer(network, bits)


class PatchScorer:
    """Scores a stream by a MegaByte whose global rows are in a window.

    The patch before the open one is read by the finer stages once more with each portion, as in some layouts it predicts the
    first byte after it or is read by its last; what it gives itself is known already.
    """

    def __init__(self, network: MegaByte, bits: CacheBits) -> None:
        self._network, self._patch = network, network.config.patch_size
        self._bits = bits
        self._fused = fused_stages(network, bits)
        self._cache = self._new_cache()
        self.seen = 0
        # Bytes of the patch before the open one and of that, and the rows [n, dim] that the global stage gave for both.
        self._before, self._open = b"", b""
        self._hidden = self._cache.run(network.leading_row(0, 1, None, None))[0]

    @property
    def portion(self) -> int:
        whole = PATCHES_AT_ONCE * self._patch
        return whole - self.seen % whole

    @property
    def pages_read(self) -> list[tuple[int, int]]:
        """See `FusedStages.pages_read`."""
        return [] if self._fused is None else self._fused.pages_read

    def score(self, data: bytes) -> Floats:
        found = []
        while data:
            part, data = data[: self.portion], data[self.portion :]
            found.append(self._score(part))
        return np.concatenate(found) if found else np.zeros(0, dtype=np.float32)

    def _score(self, new: bytes) -> Floats:
        """At most a portion."""
        network, size = self._network, self._patch
        text, known = self._before + self._open + new, len(self._before) + len(self._open)
        whole = len(text) // size  # patches
        first = len(self._before) // size  # of those that the global stage has not seen
        ids = mx.array(np.frombuffer(text, dtype=np.uint8).astype(np.int32))[None]
        hidden = self._hidden
        if whole > first:
            patches = ids[:, first * size : whole * size].reshape(1, whole - first, size)
            hidden = mx.concatenate([hidden, self._cache.run(network.token_rows(0, patches, 0, None))[0]])

        def run(number: int, rows: mx.array) -> mx.array:
            if number == 0:
                return hidden[None, : rows.shape[1]]
            if self._fused is not None:
                return self._fused.run_stage(number, rows)
            return network.stages[number].stack(rows)

        if self._fused is not None:
            nats = self._fused.costs(ids, run)
        else:
            logits = network(ids, run)
            nats = mx.logsumexp(logits, axis=-1) - of_bytes(network, logits, ids)
        mx.eval(nats, hidden)
        bits: Floats = np.array(nats[0, known:] / math.log(2))
        if not np.isfinite(bits).all():
            raise not_finite()
        begins = max(0, (whole - 1) * size)
        self._before, self._open = text[begins : whole * size], text[whole * size :]
        self._hidden = mx.contiguous(hidden[max(0, whole - 1) :])
        self.seen += len(new)
        return bits

    def memory(self) -> ScorerMemory:
        memory = self._cache.memory()
        arrays = {
            f"{layer}.{name}.{number}": array
            for layer, both in enumerate(memory.layers)
            for name, part in zip(("keys", "values"), both, strict=True)
            for number, array in enumerate(part)
        }
        arrays |= {f"{layer}.delayed": array for layer, array in enumerate(memory.delayed)}
        arrays["hidden"] = self._hidden
        mx.eval(arrays)
        facts = {"seen": str(self.seen), "dropped": str(memory.dropped), "text": (self._before + self._open).hex()}
        return ScorerMemory(arrays, facts)

    def remember(self, memory: ScorerMemory) -> None:
        arrays, facts, own = memory.arrays, memory.facts, self.memory().arrays
        seen, dropped, text = int(facts["seen"]), int(facts["dropped"]), bytes.fromhex(facts["text"])
        if {name: _kind(array) for name, array in own.items()} != {name: _kind(array) for name, array in arrays.items()}:
            raise ValueError("it is of another kind")
        before = self._patch if seen >= self._patch else 0
        rows = {array.shape[2] for name, array in arrays.items() if ".keys." in name or ".values." in name}
        fits = dropped >= 0 and rows == {1 + seen // self._patch - dropped} and len(text) == before + seen % self._patch
        if not fits or arrays["hidden"].shape[0] != (2 if before else 1):
            raise ValueError("its parts do not fit each other")
        layers = []
        for layer in range(self._network.config.stages[0].layers):
            parts = [
                [arrays[name] for n in range(2) if (name := f"{layer}.{kind}.{n}") in arrays] for kind in ("keys", "values")
            ]
            layers.append((parts[0], parts[1]))
        delayed = tuple(arrays[name] for layer in range(len(layers)) if (name := f"{layer}.delayed") in arrays)
        self._cache = self._new_cache()
        self._cache.remember(StageMemory(layers, dropped, delayed))
        self._before, self._open, self._hidden, self.seen = text[:before], text[before:], arrays["hidden"], seen

    def _new_cache(self) -> StageCache:
        if self._fused is not None:
            return self._fused.new_cache(0, 1, [], self._bits)
        stage = self._network.stages[0]
        reach = None if self._bits.window is None else reach_of(self._network.config, self._bits.window)
        return GraphCache(stage.stack, stage.config, False, [], self._bits, reach)


class RestartingScorer:
    """Scores a stream by any network: the last half of the context is read again when it is full."""

    def __init__(self, network: Network) -> None:
        self._network, self._context = network, int(network.config.max_bytes)
        self._text = b""  # what is in view
        self.seen = 0

    @property
    def portion(self) -> int:
        return self._context - len(self._text)

    def score(self, data: bytes) -> Floats:
        found = []
        while data:
            part, data = data[: self.portion], data[self.portion :]
            window = np.frombuffer(self._text + part, dtype=np.uint8).astype(np.int32)
            bits = np.array(costs(self._network, mx.array(window)[None])[0, len(self._text) :])
            if not np.isfinite(bits).all():
                raise not_finite()
            found.append(bits)
            self._text += part
            self.seen += len(part)
            if self.portion == 0:
                self._text = self._text[(self._context + 1) // 2 :]
        return np.concatenate(found) if found else np.zeros(0, dtype=np.float32)

    def memory(self) -> ScorerMemory:
        return ScorerMemory({}, {"seen": str(self.seen), "text": self._text.hex()})

    def remember(self, memory: ScorerMemory) -> None:
        text, seen = bytes.fromhex(memory.facts["text"]), int(memory.facts["seen"])
        if memory.arrays or len(text) >= self._context or len(text) > seen:
            raise ValueError("its parts do not fit each other")
        self._text, self.seen = text, seen


def _kind(array: mx.array) -> tuple[mx.Dtype, tuple[int, ...]]:
    """Type and shape of what is remembered, whatever its number of rows."""
    return array.dtype, (*array.shape[:-2], array.shape[-1])
