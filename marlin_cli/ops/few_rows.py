"""The parts of a step of decoding, each once in plain MLX: one new row of each of a few streams. `dispatch` has fast twins.

A step reads every weight for a row or a few, so what it costs on a GPU is memory and launches. The parts are cut where a GPU
must wait for all of a row: each is a launch on Metal, or two.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from marlin_cli.ops import reference
from marlin_cli.ops.reference import KeyValueRows

ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "silu": nn.silu, "gelu": nn.gelu, "gelu_tanh": nn.gelu_approx, "relu": nn.relu,
}  # fmt: skip


class Norm(NamedTuple):
    """A normalisation of rows."""

    kind: str  # rmsnorm, layernorm, variance
    module: Any  # has `weight` and `eps`, and takes rows


class Projections(NamedTuple):
    """How a row becomes queries, keys and values."""

    query: nn.Module  # linear layers, packed or dense
    key: nn.Module
    value: nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    head_norms: tuple[nn.Module, nn.Module] | None  # of queries and keys, before they are rotated
    base: float | None  # of their rotation; None for none
    interleaved: bool


class Reading(NamedTuple):
    """How attention reads what is remembered, and what becomes of it."""

    scale: float  # of dot products
    window: int | None  # a row sees at most this many before it
    relative_bias: mx.array | None  # [heads, 2 * most + 1], see `reference.attention`
    out: nn.Module  # the linear layer after it


class Tail(NamedTuple):
    """The last rows of keys and values, both [streams, kv_heads, tail_rows, head_dim]: few enough to be copied by a step."""

    keys: mx.array
    values: mx.array


class Place(NamedTuple):
    """Where the new rows stand."""

    counts: mx.array  # [2] int32: rows before the tail, and row of the tail
    left_padding: mx.array | None  # [streams] int32: filler at the start of each stream


def projections(x: mx.array, norm: Norm, parts: Projections, tail: Tail, place: Place) -> tuple[mx.array, Tail]:
    """Queries [streams, heads, 1, head_dim] of rows x [streams, width], and the tail with their keys and values in it."""
    normed = norm.module(x)[:, None]

    def of_heads(layer: nn.Module, heads: int, head_norm: nn.Module | None, rotated: bool) -> mx.array:
        rows: mx.array = layer(normed).reshape(x.shape[0], 1, heads, parts.head_dim)
        rows = rows if head_norm is None else head_norm(rows)
        rows = rows.swapaxes(1, 2)
        if not rotated or parts.base is None:
            return rows
        offset = place.counts.sum()
        offset = offset if place.left_padding is None else offset - place.left_padding
        return mx.fast.rope(rows, parts.head_dim, traditional=parts.interleaved, base=parts.base, scale=1.0, offset=offset)

    query_norm, key_norm = parts.head_norms or (None, None)
    new = mx.arange(tail.keys.shape[2])[:, None] == place.counts[1]
    keys = mx.where(new, of_heads(parts.key, parts.kv_heads, key_norm, True), tail.keys)
    values = mx.where(new, of_heads(parts.value, parts.kv_heads, None, False), tail.values)
    return of_heads(parts.query, parts.heads, query_norm, True), Tail(keys, values)


def attention_out(
    queries: mx.array, stored: Tail | None, tail: Tail, place: Place, reading: Reading, residual: mx.array
) -> mx.array:
    """residual + attention of the new rows over all before them, through a linear layer: [streams, width].

    Args:
        queries: [streams, heads, 1, head_dim].
        stored: rows before the tail, in storage [streams, kv_heads, capacity, head_dim] that may be longer; None for none.
        tail: with the new rows in it.
    """
    before, at = place.counts[0], place.counts[1]
    position = before + at
    positions, there = before + mx.arange(tail.keys.shape[2]), mx.arange(tail.keys.shape[2]) <= at
    keys, values = tail
    if stored is not None:
        capacity = mx.arange(stored.keys.shape[2])
        positions, there = mx.concatenate([capacity, positions]), mx.concatenate([capacity < before, there])
        keys, values = mx.concatenate([stored.keys, keys], axis=2), mx.concatenate([stored.values, values], axis=2)
    if reading.window is not None:
        there = there & (positions >= position - reading.window)
    seen = there[None, None, None]
    if place.left_padding is not None:
        seen = seen & (positions >= place.left_padding[:, None, None, None])
    mask = seen
    if reading.relative_bias is not None:
        most = reading.relative_bias.shape[1] // 2
        bias = reading.relative_bias[:, mx.clip(positions - position, -most, most) + most].astype(queries.dtype)
        mask = mx.where(seen, bias[None, :, None], mx.finfo(queries.dtype).min)
    out = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=reading.scale, mask=mask)
    return residual + reading.out(out.reshape(queries.shape[0], -1))


def memory_attention_out(
    queries: mx.array,
    keys: KeyValueRows,
    values: KeyValueRows,
    lengths: mx.array | None,
    reading: Reading,
    residual: mx.array,
) -> mx.array:
    """residual + attention of a row of each stream over another sequence, through a linear layer: [streams, width].

    Args:
        queries: [streams, heads, 1, head_dim].
        keys, values: [streams, heads, total, head_dim], dense or packed.
        lengths: [streams] how many rows of the other sequence are real; all if None.
    """
    out = reference.paged_attention(queries, [keys], [values], reading.scale, causal=False, lengths=lengths)
    return residual + reading.out(out.reshape(queries.shape[0], -1))


def feed_forward(x: mx.array, norm: Norm, gate: nn.Module | None, up: nn.Module, activation: str) -> mx.array:
    """f(G(norm(x))) * U(norm(x)) of rows x [streams, width], or f(U(norm(x))): [streams, wider]."""
    normed, function = norm.module(x), ACTIVATIONS[activation]
    return function(up(normed)) if gate is None else function(gate(normed)) * up(normed)


def linear_added(x: mx.array, layer: nn.Module, residual: mx.array) -> mx.array:
    """residual + layer(x), of rows [streams, ..]."""
    return residual + layer(x)


def normed_linear(x: mx.array, norm: Norm, layer: nn.Module, added: mx.array | None, dtype: mx.Dtype) -> mx.array:
    """layer(norm(x)) + added [width] of rows x [streams, ..], as `dtype`."""
    out: mx.array = layer(norm.module(x))
    return (out if added is None else out + added).astype(dtype)


class Drawing(NamedTuple):
    """How ids are drawn: `choose` in plain MLX, and the same in numbers."""

    choose: Callable[[mx.array, mx.array | None], mx.array]  # ids [streams] of logits [streams, vocab] and noise [vocab]
    filters: mx.array | None  # [4] float32: temperature, top_p, log(min_p) or 1, top_k; None takes the likeliest id
    noise: mx.array | None  # [steps, vocab] float32


def draw_embed(
    logits: mx.array, drawing: Drawing, step: int, ids: mx.array, table: mx.array, positions: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Ids [streams, steps] int32 with this step's in them, drawn from logits [streams, vocab], and the rows that these are.

    Args:
        table: [vocab, width] embeddings.
        positions: [steps, width], of which the first is the leading row's.
    """
    drawn = drawing.choose(logits, None if drawing.noise is None else drawing.noise[step])
    steps = ids.shape[1]
    rows = table[drawn]
    if positions is not None:
        rows = rows + positions[(step + 1) % steps]
    return mx.where(mx.arange(steps) == step, drawn[:, None].astype(mx.int32), ids), rows
