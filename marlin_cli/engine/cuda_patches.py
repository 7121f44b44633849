"""Decoding of whole patches on an NVIDIA GPU: two launches a patch, ids and conditions stay on the device.

`patch_decoder` chooses; what it does not take goes operation by operation (`decoding`).
"""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from marlin_cli.engine.cache import ROWS_PER_PAGE, CacheBits, KeyValueCache, PackedKeyValueCache
from marlin_cli.engine.cuda_layers import Prepared, linear_arrays, prepared, say_once
from marlin_cli.engine.cuda_noise import NoiseAhead, bytes_of
from marlin_cli.engine.cuda_pages import PagesOnDevice
from marlin_cli.engine.drafts import common_length
from marlin_cli.engine.finite import not_finite
from marlin_cli.engine.sampling import Noise, Sampling
from marlin_cli.errors import BackendError
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.models.megabyte_config import StageConfig
from marlin_cli.models.megabyte_layers import Block, Stack, VarianceNorm
from marlin_cli.models.splitting import share_of
from marlin_cli.ops.cuda_arrays import LayerArrays, LinearArrays, StageArrays
from marlin_cli.ops.cuda_blocks import block_diagonal, identity
from marlin_cli.ops.cuda_compile import compiled
from marlin_cli.ops.cuda_driver import Queue
from marlin_cli.ops.cuda_exchange import Exchange
from marlin_cli.ops.cuda_mailbox import MOST_IDS, NOT_FINITE
from marlin_cli.ops.cuda_stages import MOST_STREAMS, StageOnDevice, addresses, size_for, takes_stage

NORMS = {nn.RMSNorm: "rmsnorm", nn.LayerNorm: "layernorm", VarianceNorm: "variance"}


MOST_STREAMS_IN_ALL = 64  # in groups of as many as one launch takes
# Parts of a model by what the time of a launch goes to; "" stands for the rest.
GLOBAL_PARTS = {"attention": "global cache", "": "global"}
LOCAL_PARTS = {"attention": "local cache", "last": "head", "drawing": "sampling", "": "local"}
# Patches of one stream that a launch of the local stage writes where they may be drafted: the one that is due, and drafts.
SEQUENCES = 8
LIKELIEST = 0.0, 1.0, 0.0, 0  # filters of a draw that takes the likeliest id
SLOTS = 4  # patches whose ids and conditions are kept: what is queued, and what it follows


class Patch(NamedTuple):
    """A patch that has been queued."""

    numbers: tuple[int, ...]  # of the launches of each group; see `PatchDecoder.read`
    slot: int  # where its ids and the condition of the patch that follows are
    more: bool  # whether that condition is made
    steps: int  # ids drawn


class _Group(NamedTuple):
    """Streams that a launch takes, and their stages."""

    first: int
    live: int
    whole: StageOnDevice | None  # None where the global stage goes operation by operation
    local: StageOnDevice


class PatchDecoder:
    """Queues patches; a `whole_patches.WholePatches`. Made by `patch_decoder`.

    Args:
        stages: the network's global and local stage; no global one where MLX takes its steps, see `SharedByOperations`.
        added: [patch_size, dim] what is added to the rows of a patch.
        streams: in the batch.
        bits: of the global cache.
        exchange: with the other ranks, where they share the global stage.
        timed: for `part_seconds`; patches take a little longer.
    """

    checks_logits = True

    def __init__(
        self,
        stages: tuple[StageArrays | None, StageArrays],
        added: mx.array,
        streams: int,
        bits: CacheBits | None = None,
        exchange: Exchange | None = None,
        *,
        timed: bool = False,
    ) -> None:
        self._slotted = stages[1].slots > 1
        self._leading_id = stages[1].leading_id
        self._timed, self._pages = timed, PagesOnDevice(bits or CacheBits())
        self._stages, self._exchange = stages, exchange
        self._places: list[list[int] | None] = [None, None]  # of the arrays of each stage, once they have been asked for
        self._added, self._steps = added, added.shape[0]
        self._queue = Queue() if exchange is None else exchange.queue
        self._rows = self._room = self._uncounted = 0  # of the global cache: rows, room behind them, rows it does not know of
        self._noise = NoiseAhead(self._queue, stages[1].last.rows)
        self._sequences = 1  # of a stream that the local stage writes at once
        self._make(streams)

    @property
    def part_seconds(self) -> dict[str, float] | None:
        """Seconds of the launches so far, as the first block of each saw them; None unless made `timed`."""
        if not self._timed:
            return None
        found = dict.fromkeys(("global", "global cache", "local", "local cache", "head", "sampling"), 0.0)
        for group in self._groups:
            for device, parts in ((group.whole, GLOBAL_PARTS), (group.local, LOCAL_PARTS)):
                for kind, seconds in ({} if device is None else device.seconds()).items():
                    found[parts.get(kind, parts[""])] += seconds
        return found

    @property
    def sequence_cache_bytes(self) -> int:
        """Bytes of the local stage's cache."""
        return sum(group.local.cache_bytes for group in self._groups)

    def keep(self, streams: int) -> None:
        """Go on with fewer streams, all that was queued being settled."""
        self._wanted = streams  # they may well go on elsewhere, and other kernels take a while

    @staticmethod
    def takes(given: int) -> bool:
        """Can it go on in a patch in which so many ids stand already?"""
        return True

    def enter(
        self, condition: mx.array, before: mx.array, given: mx.array, caches: Sequence[KeyValueCache], padding: mx.array | None
    ) -> None:
        """Go on from what MLX has made.

        Args:
            condition: [streams, slots, dim] of the open patch.
            before: [streams] the id before it.
            given: [streams, n] ids that stand in it already.
            caches: of what came before it.
            padding: [streams] filler rows of the caches.
        """
        if self._wanted != self._streams:
            self._make(self._wanted)
        if self._exchange is not None:
            self._queue.wait()  # before MLX sums over ranks, see `Ranks.settle`
        mx.eval(condition, before, given)
        self._known = given.shape[1]
        if self._known:
            self._queue.write(self._given.address, np.array(given, dtype=np.int32).tobytes())
        if self._slotted:
            first = np.zeros((self._streams, self._steps), np.int32)
            first[:, 0] = self._leading_id if self._leading_id is not None else np.array(before)
            self._queue.write(self._first.address, first.tobytes())
            self._before = self._first.address
        self._slot, entered = 0, mx.contiguous(condition)
        if padding is not None:
            self._queue.write(self._padding.address, np.array(padding, dtype=np.int32).tobytes())
        self._padded = padding is not None
        (place,) = self._give_room(caches, entered)
        self._queue.copy(self._entry.address, place, entered.nbytes)
        self._queue.wait()  # before it goes
        self._lead = self._entry.address

    def queue(self, caches: Sequence[KeyValueCache], sampling: Sampling, noise: Noise, more: bool) -> Patch:
        """Queue the next patch, and the global step after it if there is to be `more`."""
        known, steps = self._known, self._steps - self._known
        self._known = 0
        drawn = self._noise.take(noise, steps) if sampling.temperature else 0
        filters = sampling.temperature, sampling.top_p, sampling.min_p, sampling.top_k
        ids, slot = self._ids_of(self._slot), self._slot
        given = self._given.address if known else 0
        numbers = []
        for group in self._groups:
            first = 4 * group.first
            places = self._lead + group.first * self._row_bytes, self._added_there.address, given and given + first * known
            own, before = ids + first * self._steps, self._before and self._before + first * self._steps
            numbers.append(group.local.decode_sequence(*places, drawn, filters, known, steps, own, before))
        if more:
            self._follow(caches, slot)
        self._slot = (slot + 1) % SLOTS
        return Patch(tuple(numbers), slot, more, steps)

    def _follow(self, caches: Sequence[KeyValueCache], slot: int) -> None:
        """Take the global step after the patch of a slot: what leads the next one."""
        if self._room == 0:
            self.settle(caches)
            self._give_room(caches)
        self._lead = self._condition_of(slot)
        if self._slotted and self._leading_id is None:
            self._before = self._ids_of(slot) + 4 * (self._steps - 1)
        for group in self._groups:
            assert group.whole is not None
            padding = self._padding.address + 4 * group.first if self._padded else 0
            out = self._lead + group.first * self._row_bytes
            group.whole.step(self._ids_of(slot) + 4 * group.first * self._steps, self._rows, padding, out)
        self._rows, self._room, self._uncounted = self._rows + 1, self._room - 1, self._uncounted + 1

    def read(self, patch: Patch) -> np.ndarray:
        """The ids [streams, steps] drawn in a patch, waited for.

        Raises:
            BackendError: the GPU did not finish it, or another rank's did not.
            CheckpointError: some were predicted by what is no number.
        """
        found = []
        for group, number in zip(self._groups, patch.numbers, strict=True):
            assert group.local.mailbox is not None
            found.append(group.local.mailbox.read(number, group.local.streams, patch.steps)[: group.live])
        self._check()
        ids = np.concatenate(found)
        if (ids == NOT_FINITE).any():
            raise not_finite()
        return ids

    def condition(self, patch: Patch) -> mx.array:
        """The condition [streams, slots, dim] of what follows a patch queued last, or last but one. Raises as `read`."""
        dtype, shape = self._stages[1].table.dtype, (self._streams, self._stages[1].slots, self._stages[1].dim)
        data = self._queue.read(self._condition_of(patch.slot), self._streams * self._row_bytes)
        self._check()
        if dtype == mx.float32:
            return mx.array(np.frombuffer(data, np.float32).reshape(shape))
        return mx.array(np.frombuffer(data, np.uint16).reshape(shape)).view(dtype)

    def take_back(self, patch: Patch, sampling: Sampling, steps: int) -> None:
        """Forget the last steps of the patch that was queued last, and what followed it."""
        if sampling.temperature:
            self._noise.give_back(steps)
        if patch.more:
            self._rows, self._room, self._uncounted = self._rows - 1, self._room + 1, self._uncounted - 1

    @property
    def most_drafted(self) -> int:
        """Patches that `verify` takes now."""
        return min(self._sequences - 1, self._room)

    def widen(self) -> bool:
        """Write several patches of its only stream at once from here on, where nothing is queued; False: it cannot.

        A launch of more sequences may round otherwise: so each patch goes through one of as many, drafted or not.
        """
        local, at_once = self._stages[1], SEQUENCES
        while at_once > 1 and (at_once * self._steps > MOST_IDS or not takes_stage(local, at_once)):
            at_once //= 2
        if self._streams > 1 or self._exchange is not None or at_once == 1:
            return False
        if self._sequences < at_once:
            self._sequences = at_once
            self._make(1)
        return True

    def verify(self, caches: Sequence[KeyValueCache], drafts: np.ndarray, room: int) -> tuple[Patch, np.ndarray]:
        """Write the next patch of its only stream and those behind drafts of it, the likeliest ids.

        The global stage takes the drafts one after the other, as it would without; the local stage writes all patches in one
        launch. What it wrote behind the first draft that was wrong is nothing, and the rows of these drafts are taken back.

        Args:
            drafts: int32 [n, patch_size] of the next patch and those behind it, `most_drafted` at most.
            room: ids that the context has.

        Returns:
            The last patch that counts, and the ids [1 + right, patch_size] of all.

        Raises: as `read`.
        """
        (group,), lead, slot = self._groups, self._lead, self._slot
        assert group.whole is not None and group.local.mailbox is not None
        padding = self._padding.address if self._padded else 0
        self._queue.write(self._given.address, np.ascontiguousarray(drafts, dtype=np.int32).tobytes())
        for number in range(len(drafts)):
            place = self._given.address + 4 * self._steps * number
            group.whole.step(place, self._rows + number, padding, lead + (number + 1) * self._row_bytes)
        ids = self._ids_of(slot)
        number = group.local.decode_sequence(lead, self._added_there.address, 0, 0, LIKELIEST, 0, self._steps, ids)
        found = group.local.mailbox.read(number, group.local.streams, self._steps)[: 1 + len(drafts)]
        self._check()
        right = common_length(found.tolist(), drafts.tolist())
        found, more = found[: 1 + right], room > (1 + right) * self._steps
        if (found == NOT_FINITE).any():
            raise not_finite()
        self._rows, self._room, self._uncounted = self._rows + right, self._room - right, self._uncounted + right
        if more:
            self._queue.copy(ids, ids + 4 * self._steps * right, 4 * self._steps)
            self._follow(caches, slot)
        self._slot = (slot + 1) % SLOTS
        return Patch((), slot, more, self._steps), found

    def count(self, caches: Sequence[KeyValueCache]) -> None:
        """Tell the global cache of the rows that have been queued."""
        for cache in caches:
            cache.wrote(self._uncounted)
        self._uncounted = 0

    def settle(self, caches: Sequence[KeyValueCache]) -> None:
        """Wait for all that has been queued: before MLX reads or writes the caches, which it does not know to have changed.

        Raises:
            BackendError: the GPU did not finish it.
        """
        self.count(caches)
        self._queue.wait()
        self._check()
        self._room = 0

    def _check(self) -> None:
        """See that no global step that has ended gave up waiting."""
        for group in self._groups:
            if group.whole is not None:
                group.whole.check()

    def give_back_noise(self, noise: Noise) -> None:
        """Give back what was drawn ahead and not used."""
        self._noise.close(noise)

    def _give_room(self, caches: Sequence[KeyValueCache], *others: mx.array) -> list[int]:
        """Have the global stage's launches find the caches, and room behind them. Where the other arrays stand."""
        packed = [cache for cache in caches if isinstance(cache, PackedKeyValueCache)]
        if packed:
            stages = [(group.first, group.whole) for group in self._groups if group.whole is not None]
            self._rows = caches[0].rows
            self._room = ROWS_PER_PAGE - self._rows % ROWS_PER_PAGE
            return self._pages.use(packed, stages, *others)
        storage = [cache.with_room() for cache in caches]
        arrays = [array for pair in storage for array in pair]
        found = addresses([*arrays, *others])
        places, found = found[: len(arrays)], found[len(arrays) :]
        for group in self._groups:
            assert group.whole is not None
            bytes_before = [group.first * (array.nbytes // array.shape[0]) for array in arrays]
            own = [place + before for place, before in zip(places, bytes_before, strict=True)]
            group.whole.use_caches(arrays, own)
        self._rows, self._room = caches[0].rows, storage[0][0].shape[2] - caches[0].rows
        return found

    def _make(self, streams: int) -> None:
        self._streams = self._wanted = streams
        self._sequences = self._sequences if streams == 1 else 1
        self._groups: list[_Group] = []
        for first in range(0, streams, MOST_STREAMS):
            self._groups.append(self._group(first, min(MOST_STREAMS, streams - first)))
        finest = self._stages[1]
        self._row_bytes = finest.slots * finest.dim * finest.table.dtype.size
        room = sum(group.local.streams for group in self._groups)  # filler among them
        self._condition_bytes = room * self._row_bytes
        self._ids_bytes = 4 * room * self._steps
        self._entry = self._queue.allocate(self._condition_bytes)
        self._kept = self._queue.allocate(SLOTS * (self._apart(self._condition_bytes) + self._apart(self._ids_bytes)))
        self._added_there = self._queue.allocate(self._added.nbytes)
        self._queue.write(self._added_there.address, bytes_of(self._added))
        self._padding, self._given = self._queue.allocate(4 * room), self._queue.allocate(self._ids_bytes)
        self._first, self._before = self._queue.allocate(self._ids_bytes), 0
        self._padded, self._room, self._lead, self._slot, self._known = False, 0, 0, 0, 0

    def _group(self, first: int, live: int) -> _Group:
        """Stages for so many streams from `first` on."""
        whole, local = self._stages
        size = size_for(live)

        def on_device(number: int, stage: StageArrays, exchange: Exchange | None, sequences: int = 1) -> StageOnDevice:
            known, rows, own = self._places[number], max(size, sequences), max(live, sequences)
            made = StageOnDevice(stage, rows, self._steps, self._queue, known, exchange, live=own, timed=self._timed)
            self._places[number] = made.known
            return made

        alone = None if whole is None else on_device(0, whole, self._exchange)
        devices = alone, on_device(1, local, None, self._sequences)
        present = [device for device in devices if device is not None]
        for device, code in zip(present, _machine_code(*(device.text for device in present)), strict=True):
            device.load(code)
        devices[1].own_caches(self._steps)
        return _Group(first, live, *devices)

    @staticmethod
    def _apart(size: int) -> int:
        return -(-size // 256) * 256

    def _condition_of(self, slot: int) -> int:
        return self._kept.address + slot * self._apart(self._condition_bytes)

    def _ids_of(self, slot: int) -> int:
        return self._kept.address + SLOTS * self._apart(self._condition_bytes) + slot * self._apart(self._ids_bytes)


def why_operations(network: MegaByte, streams: int, bits: CacheBits | None = None) -> str | None:
    """Why patches of so many streams are decoded operation by operation; None where they are launched whole."""
    bits = bits or CacheBits()
    if bits.window is not None or bits.share_left is not None:
        return "a window, or pages that are not read: the kernels read all rows"
    config, at_once = network.config, size_for(min(streams, MOST_STREAMS))
    if at_once * config.patch_size > MOST_IDS or streams > MOST_STREAMS_IN_ALL:
        return f"{streams} streams of {config.patch_size} bytes a patch are more than {MOST_STREAMS_IN_ALL} or {MOST_IDS} ids"
    if config.layout == "megabyte_pytorch":
        return "the layout is megabyte_pytorch, the kernels know prefix and paper"
    if config.token_shift:
        return "a token shift"
    if config.layout == "paper" and share_of(network) is not None:
        return "ranks share a model of the layout paper"
    stages = _prepared(network)
    if stages is None:
        return "layers of a kind that the kernels do not know, or with 8-bit activations"
    if not all(takes_stage(each.stage, at_once) for each in stages):
        return "float16, formats that differ from layer to layer, or sizes that the kernels do not take"
    return None


def patch_decoder(
    network: MegaByte,
    streams: int,
    bits: CacheBits | None = None,
    exchange: Exchange | None = None,
    *,
    timed: bool = False,
) -> PatchDecoder | None:
    """The decoder of whole patches on CUDA, or None where it takes no such network or so many streams.

    Args:
        bits: of the global cache.
        exchange: with the other ranks, where they share the network.
    """
    bits = bits or CacheBits()
    stages = None if why_operations(network, streams, bits) else _prepared(network)
    if stages is None:
        return None
    try:
        whole = stages[0].stage
        if bits.is_packed:
            whole = replace(whole, key_bits=bits.keys, value_bits=bits.values, page_rows=ROWS_PER_PAGE)
        return PatchDecoder((whole, stages[1].stage), added_rows(network), streams, bits, exchange, timed=timed)
    except BackendError as error:
        say_once(f"patches are decoded operation by operation: {error}")
        return None


def _prepared(network: MegaByte) -> tuple[Prepared, Prepared] | None:
    """Both stages, kept with the network as long as its weights are the same: a batch that grows asks for them often."""
    if network.config.layout == "megabyte_pytorch":
        return None
    first, last = network.stages[0], network.stages[-1]
    ends = [part for part in (first.patch_projection, first.to_next, first.positions) if part is not None]
    whole = prepared(first.stack, [first.stack, first.byte_embedding, *ends], lambda: global_stage(network))
    own = [last.stack, last.byte_embedding, network.output, *([] if last.start is None else [last.start])]
    local = prepared(last.stack, own, lambda: local_stage(network))
    return None if whole is None or local is None else (whole, local)


@functools.lru_cache(maxsize=32)
def _machine_code(*texts: str) -> list[bytes]:
    """`compiled`, kept in this process."""
    return compiled(texts)


def added_rows(network: MegaByte) -> mx.array:
    """[patch_size, dim] what is added to the rows of a patch in the local stage; to a learned start of the paper's nothing."""
    last = network.stages[-1]
    shape = (network.config.patch_size, last.config.dim)
    if last.positions is None:
        return mx.zeros(shape, last.byte_embedding.weight.dtype)
    positions = last.positions.weight.reshape(shape)
    return positions if last.start is None else mx.concatenate([mx.zeros_like(positions[:1]), positions[1:]])


def global_stage(network: MegaByte) -> StageArrays | None:
    """The global stage from the bytes of a patch to the condition of the local one; None where it is of another kind."""
    config, stage = network.config, network.stages[0]
    if config.layout == "megabyte_pytorch":
        return None
    window = -1 if config.attention_window is None else config.attention_window
    first, last = linear_arrays(stage.patch_projection), linear_arrays(stage.to_next)
    if config.layout == "paper":
        first = identity(stage.config.dim, stage.byte_embedding.weight.dtype)
        last = None if last is None else block_diagonal(last, config.patch_size)
    if first is None or last is None:
        return None
    share = share_of(network)
    ranks = 1 if share is None else share.size
    made = _stage_arrays(network, stage.stack, stage.config, stage.byte_embedding, first, last, window, ranks)
    if made is None or stage.positions is None:
        return made
    return replace(made, positions=stage.positions.weight.reshape(-1, stage.config.dim))  # paper: a row for each byte


def local_stage(network: MegaByte) -> StageArrays | None:
    """The last stage from the bytes of a patch to logits; None where it is of another kind."""
    stage, head = network.stages[-1], linear_arrays(network.output)
    if network.config.layout == "megabyte_pytorch" or head is None:
        return None
    made = _stage_arrays(network, stage.stack, stage.config, stage.byte_embedding, None, head, -1)
    if made is None or network.config.layout == "prefix":
        return made
    made = replace(made, slots=network.config.patch_size)
    if stage.start is None:
        return made
    table = mx.concatenate([made.table, stage.start[None].astype(made.table.dtype)])
    return replace(made, table=table, leading_id=network.config.vocab_size)


def _stage_arrays(
    network: MegaByte,
    stack: Stack,
    stage: StageConfig,
    embedding: nn.Module,
    first: LinearArrays | None,
    last: LinearArrays,
    window: int,
    ranks: int = 1,
) -> StageArrays | None:
    config = network.config
    layers = [_layer_arrays(layer) for layer in stack.layers]
    normed = "norm" in stack
    if config.token_shift or type(embedding) is not nn.Embedding or (normed and type(stack.norm) not in NORMS):
        return None
    if config.qk_norm and config.norm != "rmsnorm":
        return None
    dtype = embedding.weight.dtype
    if any(layer is None or layer.attention_norm.dtype != dtype for layer in layers):
        return None
    head_dim, attention = stage.width_of_head, stack.layers[0].attention  # of which a rank may have some heads
    return StageArrays(
        layers=tuple(layer for layer in layers if layer is not None),
        table=embedding.weight,
        norm=stack.norm.weight if normed else mx.ones((stage.dim,), dtype=dtype),
        first=first,
        last=last,
        heads=attention.heads,
        kv_heads=attention.kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5 if config.attention_scale is None else config.attention_scale,
        window=window,
        theta=config.rope_theta if stage.rope else 0.0,
        interleaved=config.rope_interleaved,
        norm_kind=config.norm,
        activation=config.ffn,
        eps=config.norm_eps,
        last_normed=normed,
        ranks=ranks,
    )


def _layer_arrays(layer: Block) -> LayerArrays | None:
    attention, ffn = layer.attention, layer.ffn
    makes = [linear_arrays(part) for part in (attention.q_proj, attention.k_proj, attention.v_proj, ffn.up_proj)]
    known = [*makes, *(linear_arrays(part, summed=True) for part in (attention.o_proj, ffn.down_proj))]
    gate = linear_arrays(ffn["gate_proj"]) if "gate_proj" in ffn else None
    if any(part is None for part in known) or ("gate_proj" in ffn and gate is None):
        return None
    query, key, value, up, out, down = (part for part in known if part is not None)
    query_norm, key_norm = (
        None if norm is None else norm.weight for norm in (attention.get("q_norm"), attention.get("k_norm"))
    )
    return LayerArrays(
        attention_norm=layer.attention_norm.weight, ffn_norm=layer.ffn_norm.weight, query_norm=query_norm, key_norm=key_norm,
        qkv=(query, key, value), out=out, up=(up,) if gate is None else (gate, up), down=down,
    )  # fmt: skip
