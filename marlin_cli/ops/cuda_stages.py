"""One stage of a MegaByte as CUDA kernels take it whole: its arrays by address in one record, and the launches that read it.

The kernels change their caches and scratch memory in place, which MLX knows nothing of: so these arrays are nobody else's, a
launch depends on the one before through what it reads, and `addresses` are asked for anew whenever an array is another one.
"""

import functools
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from marlin_cli.ops.cuda_driver import multiprocessors, shared_memory
from marlin_cli.ops.cuda_kernels import ADDRESSES_A_LAUNCH, kernel
from marlin_cli.ops.cuda_mailbox import MOST_IDS, Mailbox
from marlin_cli.ops.kernel_inputs import unread

KINDS = ("dense", "nvfp4", "mxfp4", "mxfp8", "int4", "int8")  # as `Kind` in few_rows.cuh
LANE_VALUES = {"dense": 8, "nvfp4": 32, "mxfp4": 32, "mxfp8": 16, "int4": 32, "int8": 16}
NORM_KINDS = ("rmsnorm", "layernorm", "variance")  # as `NormKind` in few_rows_stage.cuh
ACTIVATIONS = ("swiglu", "gelu", "gelu_tanh", "relu", "silu")
HEAD_DIMS = (16, 32, 64, 128, 256)
WARPS = 8  # of a block, which has a multiprocessor to itself
MOST_STREAMS = 16  # rows of a product of the matrix units
MOST_DEPTH = 16384
MOST_VOCAB = 512
MOST_SPLITS = 4

# Bytes of the records and of shared memory as few_rows_stage.cuh lays them out.
STAGE_BYTES, LAYER_BYTES = 256, 384
NO_LINEAR = struct.pack("<4Q2if2h", 0, 0, 0, 0, 0, 0, 0.0, 0, 1)
PARTS_OF_A_LAYER, JOB_BYTES, LANE_BYTES = 7, 64, 12
SUMS_OF_ROWS = 4 * (16 * 64 + 16 + 4)


@dataclass(frozen=True)
class LinearArrays:
    """A linear layer, packed or dense; see `dense_arrays` of the latter."""

    weight: mx.array  # [rows, depth] bfloat16, or its words
    kind: str = "dense"
    scales: mx.array | None = None
    zeros: mx.array | None = None  # of int4 and int8
    bias: mx.array | None = None
    factor: float = 1.0
    group: int = 1  # of dense weights: the parts side by side whose sum they are

    @property
    def rows(self) -> int:
        return self.weight.shape[0]

    @property
    def depth(self) -> int:
        bits = {"dense": 16, "mxfp8": 8, "int8": 8}.get(self.kind, 4)
        return self.weight.shape[1] if self.kind == "dense" else self.weight.shape[1] * 32 // bits

    @property
    def shape(self) -> tuple[int, int, str, int]:
        return self.rows, self.depth, self.kind, self.group

    def arrays(self) -> list[mx.array | None]:
        return [self.weight, self.scales, self.zeros, self.bias]


def dense_arrays(weight: mx.array, bias: mx.array | None) -> LinearArrays:
    """A dense layer: bfloat16 as it is; float32 as a copy in three bfloat16 side by side, whose sum it is."""
    if weight.dtype != mx.float32:
        return LinearArrays(weight, bias=bias)
    parts, rest = [], weight
    for _ in range(3):
        parts.append(rest.astype(mx.bfloat16))
        rest = rest - parts[-1].astype(mx.float32)
    return LinearArrays(mx.concatenate(parts, axis=1), bias=bias, group=len(parts))


@dataclass(frozen=True)
class LayerArrays:
    """A transformer layer."""

    attention_norm: mx.array
    ffn_norm: mx.array
    query_norm: mx.array | None
    key_norm: mx.array | None
    qkv: tuple[LinearArrays, LinearArrays, LinearArrays]
    out: LinearArrays
    up: tuple[LinearArrays, ...]  # gate and up, or up alone
    down: LinearArrays

    def linears(self) -> list[LinearArrays]:
        return [*self.qkv, self.out, *self.up, self.down]


@dataclass(frozen=True)
class StageArrays:
    """A stage with what stands before and after its layers, which share a type: bfloat16 or float32."""

    layers: tuple[LayerArrays, ...]
    table: mx.array  # [vocab, width] embeddings of bytes
    norm: mx.array | None
    first: LinearArrays | None  # of the bytes of a patch to a row
    last: LinearArrays  # to logits, or to what the next stage is given
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int  # -1: none
    theta: float  # of rotation; 0: none
    interleaved: bool
    norm_kind: str
    activation: str
    eps: float

    @property
    def dim(self) -> int:
        return self.layers[0].out.rows

    @property
    def ffn_dim(self) -> int:
        return self.layers[0].up[0].rows

    def linears(self) -> list[LinearArrays]:
        ends = [self.last] if self.first is None else [self.first, self.last]
        return [linear for layer in self.layers for linear in layer.linears()] + ends


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
    parts = 1 if stage.table.dtype == mx.bfloat16 else 3
    longest = 0
    for linear in stage.linears():
        step = 4 * LANE_VALUES[linear.kind]
        longest = max(longest, parts * streams * 2 * (-(-linear.depth // step) * step + 32))
    joining, sampling = 4 * WARPS * (stage.head_dim + 4), 4 * streams * stage.last.rows if stage.first is None else 0
    record = STAGE_BYTES + LAYER_BYTES * len(stage.layers) + PARTS_OF_A_LAYER * (JOB_BYTES + LANE_BYTES * WARPS * 32)
    rotations, sums = 4 * streams * stage.head_dim, 4 * WARPS * 2 * streams * 8
    return record + rotations + SUMS_OF_ROWS + sums + 16 + max(longest, joining, sampling)


class StageOnDevice:
    """A stage for a number of streams, its scratch memory, and the record by which the kernels find all of it.

    Args:
        stage: what `takes_stage` takes.
        streams: 1 to 16.
        known: addresses of the stage's own arrays, if they have been asked for.
    """

    def __init__(self, stage: StageArrays, streams: int, known: list[int] | None = None) -> None:
        self.stage, self.streams = stage, streams
        self.mailbox = None if stage.first is not None else Mailbox()
        self._held = _arrays_of(stage)
        self.known = addresses(self._held) if known is None else known
        self.blocks = min(multiprocessors(), _most_blocks(stage))
        tasks = streams * stage.heads
        self.splits = 1 if stage.first is None else max(1, min(MOST_SPLITS, self.blocks // tasks))
        sizes = self._scratch_sizes()
        self._scratch = mx.zeros((sum(sizes),))
        self._places = [4 * sum(sizes[:i]) for i in range(len(sizes))]
        kinds = sum(1 << KINDS.index(kind) for kind in {linear.kind for linear in stage.linears()})
        own = stage.table.dtype
        template = {
            "T": own,
            "KINDS": kinds,
            "PARTS": 1 if own == mx.bfloat16 else 3,
            "WARPS": WARPS,
            "HEAD_DIM": stage.head_dim,
        }
        self._template = list(template.items())
        self._caches: list[mx.array] = []
        self._record: mx.array | None = None

    def set_caches(self, caches: Sequence[tuple[mx.array, mx.array]]) -> None:
        """Keys and values of each layer, [streams, kv_heads, capacity, head_dim], in the stage's type; changed in place."""
        arrays = [array for pair in caches for array in pair]
        if len(arrays) == len(self._caches) and all(a is b for a, b in zip(arrays, self._caches, strict=True)):
            return
        self._caches = arrays
        self._record = self._recorded(addresses([self._scratch, *arrays]))

    @property
    def cache_bytes(self) -> int:
        """Bytes of the caches, used or not."""
        return sum(array.nbytes for array in self._caches)

    def forget_caches(self) -> None:
        """Ask for their addresses again: MLX may have written to them, which moves them."""
        self._caches = []

    def own_caches(self, rows: int) -> None:
        """Caches of this stage's own, for sequences of at most `rows` rows."""
        shape = (self.streams, self.stage.kv_heads, rows, self.stage.head_dim)
        make = functools.partial(mx.zeros, shape, dtype=self.stage.table.dtype)
        self.set_caches([(make(), make()) for _ in self.stage.layers])

    def decode_sequence(
        self,
        lead: mx.array,
        added: mx.array,
        given: mx.array | None,
        noise: mx.array | None,
        filters: mx.array | None,
        steps: int,
    ) -> tuple[mx.array, int]:
        """Draw the ids that follow `given` in a sequence of the last stage: [streams, steps] int32, -1 where a barrier failed.

        Returns them, and the number of the launch, which the mailbox has them by.

        Args:
            lead: [streams, dim] the row that leads.
            added: [streams or 1, rows, dim] what is added to `lead` and to the embedding of each id after it.
            given: [streams, n] int32 ids that stand in the sequence already.
            noise: [steps, vocab] float32 where an id is drawn; None takes the likeliest.
            filters: [4] float32: temperature, top_p, min_p and top_k.
        """
        assert self._record is not None and self.mailbox is not None and self.streams * steps <= MOST_IDS
        number = self.mailbox.next()
        span = mx.broadcast_to(unread(), (steps + 1, 1 if given is None else given.shape[1] + 1, number))
        inputs = [
            self._record, mx.contiguous(lead), mx.contiguous(added), unread() if given is None else mx.contiguous(given),
            unread_floats() if noise is None else mx.contiguous(noise), unread_floats() if filters is None else filters, span,
        ]  # fmt: skip
        variant = {"SAMPLING": noise is not None}
        return self._launch("local_patch_decode", inputs, variant, (self.streams, steps), mx.int32), number

    def step(self, ids: mx.array, seen: int, padding: mx.array | None) -> mx.array:
        """One patch ids [streams, patch] through the stage, behind `seen` rows of its caches: [streams, rows of `last`]."""
        assert self._record is not None
        span = mx.broadcast_to(unread(), (seen + 1,))
        inputs = [self._record, mx.contiguous(ids), unread() if padding is None else padding, span]
        shape = (self.streams, self.stage.last.rows)
        return self._launch("stack", inputs, {"HAS_PADDING": padding is not None}, shape, self.stage.table.dtype)

    def _launch(
        self, name: str, inputs: list[mx.array], variant: dict[str, bool], shape: tuple[int, ...], dtype: mx.Dtype
    ) -> mx.array:
        (out,) = kernel(name, shared_memory())(
            inputs=inputs,
            template=[*self._template, *variant.items()],
            grid=(self.blocks * WARPS * 32, 1, 1),
            threadgroup=(WARPS * 32, 1, 1),
            output_shapes=[shape],
            output_dtypes=[dtype],
        )
        return out

    def _scratch_sizes(self) -> list[int]:
        """Floats of each part of the scratch memory, in the order of the record: 16 bytes at least, and whole multiples."""
        stage, streams = self.stage, self.streams
        width, kv_width = stage.heads * stage.head_dim, stage.kv_heads * stage.head_dim
        parts = streams * stage.heads * self.splits * (stage.head_dim + 4)
        sizes = [4, streams * stage.dim, streams * width, streams * kv_width, streams * kv_width, parts]
        sizes += [streams * width, streams * stage.ffn_dim, streams * stage.last.rows]
        return [-(-size // 64) * 64 for size in sizes]

    def _recorded(self, found: list[int]) -> mx.array:
        stage = self.stage
        scratch, caches = found[0], found[1:]
        known = iter(self.known)
        layers = b"".join(_layer_bytes(layer, known, caches[2 * i : 2 * i + 2]) for i, layer in enumerate(stage.layers))
        table, norm = next(known), next(known)
        first = NO_LINEAR if stage.first is None else _linear_bytes(stage.first, known)
        last = _linear_bytes(stage.last, known)
        mailbox = 0 if self.mailbox is None else self.mailbox.address
        head = struct.pack("<12Q", *(scratch + place for place in self._places), table, norm, mailbox)
        sizes = struct.pack(
            "<8i4i3fi",
            self.streams, len(stage.layers), stage.dim, stage.heads, stage.kv_heads, stage.ffn_dim, self._caches[0].shape[2],
            stage.table.shape[1], stage.window, NORM_KINDS.index(stage.norm_kind), ACTIVATIONS.index(stage.activation),
            stage.interleaved, math.log2(stage.theta) if stage.theta else 0.0, stage.scale, stage.eps, self.splits,
        )  # fmt: skip
        record = head + first + last + sizes + layers
        assert len(record) == STAGE_BYTES + LAYER_BYTES * len(stage.layers)
        return mx.array(np.frombuffer(record, dtype=np.uint8))


def _arrays_of(stage: StageArrays) -> list[mx.array | None]:
    """The arrays of a stage in the order of its record; None where one is not there."""
    arrays: list[mx.array | None] = []
    for layer in stage.layers:
        arrays += [layer.attention_norm, layer.ffn_norm, layer.query_norm, layer.key_norm]
        for linear in layer.linears():
            arrays += linear.arrays()
    arrays += [stage.table, stage.norm]
    for end in (stage.first, stage.last):
        arrays += [] if end is None else end.arrays()
    return arrays


def _layer_bytes(layer: LayerArrays, known: Iterator[int], caches: list[int]) -> bytes:
    norms = struct.pack("<4Q", *(next(known) for _ in range(4)))
    linears = [_linear_bytes(linear, known) for linear in layer.linears()]
    if len(layer.up) == 1:
        linears.insert(5, NO_LINEAR)
    return norms + struct.pack("<2Q", *caches) + b"".join(linears)


def _linear_bytes(linear: LinearArrays, known: Iterator[int]) -> bytes:
    places = [next(known) for _ in range(4)]
    kind = KINDS.index(linear.kind)
    return struct.pack("<4Q2if2h", *places, linear.rows, linear.depth, linear.factor, kind, linear.group)


def _most_blocks(stage: StageArrays) -> int:
    """Blocks beyond which some have nothing to multiply in any phase."""
    tiles = [sum(-(-each.rows // 8) for each in layer.qkv) for layer in stage.layers]
    tiles += [-(-linear.rows // 8) for linear in stage.linears()]
    return max(tiles)


def addresses(arrays: Sequence[mx.array | None]) -> list[int]:
    """Where arrays stand in the device's memory, 0 for None. They must stay alive, and must not be read by the host."""
    present = [array for array in arrays if array is not None]
    mx.eval(present)
    found: list[int] = []
    for start in range(0, len(present), ADDRESSES_A_LAUNCH):
        some = present[start : start + ADDRESSES_A_LAUNCH]
        (out,) = kernel("addresses")(
            inputs=some + some[:1] * (ADDRESSES_A_LAUNCH - len(some)),
            template=[],
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(ADDRESSES_A_LAUNCH,)],
            output_dtypes=[mx.int64],
        )
        found += np.array(out)[: len(some)].tolist()
    places = iter(found)
    return [0 if array is None else next(places) for array in arrays]


@functools.cache
def unread_floats() -> mx.array:
    """A stand-in for an input of floats that a variant of a kernel does not read."""
    return mx.zeros((4,))
