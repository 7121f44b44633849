"""Every operation once, in plain MLX, slow where it must be and obviously right: the truth for all fast twins."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import mlx.core as mx
import mlx.nn as nn


class Packed(NamedTuple):
    """Consecutive rows of keys or values, packed along head_dim in one of MLX's formats."""

    packed: mx.array  # [batch, kv_heads, rows, head_dim * bits / 32] uint32
    scales: mx.array  # [batch, kv_heads, rows, head_dim / group] uint8
    bits: int  # 4: nvfp4, groups of 16; 8: mxfp8, groups of 32

    @property
    def rows(self) -> int:
        return self.packed.shape[2]


PACKED_MODES = {4: ("nvfp4", 16), 8: ("mxfp8", 32)}

# Keys or values of consecutive rows: [batch, kv_heads, rows, head_dim], or packed.
KeyValueRows: TypeAlias = "mx.array | Packed"


def pack_rows(rows: mx.array, bits: int) -> Packed:
    """Rows [batch, kv_heads, n, head_dim] packed in `bits` bits; head_dim is a multiple of the format's group."""
    mode, group_size = PACKED_MODES[bits]
    count = rows.shape[2]
    packed, scales, *_ = mx.quantize(_even(rows, rows.size // group_size), group_size=group_size, mode=mode)
    return Packed(packed[:, :, :count], scales[:, :, :count], bits)


def unpack_rows(rows: KeyValueRows, dtype: mx.Dtype) -> mx.array:
    """Rows [batch, kv_heads, n, head_dim] of `dtype`, as attention reads them."""
    if isinstance(rows, mx.array):
        return rows.astype(dtype)
    mode, group_size = PACKED_MODES[rows.bits]
    packed, scales = (_even(array, rows.scales.size) for array in (rows.packed, rows.scales))
    return mx.dequantize(packed, scales, group_size=group_size, mode=mode, dtype=dtype)[:, :, : rows.rows]


def _even(rows: mx.array, groups: int) -> mx.array:
    """Rows [batch, kv_heads, n, width], and one more where there is an odd number of groups, which MLX 0.32.4 refuses."""
    return mx.pad(rows, [(0, 0), (0, 0), (0, 1), (0, 0)]) if groups % 2 else rows


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    *,
    causal: bool = True,
    window: int | None = None,
    left_padding: mx.array | None = None,
    lengths: mx.array | None = None,
    relative_bias: mx.array | None = None,
) -> mx.array:
    """Attention of the last rows of a sequence over all of it, or (not causal) of any rows over a sequence.

    Args:
        queries: [batch, heads, rows, head_dim]; row i stands at position total - rows + i.
        keys, values: [batch, kv_heads, total, head_dim]; kv_heads divides heads.
        scale: factor of the dot products.
        causal: a row sees itself and those before it.
        window: a row sees at most this many rows before it and, where not causal, after it.
        left_padding: [batch] int, how many rows at the start of each sequence are filler.
        lengths: [batch] int, how many rows of each sequence are real; the rest, at its end, are filler.
        relative_bias: [heads, 2 * most + 1], added to the dot products: entry most + clip(key - query, -most, most).

    Returns:
        [batch, heads, rows, head_dim]; rows that see nothing real hold unspecified finite values.
    """
    rows, total = queries.shape[2], keys.shape[2]
    if window is None and left_padding is None and lengths is None and relative_bias is None:
        mask: mx.array | str | None = "causal" if causal and rows > 1 else None
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    query_positions = mx.arange(total - rows, total)[:, None]
    key_positions = mx.arange(total)[None]
    distance = key_positions - query_positions
    allowed = distance <= 0 if causal else mx.ones((rows, total), dtype=mx.bool_)
    if window is not None:
        allowed = allowed & (mx.abs(distance) <= window)
    allowed = allowed[None, None]
    if left_padding is not None:
        allowed = allowed & (key_positions >= left_padding[:, None, None, None])
    if lengths is not None:
        allowed = allowed & (key_positions < lengths[:, None, None, None])
    # A row that sees nothing real sees itself, so that its softmax stays finite.
    allowed = allowed | (~allowed.any(axis=-1, keepdims=True) & (distance == 0))
    if relative_bias is None:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=allowed)
    most = relative_bias.shape[1] // 2
    bias = relative_bias[:, mx.clip(distance, -most, most) + most].astype(queries.dtype)
    mask = mx.where(allowed, bias, mx.finfo(queries.dtype).min)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def paged_attention(
    queries: mx.array,
    keys: Sequence[KeyValueRows],
    values: Sequence[KeyValueRows],
    scale: float,
    *,
    causal: bool = True,
    window: int | None = None,
    left_padding: mx.array | None = None,
    lengths: mx.array | None = None,
    relative_bias: mx.array | None = None,
) -> mx.array:
    """`attention` over keys and values that stand in pages, dense or packed: [batch, heads, rows, head_dim].

    Args:
        keys, values: pages of consecutive rows, in order; page i of both holds the same rows.
    """

    def whole(pages: Sequence[KeyValueRows]) -> mx.array:
        return mx.concatenate([unpack_rows(page, queries.dtype) for page in pages], axis=2)

    return attention(
        queries, whole(keys), whole(values), scale,
        causal=causal, window=window, left_padding=left_padding, lengths=lengths, relative_bias=relative_bias,
    )  # fmt: skip


def patch_embed(ids: mx.array, table: mx.array) -> mx.array:
    """Embeddings of the ids of each patch side by side.

    Args:
        ids: [.., patch_size] integers below vocab.
        table: [vocab, byte_dim].

    Returns:
        [.., patch_size * byte_dim]
    """
    return table[ids].reshape(*ids.shape[:-1], ids.shape[-1] * table.shape[1])


def strided_pool(x: mx.array, stride: int, kind: Literal["mean", "max"]) -> mx.array:
    """Each `stride` rows as one, their mean or their maximum; the last ones may be fewer.

    Args:
        x: [batch, rows, channels], rows above 0.

    Returns:
        [batch, ceil(rows / stride), channels]
    """
    batch, rows, channels = x.shape
    pooled = -(-rows // stride)
    padded = mx.pad(x, [(0, 0), (0, pooled * stride - rows), (0, 0)], constant_values=-math.inf if kind == "max" else 0)
    groups = padded.reshape(batch, pooled, stride, channels)
    if kind == "max":
        return groups.max(axis=2)
    counts = mx.minimum(rows - mx.arange(pooled) * stride, stride).astype(mx.float32)
    return (groups.astype(mx.float32).sum(axis=2) / counts[:, None]).astype(x.dtype)


def delay_one_row(rows: mx.array, before: mx.array | None = None) -> mx.array:
    """Each row replaced by the one before it: [batch, n, channels]; `before` [batch, 1, channels] or zeros come first."""
    if before is None:
        before = mx.zeros_like(rows[:, :1])
    return mx.concatenate([before, rows[:, :-1]], axis=1)


Activation: TypeAlias = Literal["gelu", "gelu_tanh", "relu", "silu"]


def activation(x: mx.array, kind: Activation) -> mx.array:
    """What stands between the products of a feed-forward, of every value of x."""
    return {"gelu": nn.gelu, "gelu_tanh": nn.gelu_approx, "relu": nn.relu, "silu": nn.silu}[kind](x)


def linear(x: mx.array, weight: mx.array) -> mx.array:
    """x [.., columns] @ weight [rows, columns].T: [.., rows]."""
    return x @ weight.T


def packed_linear(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    *,
    group_size: int,
    bits: int,
    mode: str,
    activation_bits: int = 16,
) -> mx.array:
    """x [.., columns] @ W.T for W [rows, columns] packed as `mx.quantize` packs it: [.., rows].

    Args:
        activation_bits: 8 rounds x first, see `rounded_activations`, but for mxfp8: its weights are no whole numbers.
    """
    if x.size == 0:  # MLX 0.32.4 divides by the number of rows and dies
        return mx.zeros((*x.shape[:-1], weight.shape[0]), dtype=x.dtype)
    if activation_bits == 8 and mode != "mxfp8":
        x = rounded_activations(x)
    return mx.quantized_matmul(
        x, weight, scales=scales, biases=biases, transpose=True, group_size=group_size, bits=bits, mode=mode
    )


ACTIVATION_BLOCK = 32
SMALLEST_ROUNDED = 2.0**-120  # a block of smaller activations becomes zeros: the inverse of its scale would overflow


def rounded_activations(x: mx.array) -> mx.array:
    """x [.., columns] with each 32 values of a row rounded to multiples of a 127th of the largest, as with int8 codes."""
    columns = x.shape[-1]
    filled = mx.pad(x.astype(mx.float32), [(0, 0)] * (x.ndim - 1) + [(0, -columns % ACTIVATION_BLOCK)])
    blocks = filled.reshape(*x.shape[:-1], -1, ACTIVATION_BLOCK)
    largest = mx.abs(blocks).max(axis=-1, keepdims=True)
    inverse = mx.where(largest >= SMALLEST_ROUNDED, 127 / mx.maximum(largest, SMALLEST_ROUNDED), 0)
    rounded = mx.round(blocks * inverse) * (largest / 127)
    return rounded.reshape(*x.shape[:-1], -1)[..., :columns].astype(x.dtype)
