"""Cached decoding of MegaByte, one byte at a time, for streams that stand at the same byte of their patches."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from marlin_cli.engine.cache import CacheBits, KeyValueCache, check_cache_bits
from marlin_cli.engine.endless import most_ids_of, reach_of
from marlin_cli.engine.finite import not_finite
from marlin_cli.engine.fused import FusedStages, fuse, rotates
from marlin_cli.engine.patches_in_place import PatchesInPlace, Wanted
from marlin_cli.engine.prompt_rows import global_rows, lay_out
from marlin_cli.engine.sampling import Draws, Noise, Sampling, no_noise, sample
from marlin_cli.engine.stage_caches import GraphCache, StageCache
from marlin_cli.engine.states import Beginning, Place, PromptKeeper, StreamState, ids_of, is_cut_anywhere, units_of
from marlin_cli.engine.whole_patches import WholePatches, patch_decoder
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.models.megabyte_config import MegaByteConfig

# Rows of the global transformer fed at once while a prompt is read: bounds the memory of attention.
PREFILL_ROWS = 512


@dataclass
class _StageState:
    """Where decoding stands in one stage: its cache, its tokens so far and what conditions its sequence."""

    cache: StageCache | None = None
    tokens: int = 0
    condition: mx.array | None = None


class Lockstep:
    """Decoding state of a batch of streams at the same byte of their patches; an `engine.continuation.Continuation`.

    The global cache persists; the cache of every finer stage is thrown away with its sequence. The last stage runs when
    it is asked: for the `logits` of the next id, or, where the kernels take a whole sequence, by `advance` alone.

    Args:
        network: the model.
        prompts: the bytes of each stream; `phase` must be equal for all of them.
        cache_bits: bits of the global keys and values.
        keeper: where the beginning of a single prompt may be known, and what is read of it is kept.
        read: are the prompts read at once? Else by `read_slice`.
        decoder: of whole patches on a GPU, instead of the one that is chosen.

    Raises:
        UsageError: `cache_bits` do not fit the network.
    """

    def __init__(
        self,
        network: MegaByte,
        prompts: Sequence[bytes],
        cache_bits: CacheBits | None = None,
        keeper: PromptKeeper | None = None,
        *,
        read: bool = True,
        decoder: WholePatches | None = None,
    ) -> None:
        self.network = network
        self.config = network.config
        self._lucid = self.config.layout == "megabyte_pytorch"
        self._last = len(self.config.stages) - 1
        self._bits = cache_bits or CacheBits()
        head_dim = self.config.stages[0].width_of_head
        if self._bits != CacheBits():
            check_cache_bits(self._bits.keys, self._bits.values, head_dim)
        self._reach = None if self._bits.window is None else reach_of(self.config, self._bits.window)
        self._most = most_ids_of(self.config, self._bits.window)
        self._fused = fused_stages(network, self._bits)
        self._on_gpu = self._patches_on_gpu(len(prompts), decoder)
        self._states = [_StageState() for _ in self.config.stages]
        # Set by the prefill: ids of the open patch [streams, n], the id before it [streams], filler patches [streams].
        self._patch: mx.array
        self._before_patch: mx.array
        self._filler: list[int]
        self._left_padding: mx.array | None = None  # the filler, where there is any
        self._fed = 0  # tokens of the open sequence of the last stage that its cache has seen
        self._logits: mx.array | None = None
        self._sequence_cache_bytes = 0
        self.positions = [len(prompt) for prompt in prompts]
        self._reading = self._prefill(prompts, keeper if len(prompts) == 1 else None)
        while read and self.read_slice():
            pass

    def read_slice(self) -> bool:
        """Read the next rows of the prompts, `PREFILL_ROWS` of each at most; whether any are left. Nothing is drawn before."""
        return next(self._reading, None) is not None

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
        """Bytes in use by part: `global` and `local` (all finer stages; of a sequence decoded in one call, the most in it)."""
        if self._on_gpu is not None and self._on_gpu.going:
            self._on_gpu.decoder.count(self._layers_in_place())
        by_stage = [0 if state.cache is None else state.cache.nbytes for state in self._states]
        return {"global": by_stage[0], "local": sum(by_stage[1:]) or self._sequence_cache_bytes}

    @property
    def part_seconds(self) -> dict[str, float] | None:
        """Seconds of the kernels so far, see `FusedStages.part_seconds`; None where nothing tells parts apart."""
        if self._on_gpu is not None:
            return self._on_gpu.decoder.part_seconds
        return None if self._fused is None else self._fused.part_seconds

    @property
    def logits(self) -> mx.array:
        """Logits [streams, vocab] of the next id of each stream."""
        if self._logits is None:
            self._settle()
            self._logits = self._next_logits()
        return self._logits

    def check_finite(self) -> None:
        """See that what comes next is predicted by numbers; costs a step of the last stage.

        Where a sequence is decoded in one call its logits never leave the kernels, and NaN draws id 0.

        Raises:
            CheckpointError: it is not.
        """
        if max(self.positions) >= self._most:
            return
        if self._on_gpu is not None and self._on_gpu.decoder.checks_logits and self._logits is None:
            return
        finest = self._states[self._last]
        before = self._logits, finest.cache, self._fed, self._sequence_cache_bytes
        finite = mx.isfinite(mx.logsumexp(self.logits, axis=-1)).all().item()
        in_one_call = self._fused is not None or self._on_gpu is not None
        if in_one_call and before[0] is None and before[1] is None:
            # As it was: with logits at hand the next ids would be drawn one at a time.
            self._logits, finest.cache, self._fed, self._sequence_cache_bytes = before
        if not finite:
            raise not_finite()

    def advance(self, sampling: Sampling, noise: Noise, most: int) -> mx.array | np.ndarray:
        """Draw the next ids of the streams and append them: [streams, n], at most `most`; one, or all that a sequence lacks."""
        tokens, length = self._states[self._last].tokens, self.config.stages[self._last].length
        # In megabyte_pytorch the end of a sequence predicts the first id of the next; its first of all is a case of its own.
        steps = length - tokens + (1 if self._lucid else 0)
        steps = min(steps, most, self._most - max(self.positions))
        if self._on_gpu is not None and self._logits is None and steps > 0 and self._on_gpu.decoder.takes(tokens):
            return self._whole_patch(sampling, noise, steps, most)
        self._settle()
        if self._fused is None or self._logits is not None or steps < 1:
            step_noise = noise.take(1)[0] if sampling.temperature else None
            ids = sample(self.logits, sampling, step_noise)[:, None]
        else:
            condition = self._states[self._last].condition
            assert condition is not None
            lead = self.network.leading_row(self._last, self.streams, condition, self._before_patch)[:, 0]
            given = self._tail()
            draws = Draws([sampling], [noise.take(steps) if sampling.temperature else no_noise()])
            self._sequence_cache_bytes = self._fused.sequence_cache_bytes(self.streams, tokens + steps)
            known, places = [tokens] * self.streams, tokens + steps
            found, _ = self._fused.decode_sequence(lead, self.network.additions(condition), given, known, places, draws)
            ids = found[:, tokens:]
            if np.array(ids).min() < 0:
                raise not_finite()
        for start in range(0, ids.shape[1], max(1, length - tokens)):
            self._append(ids[:, start : start + max(1, length - tokens)])
        return ids

    def may_be_drafted(self) -> bool:
        """Let the only stream be drafted from here on, before anything is drawn; False where nothing verifies drafts."""
        return self._on_gpu is not None and self.streams == 1 and self._on_gpu.widen()

    @property
    def most_drafted(self) -> int:
        """Patches that `verify` takes now, of the likeliest ids."""
        return 0 if self._on_gpu is None or not self._on_gpu.going else self._on_gpu.most_drafted

    @property
    def is_ahead(self) -> bool:
        """Is a patch queued that was not asked for yet?"""
        return self._on_gpu is not None and self._on_gpu.is_ahead

    def verify(self, drafts: np.ndarray) -> np.ndarray:
        """The ids [1, n] that come of drafts int32 [patches, patch_size] of the only stream: as `advance` would draw them."""
        assert self._on_gpu is not None
        found = self._on_gpu.verify(self._layers_in_place(), drafts, self._most - self.positions[0])
        self.positions = [self.positions[0] + found.size]
        self._states[0].tokens += len(found) - 1 + self._on_gpu.more
        if not self._on_gpu.more:
            self._settle()
        return found.reshape(1, -1)

    def push(self, ids: mx.array) -> None:
        """Append ids [streams] to the streams.

        At the end of the model's context nothing follows, and `logits` stays as it is.
        """
        self._settle()
        self._append(ids[:, None])

    @property
    def at_boundary(self) -> bool:
        """Do the streams stand where a patch begins, with nothing made of it yet?"""
        if self._on_gpu is not None and self._on_gpu.going:
            return True
        finest, ahead = self._states[self._last], 1 if self._lucid else 0
        return self._patch.shape[1] == finest.tokens == ahead and finest.cache is None and self._logits is None

    def join(self, other: "Lockstep") -> bool:
        """Take in the streams of another batch behind these; the shorter ones are padded before their first row.

        Returns:
            False where nothing was done: both have to stand at a boundary, with caches of MLX, and together they have to be
            decoded as they were apart.
        """
        if self._fused is not None or self._reach is not None or not (self.at_boundary and other.at_boundary):
            return False
        counts = self.streams, other.streams
        on_gpu = self._patches_on_gpu(sum(counts))
        if (on_gpu is None) != (self._on_gpu is None):
            return False
        self._settle()
        other._settle()
        self._on_gpu = on_gpu
        patches = max(self._states[0].tokens, other._states[0].tokens)
        self._filler = [filler + patches - state._states[0].tokens for state in (self, other) for filler in state._filler]
        self._left_padding = mx.array(self._filler) if any(self._filler) else None
        for state, theirs in zip(self._states, other._states, strict=True):
            if state.cache is not None:
                assert isinstance(state.cache, GraphCache) and isinstance(theirs.cache, GraphCache)
                state.cache.join(theirs.cache, counts)
            if state.condition is not None and theirs.condition is not None:
                state.condition = mx.concatenate([state.condition, theirs.condition])
        self._states[0].tokens = patches
        self._patch = mx.concatenate([self._patch, other._patch])
        self._before_patch = mx.concatenate([self._before_patch, other._before_patch])
        self.positions = self.positions + other.positions
        return True

    def keep(self, streams: Sequence[int]) -> None:
        """Go on with these streams alone, in this order."""
        self.positions = [self.positions[stream] for stream in streams]
        if self._on_gpu is not None and self._on_gpu.going:
            self._on_gpu.keep(streams)
            return
        self._keep(streams)
        complete = self._states[self._last].tokens == self.config.stages[self._last].length
        if complete and max(self.positions) < self._most:  # the one for which there was no room is gone
            self._logits = self._logits if self._lucid else None
            self._turn()

    def _keep(self, streams: Sequence[int]) -> None:
        """Drop all that is known of other streams, but for their positions."""
        if self._on_gpu is not None:
            self._on_gpu.decoder.keep(len(streams))
        chosen = mx.array(list(streams))
        self._patch, self._before_patch = self._patch[chosen], self._before_patch[chosen]
        self._filler = [self._filler[stream] for stream in streams]
        self._left_padding = None if self._left_padding is None else self._left_padding[chosen]
        if self._logits is not None:
            self._logits = self._logits[chosen]
        for state in self._states:
            if state.cache is not None:
                state.cache.keep(streams)
            if state.condition is not None:
                state.condition = state.condition[chosen]

    def _whole_patch(self, sampling: Sampling, noise: Noise, steps: int, most: int) -> np.ndarray:
        """The next `steps` ids of the open patch, all of which is decoded on the GPU; `most` are asked for in all."""
        on_gpu = self._on_gpu
        assert on_gpu is not None
        if not on_gpu.draws_on(sampling, noise):
            self._settle()
        finest, layers = self._states[self._last], self._layers_in_place()
        lacking = self.config.patch_size - finest.tokens
        if not on_gpu.going:
            assert finest.condition is not None
            on_gpu.decoder.enter(finest.condition, self._before_patch, self._tail(), layers, self._left_padding)
        room = self._most - max(self.positions) - lacking
        ids = on_gpu.next(layers, sampling, noise, Wanted(steps, lacking, most, room))
        self._sequence_cache_bytes = on_gpu.decoder.sequence_cache_bytes
        if steps < lacking:
            self._settle()
            self._append(mx.array(ids))
            return ids
        if finest.tokens and on_gpu.more:
            self._patch, finest.tokens, finest.cache, self._fed = self._patch[:, :0], 0, None, 0
        self.positions = [position + steps for position in self.positions]
        if on_gpu.more:
            self._states[0].tokens += 1
        else:
            self._settle()
        return ids

    def _patches_on_gpu(self, streams: int, decoder: WholePatches | None = None) -> PatchesInPlace | None:
        """Whole patches of so many streams, by a decoder that is given or chosen; None where they go operation by operation."""
        decoder = decoder or patch_decoder(self.network, streams, self._bits)
        return None if decoder is None else PatchesInPlace(decoder, self.config.patch_size)

    def _layers_in_place(self) -> list[KeyValueCache]:
        cache = self._states[0].cache
        assert isinstance(cache, GraphCache)
        return cache.layers

    def _settle(self) -> None:
        """Before MLX goes on where the GPU has been."""
        left = None if self._on_gpu is None or not self._on_gpu.going else self._on_gpu.settle(self._layers_in_place())
        if left is None:
            return
        ids = left.ids
        if left.condition is not None:
            self._before_patch, self._states[1].condition = mx.array(ids[:, -1]), left.condition
        if left.live is not None:
            self._patch = mx.zeros((ids.shape[0], 0), dtype=mx.int32)
            self._keep(left.live)
            ids = ids[left.live]
        if left.condition is None:  # the context is full
            self.positions = [position - ids.shape[1] for position in self.positions]
            self._append(mx.array(ids))

    def _append(self, ids: mx.array) -> None:
        """Append ids [streams, n] that end no later than the open sequence of the last stage."""
        self.positions = [position + ids.shape[1] for position in self.positions]
        self._patch = mx.concatenate([self._patch, ids.astype(mx.int32)], axis=1)
        finest = self._states[self._last]
        finest.tokens += ids.shape[1]
        full = finest.tokens == self.config.stages[self._last].length
        room = max(self.positions) < self._most
        if room or not full:
            self._logits = None
        if full and self._lucid and (ids.shape[1] == 1 or not room):
            self._logits = self._next_logits()  # the sequence that ends predicts it, and is gone after the turn
        if full and room:
            self._turn()

    def _tail(self) -> mx.array:
        """Ids of the open sequence of the last stage: [streams, n]."""
        return self._patch[:, self._patch.shape[1] - self._states[self._last].tokens :]

    def _next_logits(self) -> mx.array:
        """Feed the last stage what it has not seen yet."""
        state, stage = self._states[self._last], self.config.stages[self._last]
        new = self._tail()[:, self._fed :]
        rows = []
        if state.cache is None:
            state.cache = self._new_cache(self._last)
            rows.append(self.network.leading_row(self._last, self.streams, state.condition, self._before_patch))
        # What follows a whole sequence is the business of the next one, but in megabyte_pytorch.
        if new.shape[1] and (self._lucid or state.tokens < stage.length):
            rows.append(self.network.token_rows(self._last, new[..., None], self._fed, state.condition))
        self._fed = state.tokens
        hidden = state.cache.run(mx.concatenate(rows, axis=1))[:, -1]
        self._sequence_cache_bytes = state.cache.nbytes
        return self.network.head(hidden)

    def _prefill(self, prompts: Sequence[bytes], keeper: PromptKeeper | None) -> Iterator[int]:
        """Read the prompts, coarse to fine; yields the rows of each slice of the global stage but the last."""
        config, units = self.config, units_of(self.config)
        tokens, self._patch, self._before_patch, self._filler = lay_out(prompts, config)
        padding = self._filler if any(self._filler) else []
        self._left_padding = mx.array(padding) if padding else None
        self._states[0].cache = self._new_cache(0, padding)
        beginning = None if keeper is None else keeper.restore(prompts[0])
        places = yield from self._read_global(tokens, self._left_padding, beginning, pauses=keeper is not None)
        self._states[1].condition = places[-1].last
        if keeper is not None and tokens.shape[1]:
            ids, rows = ids_of(prompts[0][: tokens.shape[1] * config.patch_size]), self._states[0].cache.kept()
            keeper.keep(StreamState(ids, units, rows, tuple(places), is_cut_anywhere(config)))
        used = 0
        for number in range(1, self._last):
            width = config.bytes_per_token(number)
            count = max(0, self._patch.shape[1] - used - units.slack) // width
            part = self._patch[:, used : used + count * width].reshape(len(prompts), count, width)
            hidden = self._open(number, part)
            used += count * width
            self._states[number + 1].condition = self.network.to_next(number, hidden)
        finest = self._states[self._last]
        finest.tokens = self._patch.shape[1] - used
        if self._lucid and not any(self.positions):
            self._logits = self.network.logits_of_nothing(len(prompts))
        if self._lucid and finest.tokens == config.stages[self._last].length:
            self._logits = self._next_logits()
            if max(self.positions) < self._most:
                self._turn()

    def _read_global(
        self, tokens: mx.array, padding: mx.array | None, beginning: Beginning | None, *, pauses: bool
    ) -> Generator[int, None, list[Place]]:
        """Feed the global stage its leading row and the patches of the prompts, but for a beginning that is known.

        Args:
            pauses: are the places where reading pauses asked for too?

        Returns:
            Where a single prompt could be taken up later; the last of them says what conditions the next stage.
        """
        cache, count = self._states[0].cache, tokens.shape[1]
        assert cache is not None
        places = [] if beginning is None else list(beginning.places)
        if beginning is not None:
            cache.take_up(beginning)
        rows = global_rows(self.network, tokens, padding, None if beginning is None else beginning.units)
        for start in range(0, rows.shape[1], PREFILL_ROWS):
            hidden = cache.run(rows[:, start : start + PREFILL_ROWS])
            mx.eval(hidden)
            read = min(start + PREFILL_ROWS, rows.shape[1]) + count - rows.shape[1]
            if read == count or (pauses and not is_cut_anywhere(self.config)):
                places.append(Place(read, self.network.to_next(0, hidden[:, -1]), cache.delayed()))
            if read < count:
                yield PREFILL_ROWS
        self._states[0].tokens = count
        return places

    def _turn(self) -> None:
        """A sequence of the last stage is complete: step the stage above, and open those below anew."""
        position = self._patch.shape[1]
        above = next(n for n in range(self._last) if position % self.config.bytes_per_token(n) == 0)
        width = self.config.bytes_per_token(above)
        hidden = self._feed(above, self._patch[:, position - width :][:, None])
        if above == 0:
            self._before_patch = self._patch[:, -1]
            self._patch = self._patch[:, :0]
        for number in range(above + 1, self._last + 1):
            self._states[number].condition = self.network.to_next(number - 1, hidden)
            if number < self._last:
                hidden = self._open(number, mx.zeros((self.streams, 0, self.config.bytes_per_token(number)), dtype=mx.int32))
        finest = self._states[self._last]
        finest.cache, finest.tokens, self._fed = None, 0, 0

    def _open(self, number: int, tokens: mx.array) -> mx.array:
        """Begin a sequence of a middle stage: its leading row, then tokens [streams, n, width]; the last hidden row."""
        state = self._states[number]
        state.cache, state.tokens = self._new_cache(number), tokens.shape[1]
        rows = self.network.leading_row(number, self.streams, state.condition, self._before_patch)
        if tokens.shape[1]:
            rows = mx.concatenate([rows, self.network.token_rows(number, tokens, 0, state.condition)], axis=1)
        return state.cache.run(rows)[:, -1]

    def _feed(self, number: int, token: mx.array) -> mx.array:
        """Append one token [streams, 1, width] to the open sequence of a stage; the hidden row [streams, dim]."""
        state = self._states[number]
        assert state.cache is not None
        index = state.tokens if number > 0 else mx.array([state.tokens - filler for filler in self._filler])
        rows = self.network.token_rows(number, token, index, state.condition)
        state.tokens += 1
        return state.cache.run(rows)[:, -1]

    def _new_cache(self, number: int, padding: Sequence[int] = ()) -> StageCache:
        bits = self._bits if number == 0 else CacheBits()
        if self._fused is not None:
            return self._fused.new_cache(number, self.streams, padding, bits)
        stage = self.network.stages[number]
        return GraphCache(stage.stack, stage.config, number > 0, padding, bits, self._reach if number == 0 else None)


def fused_stages(network: MegaByte, bits: CacheBits) -> FusedStages | None:
    """The fused stages of a network, or None where no kernels run that know its layers and a cache of so many bits."""
    return fuse(network) if rotates(network.config.stages[0].width_of_head, bits) else None
