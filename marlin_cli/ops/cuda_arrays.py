"""The arrays of a stage or a decoder that CUDA kernels take whole. Frozen records; nothing is computed here."""

from dataclasses import dataclass

import mlx.core as mx


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
    def width(self) -> int:
        """Values of a row of x, which repeat for each part of the weight."""
        return self.depth // self.group if self.kind == "dense" else self.depth

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
class MemoryLayer:
    """What a decoder's layer has to read its memory with."""

    norm: mx.array
    query: LinearArrays
    out: LinearArrays


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
    memory: MemoryLayer | None = None  # of a decoder that reads one

    def linears(self) -> list[LinearArrays]:
        own = [*self.qkv, self.out, *self.up, self.down]
        return own if self.memory is None else [*own, self.memory.query, self.memory.out]


@dataclass(frozen=True)
class StageArrays:
    """A stage, or a decoder, with what stands before and after its layers, which share a type: bfloat16 or float32."""

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
    bias: mx.array | None = None  # [heads, 2 * reach + 1] by distance, of a decoder that reads a memory
    memory_bits: int = 16  # of the keys and values of that memory
    key_bits: int = 16  # of a global stage's cache, which stands in pages where keys or values are packed
    value_bits: int = 16
    page_rows: int = 0  # of such a page
    positions: mx.array | None = None  # [patches, dim] added to what `first` gives
    slots: int = 1  # rows of a condition: of a last stage one that leads, or one for each byte of a patch
    leading_id: int | None = None  # where there are many: the row of `table` before a sequence; None: that of the id before it
    last_normed: bool = True  # does a norm stand before `last`?
    ranks: int = 1  # that share it; heads, and rows and columns of layers, are then those of this rank

    @property
    def dim(self) -> int:
        return self.layers[0].out.rows

    @property
    def answers(self) -> bool:
        """Is it a decoder that reads a memory?"""
        return self.layers[0].memory is not None

    @property
    def ffn_dim(self) -> int:
        return self.layers[0].up[0].rows

    def linears(self) -> list[LinearArrays]:
        ends = [self.last] if self.first is None else [self.first, self.last]
        return [linear for layer in self.layers for linear in layer.linears()] + ends
