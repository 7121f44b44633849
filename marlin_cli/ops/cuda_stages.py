"""One stage, or a decoder, as CUDA kernels take it whole: its arrays by address in one record, and the launches that read it.

The kernels change their caches and scratch memory in place, which MLX knows nothing of: so these arrays are nobody else's, a
launch depends on the one before through what it reads, and `addresses` are asked for anew whenever an array is another one.
"""

import functools
import math
import struct
from collections.abc import Iterator, Sequence
from ctypes import c_float, c_int32, c_uint32, c_uint64
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from marlin_cli.ops.cuda_arrays import LayerArrays, LinearArrays, StageArrays
from marlin_cli.ops.cuda_compile import machine_code
from marlin_cli.ops.cuda_driver import Launcher, Memory, Queue, multiprocessors, pinned, shared_memory
from marlin_cli.ops.cuda_exchange import MOST_PLACES, Exchange
from marlin_cli.ops.cuda_mailbox import MOST_IDS, Alarm, Mailbox
from marlin_cli.ops.cuda_text import constants, text
from marlin_cli.ops.kernel_source import code

KINDS = ("dense", "nvfp4", "mxfp4", "mxfp8", "int4", "int8")  # as `Kind` in few_rows.cuh
LANE_VALUES = {"dense": 8, "nvfp4": 32, "mxfp4": 32, "mxfp8": 16, "int4": 32, "int8": 16}
NORM_KINDS = ("rmsnorm", "layernorm", "variance")  # as `NormKind` in few_rows_stage.cuh
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")  # swiglu is a gated silu
HEAD_DIMS = (16, 32, 64, 128, 256)
WARPS = 8  # of a block, which has a multiprocessor to itself
LOADS = 8  # of 16 bytes of weights that a lane has under way
CROWDED, WIDE = 8, 1024  # with more streams and wider rows than these, half as many loads leave registers for the rest
MOST_STREAMS = 16  # rows of a product of the matrix units
MOST_LOOKS = 50_000  # of all blocks at the values of rows of x: more cost more than a barrier
# Rows of x that a block brings through its registers, as copying them wins with more values and wider rows only.
MOST_BROUGHT, NARROW = 8192, 1024
MOST_DEPTH = 16384
MOST_VOCAB = 512
MOST_SPLITS, MOST_SPLITS_OF_ANSWERS = 8, 4  # of the rows of a head, among blocks
# Of weights that are sent ahead to the second-level cache: less than half of that, which has more to keep; and where GPUs share
# the stage what memory gives while a phase is read, as parts of sums would wait behind more.
AHEAD_BYTES, AHEAD_BYTES_SHARED = 24 << 20, 8 << 20
PAGE_BYTES = 32  # of the addresses of its keys and values and their scales
ADDRESSES_A_LAUNCH = 32  # as addresses.cu has parameters
# What the time of a launch goes to, in the order of `Part` and `Other` in the kernels; there is room for some more.
# it is left behind so many words of 64 bits.
KINDS_OF_TIME = (
    "first", "qkv", "out", "up", "down", "last", "memory query", "memory out", "attention", "memory attention", "drawing",
)  # fmt: skip
MOST_KINDS_OF_TIME, FIRST_TIME = 16, 4

# Bytes of the records as few_rows_stage.cuh lays them out.
STAGE_BYTES, LAYER_BYTES, LINEAR_BYTES = 208, 448, 40
NO_LINEAR = bytes(LINEAR_BYTES)


def takes_stage(stage: StageArrays, streams: int) -> bool:
    """Whether the kernels know every part of a stage, and its rows of x fit shared memory."""
    dtype, linears = stage.table.dtype, stage.linears()
    return (
        streams <= MOST_STREAMS
        and dtype in (mx.bfloat16, mx.float32)
        and stage.head_dim in HEAD_DIMS
        and stage.dim % 8 == 0
        and stage.table.shape[1] % 8 == 0
        and stage.last.rows <= (MOST_VOCAB if stage.first is None else 1 << 20)
        and all(_takes_linear(linear, dtype) for linear in linears)
        and all(
            len({(each.kind, each.group) for each in some}) == 1 for layer in stage.layers for some in (layer.qkv, layer.up)
        )
        and len({tuple(each.shape for each in layer.linears()) for layer in stage.layers}) == 1
        and shared_bytes(stage, streams) <= shared_memory()
    )


def _takes_linear(linear: LinearArrays, dtype: mx.Dtype) -> bool:
    if linear.kind == "dense":
        known = linear.weight.dtype == mx.bfloat16 and linear.group == (1 if dtype == mx.bfloat16 else 3)
    else:
        affine = linear.kind.startswith("int")
        known = linear.scales is not None and linear.scales.dtype == (dtype if affine else mx.uint8)
        known = known and linear.group >= (16 if linear.kind == "nvfp4" else 32)
    whole = linear.depth % (8 * linear.group if linear.kind == "dense" else 32) == 0
    return known and whole and linear.depth <= MOST_DEPTH


def shared_bytes(stage: StageArrays, streams: int) -> int:
    """Shared memory that a block needs: the record, what rows and warps leave for each other, and the longest x."""
    tagged = is_tagged(stage, streams)
    record = -(-(STAGE_BYTES + LAYER_BYTES * len(stage.layers)) // 16) * 16
    segments = streams * -(-stage.dim // (64 if tagged else 256))
    partial = WARPS * 2 * streams * 8 * 2
    staged = streams * (stage.heads + 2 * stage.kv_heads) * stage.head_dim if _attends_alone(stage, streams) else 0
    times = 2 * MOST_KINDS_OF_TIME
    floats = times + partial + staged + streams * stage.head_dim + WARPS * (stage.head_dim + 4) + MOST_STREAMS + 3 * segments
    return record + _memory_bytes(stage, streams) + 4 * floats


def is_tagged(stage: StageArrays, streams: int) -> bool:
    """Whether values carry the number of their phase, see few_rows_stage.cuh."""
    return streams * stage.dim * blocks_of(stage) <= MOST_LOOKS and stage.last.rows % 2 == 0


def is_copied(stage: StageArrays, streams: int) -> bool:
    """Whether rows of x stand in memory as products read them, see few_rows_stage.cuh: where there are many to bring."""
    plain = stage.table.dtype == mx.bfloat16 and stage.norm_kind == "rmsnorm"
    return plain and not is_tagged(stage, streams) and stage.dim > NARROW and streams * stage.dim > MOST_BROUGHT


def _attends_alone(stage: StageArrays, streams: int) -> bool:
    """Whether each block does all attention itself, see few_rows_stage.cuh."""
    return stage.first is None and not stage.answers and streams * stage.heads <= 2 * WARPS


def _memory_bytes(stage: StageArrays, streams: int) -> int:
    """Of the longest x, twice where the next one may come before it has been read, or of the scores that ids are drawn from."""
    parts, longest = 1 if stage.table.dtype == mx.bfloat16 else 3, 0
    for linear in stage.linears():
        step = 4 * LANE_VALUES[linear.kind]
        stride = -(-linear.depth // step) * step // 8
        longest = max(longest, parts * streams * 16 * (stride if stride % 8 == 4 else stride + 4))
    scores = 4 * streams * stage.last.rows if stage.first is None else 0
    buffers = 2 if is_tagged(stage, streams) else 1
    return max(buffers * longest, -(-scores // 32) * 32)


def _linears_by_part(stage: StageArrays) -> list[LinearArrays | None]:
    layer = stage.layers[0]
    reading = [None, None] if layer.memory is None else [layer.memory.query, layer.memory.out]
    return [stage.first, layer.qkv[0], layer.out, layer.up[0], layer.down, stage.last, *reading]


def loads_of(stage: StageArrays, streams: int) -> int:
    """Loads of weights that a lane has under way: half where rows of x or decoding 4 bits need the registers.

    On an H200 a step of ByT5's decoder in nvfp4 takes 97 us with four loads and 103 with eight, in bfloat16 140 and 126.
    """
    four_bits = {"nvfp4", "mxfp4", "int4"} & {linear.kind for linear in stage.linears()}
    crowded = streams > CROWDED and stage.dim > WIDE
    return LOADS // 2 if crowded or (stage.answers and four_bits) else LOADS


def sizes_of(stage: StageArrays, streams: int, blocks: int, steps: int, *, timed: bool = False) -> str:
    """A stage's sizes and kinds as the kernels' constants; `steps` are the bytes of a patch. `timed`: see `seconds`."""
    parts = _linears_by_part(stage)
    kinds = [0 if part is None else KINDS.index(part.kind) for part in parts]
    tasks = streams * stage.heads
    splits = max(1, min(MOST_SPLITS_OF_ANSWERS if stage.answers else MOST_SPLITS, blocks // tasks))
    beside = [[layer.qkv, (layer.out,), layer.up, (layer.down,)] for layer in stage.layers]
    within = [any(each.bias is not None for layer in beside for each in layer[part]) for part in range(4)]
    biased = [stage.first is not None and stage.first.bias is not None, *within, stage.last.bias is not None, False, False]
    values = {
        "X_PARTS": 1 if stage.table.dtype == mx.bfloat16 else 3, "WARPS": WARPS, "BLOCKS": blocks,
        "LOADS": loads_of(stage, streams),
        "IS_GLOBAL": stage.first is not None, "TAGGED": is_tagged(stage, streams), "COPIED": is_copied(stage, streams),
        "STREAMS": streams,
        "LAYERS": len(stage.layers), "DIM": stage.dim, "HEADS": stage.heads, "KV_HEADS": stage.kv_heads,
        "HEAD_DIM": stage.head_dim, "FFN_DIM": stage.ffn_dim, "PATCH": steps, "BYTE_WIDTH": stage.table.shape[1],
        "SPLITS": 1 if stage.first is None else splits, "WINDOW": stage.window, "NORM_KIND": NORM_KINDS.index(stage.norm_kind),
        "ACTIVATION": ACTIVATIONS.index("silu" if stage.activation == "swiglu" else stage.activation),
        "GATED": len(stage.layers[0].up) == 2, "ROTATES": bool(stage.theta), "INTERLEAVED": stage.interleaved,
        "QK_NORM": stage.layers[0].query_norm is not None, "MEMORY_BYTES": _memory_bytes(stage, streams),
        "KINDS": kinds, "GROUPS": [1 if part is None else part.group for part in parts],
        "WIDTHS": [8 if part is None else part.width for part in parts],
        "ROWS": [8 if part is None else part.rows for part in parts],
        "HAS_BIAS": biased, "ALL_KINDS": sum({1 << KINDS.index(part.kind) for part in parts if part is not None}),
        "KEY_BITS": stage.key_bits, "VALUE_BITS": stage.value_bits, "ROWS_A_PAGE": max(1, stage.page_rows),
        "PLACED": stage.positions is not None, "SLOTTED": stage.first is None and stage.slots > 1,
        "LAST_NORMED": stage.last_normed,
        "ANSWERS": stage.answers, "MEMORY_BITS": stage.memory_bits, "MEMORY_SPLITS": splits if stage.answers else 1,
        "REACH": 0 if stage.bias is None else stage.bias.shape[1] // 2,
        "TIMED": timed, "MOST_KINDS_OF_TIME": MOST_KINDS_OF_TIME, "FIRST_TIME": FIRST_TIME,
        "RANKS": stage.ranks, "PLACES": MOST_PLACES, "AHEAD_BYTES": AHEAD_BYTES if stage.ranks == 1 else AHEAD_BYTES_SHARED,
    }  # fmt: skip
    return constants(stage.table.dtype, values)


def kernel_name(stage: StageArrays) -> str:
    """The kernel that takes a stage: the last one's steps, or a patch of the first one's; or a decoder's steps."""
    return "answer_decode" if stage.answers else "local_patch_decode" if stage.first is None else "stack"


def size_for(streams: int) -> int:
    """Streams that a kernel is made for that takes so many: the next power of two, as each number of them is another kernel."""
    return 1 << (streams - 1).bit_length()


class StageOnDevice:
    """A stage for a number of streams, its scratch memory, and the record by which the kernels find all of it.

    Args:
        stage: what `takes_stage` takes.
        streams: 1 to 16, as many as the kernel is made for.
        live: of them, those that there are; the others are filler, which reads the last one's cache and writes to none.
        steps: bytes of a patch; of a decoder as many ids as a launch is fed at most.
        queue: of the launches; MLX must have finished the arrays.
        known: addresses of the stage's own arrays, if they have been asked for.
        exchange: with the other ranks, where they share the stage; `queue` is its own then.
        timed: for `seconds`; launches take a little longer.
    """

    def __init__(
        self, stage: StageArrays, streams: int, steps: int, queue: Queue, known: list[int] | None = None,
        exchange: Exchange | None = None, *, live: int | None = None, timed: bool = False,
    ) -> None:  # fmt: skip
        assert (exchange is None) == (stage.ranks == 1)
        self.stage, self.streams, self._queue, self._exchange = stage, streams, queue, exchange
        self.live = streams if live is None else live
        self.mailbox = None if stage.first is not None else Mailbox()
        self._alarm = Alarm() if stage.first is not None and exchange is None else None
        self._held = _arrays_of(stage)
        self.known = addresses(self._held) if known is None else known
        self.blocks = blocks_of(stage)
        sizes = sizes_of(stage, streams, self.blocks, steps, timed=timed)
        self.text = text(kernel_name(stage), sizes)
        self._launch: Launcher | None = None
        parts = [*self._scratch_bytes(), STAGE_BYTES + LAYER_BYTES * len(stage.layers)]
        self._scratch = queue.allocate(sum(parts))
        self._places = [self._scratch.address + sum(parts[:i]) for i in range(len(parts))]
        self._caches: list[mx.array] = []
        self._own_cache: Memory | None = None
        self._pages: Memory | None = None  # by layer and page, the addresses of the page
        # Numbers of phases, by which values are told apart: those of a launch are fewer than this.
        self._phases_a_launch = (8 * len(stage.layers) + 3) * (steps if stage.first is None else 1)
        self._phase = 0

    def load(self, machine_code: bytes) -> None:
        """Take the machine code of `text`."""
        size = shared_bytes(self.stage, self.streams)
        self._launch = self._queue.load(machine_code, kernel_name(self.stage), self.blocks, WARPS * 32, size)

    def set_caches(self, caches: Sequence[tuple[mx.array, mx.array]]) -> None:
        """Keys and values of each layer, [streams, kv_heads, capacity, head_dim], in the stage's type; changed in place.

        They are MLX's, which may move them when it writes to them.
        """
        arrays = [array for pair in caches for array in pair]
        self.use_caches(arrays, addresses(arrays))

    def use_caches(self, arrays: Sequence[mx.array], places: list[int]) -> None:
        """The same where the rows of this stage's streams stand at `places`."""
        self._caches = list(arrays)
        self._record(places, arrays[0].shape[2])

    def use_pages(self, arrays: Sequence[mx.array], places: Sequence[Sequence["PagePlaces"]]) -> None:
        """Caches of packed rows, changed in place.

        Args:
            arrays: of all pages, which are held.
            places: by layer and page, of this stage's streams.
        """
        self._caches = list(arrays)
        size = PAGE_BYTES * len(places[0])
        if self._pages is None or self._pages.size < size * len(places):
            self._pages = self._queue.allocate(2 * size * len(places))
        table = b"".join(struct.pack("<4Q", *page) for layer in places for page in layer)
        self._queue.write(self._pages.address, table)
        self._record([place for i in range(len(places)) for place in (self._pages.address + i * size, 0)], 0)

    @property
    def cache_bytes(self) -> int:
        """Bytes of one copy of the caches, used or not."""
        return sum(array.nbytes for array in self._caches) if self._own_cache is None else self._own_cache_bytes

    def own_caches(self, rows: int) -> None:
        """Caches of this stage's own, for sequences of at most `rows` rows: each head's, by block where each has all heads."""
        stage = self.stage
        one = self.streams * stage.heads * rows * stage.head_dim * stage.table.dtype.size
        self._own_cache_bytes = 2 * len(stage.layers) * one
        copies = self.blocks if _attends_alone(stage, self.streams) else 1
        self._own_cache = self._queue.allocate(copies * self._own_cache_bytes)
        self._record([self._own_cache.address + copies * one * i for i in range(2 * len(stage.layers))], rows)

    def decode_sequence(
        self, lead: int, added: int, given: int, noise: int, filters: tuple[float, float, float, int], known: int, steps: int,
        ids: int, before: int = 0,
    ) -> int:  # fmt: skip
        """Draw the ids that follow known ones in a sequence of the last stage; the mailbox has them by the number returned.

        Args:
            lead: address of [streams, slots, dim]: the row that leads, or what is added to each row.
            added: of [rows, dim]: what is added to `lead` and to the embedding of each id after it.
            given: of [streams, known] int32: ids that stand in the sequence already; 0 where there are none.
            noise: of [steps, vocab] float32 where an id is drawn; 0 takes the likeliest.
            filters: temperature, top_p, min_p and top_k.
            ids: of [streams, patch] int32: known ones and drawn ones.
            before: of [streams, patch] int32, where there are more slots than one: first the id before the sequence.
        """
        assert self._launch is not None and self.mailbox is not None and self.streams * steps <= MOST_IDS
        number = self.mailbox.next()
        *floats, top_k = filters
        pointers = (self._places[-1], lead, added, given, noise, ids)
        self._launch(
            *map(c_uint64, pointers),
            *map(c_float, floats),
            *map(c_int32, (top_k, known, steps, number)),
            c_uint32(self._next()),
            c_uint64(before),
        )
        return number

    def step(self, ids: int, seen: int, padding: int, out: int) -> None:
        """One patch through the stage, behind `seen` rows of its caches.

        Args:
            ids: address of [streams, patch] int32.
            padding: of [streams] int32: filler rows; 0 where there are none.
            out: of [streams, rows of `last`].
        """
        assert self._launch is not None
        pointers = (self._places[-1], ids, padding, out)
        shared, turn = (0, 0) if self._exchange is None else self._exchange.take(2 * len(self.stage.layers))
        self._launch(*map(c_uint64, pointers), c_int32(seen), c_uint32(self._next()), c_uint64(shared), c_uint32(turn))

    def check(self) -> None:
        """See that no launch that has ended gave up waiting; those that draw ids tell of it with them.

        Raises:
            BackendError: one did.
        """
        if self._alarm is not None:
            self._alarm.check()
        if self._exchange is not None:
            self._exchange.check()

    def seconds(self) -> dict[str, float]:
        """What launches so far have spent on each of `KINDS_OF_TIME`, as the first block saw it; 0 unless made `timed`."""
        count = len(KINDS_OF_TIME)
        data = self._queue.read(self._places[0] + 8 * FIRST_TIME, 8 * (count + 1))
        words = np.frombuffer(data, np.uint64).astype(np.float64)
        scale = 1e-9 * words[count] / max(words[:count].sum(), 1.0)
        return {kind: float(cycles * scale) for kind, cycles in zip(KINDS_OF_TIME, words[:count], strict=True)}

    def _next(self) -> int:
        """The number of a phase before a launch's first: 32 bits, which come again after months."""
        self._phase = (self._phase + self._phases_a_launch) % (1 << 32)
        return self._phase

    def _scratch_bytes(self) -> list[int]:
        """Bytes of each part of the scratch memory, in the order of the record."""
        stage, streams = self.stage, self.streams
        width, kv_width = stage.heads * stage.head_dim, stage.kv_heads * stage.head_dim
        parts = streams * stage.heads * MOST_SPLITS * (stage.head_dim + 4)
        cells = [streams * stage.dim, streams * (width + 2 * kv_width), parts, streams * width, streams * stage.ffn_dim]
        return [256, *(-(-8 * count // 256) * 256 for count in (*cells, streams * stage.last.rows))]

    def _record(self, caches: list[int], capacity: int, memory: "MemoryPlaces | None" = None) -> None:
        stage, known = self.stage, iter(self.known)
        layers = b""
        for i, layer in enumerate(stage.layers):
            places = [0] * 4 if memory is None else memory.layers[i]
            layers += _layer_bytes(layer, known, caches[2 * i : 2 * i + 2], places)
        table, norm, bias, positions = (next(known) for _ in range(4))
        first = NO_LINEAR if stage.first is None else _linear_bytes(stage.first, known)
        last = _linear_bytes(stage.last, known)
        host = self.mailbox or self._alarm
        mailbox = 0 if host is None else host.address
        lengths, states, inputs = (0, 0, self.live) if memory is None else (memory.lengths, memory.states, memory.inputs)
        head = struct.pack("<12Q", *self._places[:-1], table, norm, mailbox, bias, lengths)
        log2_theta = math.log2(stage.theta) if stage.theta else 0.0
        sizes = struct.pack("<2i3fiQ", capacity, states, log2_theta, stage.scale, stage.eps, inputs, positions)
        record = head + first + last + sizes + layers
        assert len(record) == STAGE_BYTES + LAYER_BYTES * len(stage.layers)
        self._queue.write(self._places[-1], record)


class PagePlaces(NamedTuple):
    """Where a page's rows stand in memory: words [streams, kv_heads, page_rows, words] and scales, or numbers without them."""

    keys: int
    key_scales: int
    values: int
    value_scales: int


class MemoryPlaces(NamedTuple):
    """Where a memory stands in the device's memory: of each layer keys, their scales, values and theirs."""

    layers: list[list[int]]
    lengths: int  # 0: all states are real
    states: int
    inputs: int


def _arrays_of(stage: StageArrays) -> list[mx.array | None]:
    """The arrays of a stage in the order of its record; None where one is not there."""
    arrays: list[mx.array | None] = []
    for layer in stage.layers:
        arrays += [layer.attention_norm, layer.ffn_norm, layer.query_norm, layer.key_norm]
        for linear in layer.linears():
            arrays += linear.arrays()
        arrays += [] if layer.memory is None else [layer.memory.norm]
    arrays += [stage.table, stage.norm, stage.bias, stage.positions]
    for end in (stage.first, stage.last):
        arrays += [] if end is None else end.arrays()
    return arrays


def _layer_bytes(layer: LayerArrays, known: Iterator[int], caches: list[int], memory: list[int]) -> bytes:
    norms = struct.pack("<4Q", *(next(known) for _ in range(4)))
    linears = [_linear_bytes(linear, known) for linear in layer.linears()]
    if len(layer.up) == 1:
        linears.insert(5, NO_LINEAR)
    own, reading = linears[:7], linears[7:] or [NO_LINEAR] * 2
    memory_norm = 0 if layer.memory is None else next(known)
    return norms + struct.pack("<2Q", *caches) + b"".join(own) + struct.pack("<5Q", memory_norm, *memory) + b"".join(reading)


def _linear_bytes(linear: LinearArrays, known: Iterator[int]) -> bytes:
    return struct.pack("<4Qfi", *(next(known) for _ in range(4)), linear.factor, 0)


def blocks_of(stage: StageArrays) -> int:
    """A block for each multiprocessor, but none that had nothing to multiply in any layer.

    One that had a part of the logits alone could still be looking for those of a step when the next step's are written.
    """
    tiles = [sum(-(-each.rows // 8) for each in layer.qkv) for layer in stage.layers]
    tiles += [-(-linear.rows // 8) for layer in stage.layers for linear in layer.linears()]
    return min(multiprocessors(), max(tiles))


def addresses(arrays: Sequence[mx.array | None]) -> list[int]:
    """Where arrays stand in the device's memory, 0 for None. They must stay alive, and must not be read by the host."""
    present = [array for array in arrays if array is not None]
    mx.eval(present)
    found: list[int] = []
    memory, address = _addresses_there()
    halves = struct.unpack("<2i", struct.pack("<Q", address))
    for start in range(0, len(present), ADDRESSES_A_LAUNCH):
        some = present[start : start + ADDRESSES_A_LAUNCH]
        done = mx.fast.precompiled_cuda_kernel(
            name="addresses",
            compiled_source=machine_code(code("addresses.cu")),
            inputs=some + some[:1] * (ADDRESSES_A_LAUNCH - len(some)),
            output_shapes=[(1,)],
            output_dtypes=[mx.int32],
            scalars=list(halves),
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
        )
        mx.eval(done)
        mx.synchronize()
        found += memory.view(np.int64)[: len(some)].tolist()
    places = iter(found)
    return [0 if array is None else next(places) for array in arrays]


@functools.cache
def _addresses_there() -> tuple[np.ndarray, int]:
    """Memory of the host for addresses: an array of MLX takes half a millisecond to come there."""
    return pinned(2 * ADDRESSES_A_LAUNCH)
