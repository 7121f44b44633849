"""Cached decoding of MegaByte, one byte at a time, for streams that stand at the same byte of their patches."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from marlin_cli.engine.cache import KeyValueCache, PackedKeyValueCache, check_cache_bits
from marlin_cli.models.megabyte import MegaByte, MegaByteConfig

# Rows of the global transformer fed at once while a prompt is read: bounds the memory of attention.
PREFILL_ROWS = 512


@dataclass(frozen=True)
class CacheBits:
    """Bits of the global cache's keys and values. The local cache is a patch long and never packed."""

    keys: int = 16
    values: int = 16


@dataclass
class _StageState:
    """Where decoding stands in one stage: its caches, its tokens so far and what conditions its sequence."""

    caches: list[KeyValueCache] = field(default_factory=list)
    tokens: int = 0
    condition: mx.array | None = None


class Lockstep:
    """Decoding state of a batch of streams at the same byte of their patches.

    The global cache persists; the cache of every finer stage is thrown away with its sequence. `logits`
    [streams, vocab] always predicts the next id of each stream.

    Args:
        network: the model.
        prompts: the bytes of each stream; `phase` must be equal for all of them.
        cache_bits: bits of the global keys and values.

    Raises:
        UsageError: `cache_bits` do not fit the network.
    """

    def __init__(self, network: MegaByte, prompts: Sequence[bytes], cache_bits: CacheBits | None = None) -> None:
        self.network = network
        self.config = network.config
        self._lucid = self.config.layout == "megabyte_pytorch"
        self._last = len(self.config.stages) - 1
        self._bits = cache_bits or CacheBits()
        if self._bits != CacheBits():
            check_cache_bits(self._bits.keys, self._bits.values, self.config.stages[0].width_of_head)
        self._states = [_StageState() for _ in self.config.stages]
        # Set by the prefill: ids of the open patch [streams, n], the id before it [streams], patches read [streams].
        self._patch: mx.array
        self._before_patch: mx.array
        self._global_tokens: mx.array
        self.positions = [len(prompt) for prompt in prompts]
        self.logits = self._prefill(prompts)

    @staticmethod
    def phase(config: MegaByteConfig, prompt_bytes: int) -> tuple[int, bool]:
        """Prompts of equal phase can be decoded in lockstep."""
        # An empty prompt is predicted by a leading row, a whole patch of megabyte_pytorch by its last row.
        return prompt_bytes % config.patch_size, config.layout == "megabyte_pytorch" and prompt_bytes == 0

    @property
    def streams(self) -> int:
        """Streams in the batch."""
        return len(self.positions)

    @property
    def cache_bytes(self) -> dict[str, int]:
        """Bytes in use by part: `global` and `local` (all finer stages)."""
        by_stage = [sum(cache.nbytes for cache in state.caches) for state in self._states]
        return {"global": by_stage[0], "local": sum(by_stage[1:])}

    def push(self, ids: mx.array) -> None:
        """Append ids [streams] to the streams and predict what follows.

        At the end of the model's context nothing follows, and `logits` stays as it is.
        """
        self.positions = [position + 1 for position in self.positions]
        self._patch = mx.concatenate([self._patch, ids[:, None]], axis=1)
        finest = self._states[self._last]
        full = finest.tokens + 1 == self.config.stages[self._last].length
        if self._lucid or not full:
            self.logits = self._head(self._feed(self._last, ids[:, None, None]))
        if full and max(self.positions) < self.config.max_bytes:
            self._turn()

    def keep(self, streams: Sequence[int]) -> None:
        """Go on with these streams alone, in this order."""
        self.positions = [self.positions[stream] for stream in streams]
        chosen = mx.array(list(streams))
        self._patch, self._before_patch = self._patch[chosen], self._before_patch[chosen]
        self.logits, self._global_tokens = self.logits[chosen], self._global_tokens[chosen]
        for state in self._states:
            for cache in state.caches:
                cache.keep(chosen)
            if state.condition is not None:
                state.condition = state.condition[chosen]

    def _prefill(self, prompts: Sequence[bytes]) -> mx.array:
        """Read the prompts, coarse to fine, and return the logits of what follows."""
        config = self.config
        # megabyte_pytorch predicts from the patch that ends a prompt, so that patch is read by the finer stages.
        slack = 1 if self._lucid else 0
        patches = [max(0, len(prompt) - slack) // config.patch_size for prompt in prompts]
        most = max(patches)
        starts = [count * config.patch_size for count in patches]
        whole = np.zeros((len(prompts), most * config.patch_size), dtype=np.int32)
        for row, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
            whole[row, whole.shape[1] - start :] = np.frombuffer(prompt[:start], dtype=np.uint8)
        rest = [prompt[start:] for prompt, start in zip(prompts, starts, strict=True)]
        self._patch = mx.array(np.array([list(part) for part in rest], dtype=np.int32).reshape(len(rest), -1))
        before = [prompt[start - 1] if start else config.bos_byte for prompt, start in zip(prompts, starts, strict=True)]
        self._before_patch = mx.array(before)
        self._global_tokens = mx.array(patches)
        padding = mx.array([most - count for count in patches]) if len(set(patches)) > 1 else None
        self._states[0].caches = [self._global_cache(padding) for _ in range(config.global_layers)]
        tokens = mx.array(whole.reshape(len(prompts), most, config.patch_size))
        hidden = self._read_global(tokens, padding)
        self._states[1].condition = self.network.to_next(0, hidden)
        used = 0
        for number in range(1, self._last + 1):
            width = config.bytes_per_token(number)
            left = self._patch.shape[1] - used
            count = left if number == self._last else max(0, left - slack) // width
            part = self._patch[:, used : used + count * width].reshape(len(prompts), count, width)
            hidden = self._open(number, part)
            used += count * width
            if number < self._last:
                self._states[number + 1].condition = self.network.to_next(number, hidden)
        logits = self._head(hidden)
        if self._lucid and not any(self.positions):
            logits = self.network.logits_of_nothing(len(prompts))
        if self._lucid and self._states[self._last].tokens == config.stages[self._last].length:
            if max(self.positions) < config.max_bytes:
                self._turn()
        return logits

    def _read_global(self, tokens: mx.array, padding: mx.array | None) -> mx.array:
        """Feed the global stage its leading row and the patches of the prompts; the last hidden row."""
        batch, count, _ = tokens.shape
        first: int | mx.array = 0 if padding is None else -padding
        lead = self.network.leading_row(0, batch, None, None)
        rows = self.network.token_rows(0, tokens, first, None)
        if padding is None:
            rows = mx.concatenate([lead, rows], axis=1)
        else:
            # A filler patch stands where nothing is read; the leading row follows the filler of each stream.
            where = mx.arange(count + 1)[None, :, None]
            at = padding[:, None, None]
            shifted = mx.concatenate([lead, rows], axis=1)
            rows = mx.where(where == at, lead, mx.where(where < at, mx.zeros_like(shifted), shifted))
        stack = self.network.stages[0].stack
        hidden = rows
        for start in range(0, count + 1, PREFILL_ROWS):
            hidden = stack(rows[:, start : start + PREFILL_ROWS], self._states[0].caches)
            mx.eval(hidden)
        self._states[0].tokens = count
        return hidden[:, -1]

    def _turn(self) -> None:
        """A sequence of the last stage is complete: step the stage above, and open those below anew."""
        position = self._patch.shape[1]
        above = next(n for n in range(self._last) if position % self.config.bytes_per_token(n) == 0)
        width = self.config.bytes_per_token(above)
        hidden = self._feed(above, self._patch[:, position - width :][:, None])
        if above == 0:
            self._before_patch = self._patch[:, -1]
            self._patch = self._patch[:, :0]
            self._global_tokens = self._global_tokens + 1
        for number in range(above + 1, self._last + 1):
            self._states[number].condition = self.network.to_next(number - 1, hidden)
            nothing = mx.zeros((self.streams, 0, self.config.bytes_per_token(number)), dtype=mx.int32)
            hidden = self._open(number, nothing)
        if not self._lucid:
            self.logits = self._head(hidden)

    def _open(self, number: int, tokens: mx.array) -> mx.array:
        """Begin a sequence of a finer stage: its leading row, then tokens [streams, n, width]; the last hidden row."""
        state, stage = self._states[number], self.config.stages[number]
        state.caches = [KeyValueCache(rows_per_step=stage.length + 1) for _ in range(stage.layers)]
        state.tokens = tokens.shape[1]
        rows = self.network.leading_row(number, self.streams, state.condition, self._before_patch)
        if tokens.shape[1]:
            rows = mx.concatenate([rows, self.network.token_rows(number, tokens, 0, state.condition)], axis=1)
        return self.network.stages[number].stack(rows, state.caches)[:, -1]

    def _feed(self, number: int, token: mx.array) -> mx.array:
        """Append one token [streams, 1, width] to the open sequence of a stage; the hidden row [streams, dim]."""
        state = self._states[number]
        index = self._global_tokens if number == 0 else state.tokens
        rows = self.network.token_rows(number, token, index, state.condition)
        state.tokens += 1
        return self.network.stages[number].stack(rows, state.caches)[:, -1]

    def _head(self, hidden: mx.array) -> mx.array:
        return self.network.head(hidden)

    def _global_cache(self, padding: mx.array | None) -> KeyValueCache:
        if self._bits == CacheBits():
            return KeyValueCache(padding)
        return PackedKeyValueCache(self._bits.keys, self._bits.values, padding)
