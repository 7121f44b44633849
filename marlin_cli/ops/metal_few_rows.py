"""Metal twins of `few_rows`: which kernel, which variant of it and which grid, for up to eight streams."""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from marlin_cli.ops import metal
from marlin_cli.ops.few_rows import Drawing, Norm, Place, Projections, Reading, Tail
from marlin_cli.ops.kernel_inputs import FLOATS, integers, nothing, on_device, tile_of
from marlin_cli.ops.kernel_source import launch
from marlin_cli.ops.metal import PIECE
from marlin_cli.ops.metal_kernels import kernel
from marlin_cli.ops.metal_layers import LayerInputs, read_layer, takes_layers
from marlin_cli.ops.reference import KeyValueRows

MOST_STREAMS = 8  # rows of x that share a weight's decoding; more of them are for MLX's matrix units
MOST_SHARED = 6144  # floats of attention that a threadgroup holds, in 24 KiB
MOST_TAIL_ROWS = 64  # that every threadgroup of a linear layer attends to again
MOST_VOCAB = 1024
SIMDGROUPS = 4  # of a threadgroup that multiplies
MANY_ROWS = 2048  # of W, from which on a simdgroup has four at once
COPIES = 4  # threadgroups that copy a tail
DRAWING_THREADS = 256
SPLIT_ROWS, MOST_SPLITS = 128, 8  # of a cache: rows that are worth a threadgroup, and parts that are worth joining
NORMS = ("none", "rmsnorm", "layernorm", "variance")  # as `NormKind`
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")  # as `Activation`


def projections(x: mx.array, norm: Norm, parts: Projections, tail: Tail, place: Place) -> tuple[mx.array, Tail]:
    """See `few_rows.projections`."""
    streams, depth = x.shape
    heads, kv_heads, head_dim = parts.heads, parts.kv_heads, parts.head_dim
    layers = [read_layer(layer, x.dtype) for layer in (parts.query, parts.key, parts.value)]
    out_rows = sum(layer.out_rows for layer in layers)
    tile = _tile(streams)
    rows = _rows(out_rows, tile)
    sizes = [streams, depth, heads, kv_heads, tail.keys.shape[2], place.left_padding is not None]
    rotation = 0 if parts.base is None else 2 if parts.interleaved else 1
    factors = [*(layer.factor for layer in layers), norm.module.eps, math.log2(parts.base or 1.0)]
    queries, keys, values = launch(
        kernel("norm_projections"),
        [
            x, on_device(norm.module.weight), *(array for layer in layers for array in layer.arrays),
            on_device(tail.keys), on_device(tail.values), integers(place.left_padding), place.counts,
            _floats(factors), _integers(sizes),
        ],
        {
            "T": x.dtype, **layers[0].template, "NORM": NORMS.index(norm.kind), "TILE": tile, "ROWS": rows,
            "SIMDGROUPS": SIMDGROUPS, "HEAD_DIM": head_dim, "ROTATION": rotation,
        },
        **_grid(out_rows, rows, streams, tile, COPIES),
        shapes=[(streams, heads, 1, head_dim), tail.keys.shape, tail.values.shape],
        dtypes=[x.dtype] * 3,
    )  # fmt: skip
    return queries, Tail(keys, values)


def takes_projections(x: mx.array, norm: Norm, parts: Projections, tail: Tail, place: Place) -> bool:
    """Layers of one format, heads of whole pieces; no norms of heads."""
    layers = [parts.query, parts.key, parts.value]
    return (
        _takes_rows(x, norm)
        and parts.head_norms is None
        and parts.head_dim % PIECE == 0
        and takes_layers(layers, x, biased=False)
        and tail.keys.dtype == tail.values.dtype == x.dtype
    )


def attention_out(
    queries: mx.array, stored: Tail | None, tail: Tail, place: Place, reading: Reading, residual: mx.array
) -> mx.array:
    """See `few_rows.attention_out`: a launch where a short tail is all there is, and nothing hides it, else two."""
    plain = place.left_padding is None and reading.window is None and reading.relative_bias is None
    if stored is not None or not plain or tail.keys.shape[2] > MOST_TAIL_ROWS:
        return _joined(*_cache_attention(queries, stored or tail, tail, place, reading), queries, reading, residual)
    streams, heads, _, head_dim = queries.shape
    layer = read_layer(reading.out, queries.dtype)
    tile, rows, variant = _shared(layer, queries)
    sizes = [streams, heads, tail.keys.shape[1], tail.keys.shape[2], layer.out_rows]
    (out,) = launch(
        kernel("tail_attention_linear"),
        [
            queries, on_device(tail.keys), on_device(tail.values), *layer.arrays, residual, place.counts,
            _floats([reading.scale, layer.factor]), _integers(sizes),
        ],
        variant,
        **_grid(layer.out_rows, rows, streams, tile),
        shapes=[residual.shape],
        dtypes=[residual.dtype],
    )  # fmt: skip
    return out


def takes_attention_out(
    queries: mx.array, stored: Tail | None, tail: Tail, place: Place, reading: Reading, residual: mx.array
) -> bool:
    """Rows of one type."""
    same = all(array.dtype == queries.dtype for array in (*tail, *(stored or tail)))
    return same and _takes_reading(queries, reading, residual)


def memory_attention_out(
    queries: mx.array,
    keys: KeyValueRows,
    values: KeyValueRows,
    lengths: mx.array | None,
    reading: Reading,
    residual: mx.array,
) -> mx.array:
    """See `few_rows.memory_attention_out`: two launches."""
    parts, stats = metal.cross_parts(queries, keys, values, reading.scale, lengths, final=False)
    return _joined(parts, stats, queries, reading, residual)


def takes_memory_attention_out(
    queries: mx.array,
    keys: KeyValueRows,
    values: KeyValueRows,
    lengths: mx.array | None,
    reading: Reading,
    residual: mx.array,
) -> bool:
    """What `metal.paged_attention` takes of few rows."""
    known = metal.takes_paged_attention(queries, [keys], [values], reading.scale, causal=False, lengths=lengths)
    return known and _takes_reading(queries, reading, residual)


def _takes_reading(queries: mx.array, reading: Reading, residual: mx.array) -> bool:
    """Heads of whole pieces up to 256, and no more of them than a threadgroup holds."""
    streams, heads, _, head_dim = queries.shape
    return (
        0 < streams <= MOST_STREAMS
        and queries.dtype in FLOATS
        and residual.dtype == queries.dtype
        and head_dim % PIECE == 0
        and head_dim <= 32 * PIECE
        and heads * head_dim <= MOST_SHARED
        and takes_layers([reading.out], queries, biased=False)
    )


def _joined(parts: mx.array, stats: mx.array, queries: mx.array, reading: Reading, residual: mx.array) -> mx.array:
    """What splits have seen, as one, through the linear layer after it."""
    layer = read_layer(reading.out, queries.dtype)
    tile, rows, variant = _shared(layer, queries)
    sizes = [parts.shape[0], queries.shape[0], layer.out_rows]
    (out,) = launch(
        kernel("joined_linear"),
        [parts, stats, *layer.arrays, residual, _floats([layer.factor]), _integers(sizes)],
        variant,
        **_grid(layer.out_rows, rows, queries.shape[0], tile),
        shapes=[residual.shape],
        dtypes=[residual.dtype],
    )
    return out


def _shared(layer: LayerInputs, queries: mx.array) -> tuple[int, int, dict[str, Any]]:
    """Tile and rows of a kernel whose threadgroups hold the attention of a tile, and its template."""
    streams, heads, _, head_dim = queries.shape
    tile = _tile(streams)
    while tile * heads * head_dim > MOST_SHARED:
        tile //= 2
    rows = _rows(layer.out_rows, tile)
    sizes = {"TILE": tile, "ROWS": rows, "SIMDGROUPS": SIMDGROUPS, "HEAD_DIM": head_dim, "WIDTH": heads * head_dim}
    return tile, rows, {"T": queries.dtype, **layer.template, **sizes}


def feed_forward(x: mx.array, norm: Norm, gate: nn.Module | None, up: nn.Module, activation: str) -> mx.array:
    """See `few_rows.feed_forward`."""
    streams, depth = x.shape
    layer = read_layer(up, x.dtype)
    other = layer if gate is None else read_layer(gate, x.dtype)
    tile = _tile(streams)
    rows = _rows(layer.out_rows, tile)
    biases = [nothing(x.dtype) if each.bias is None else on_device(each.bias) for each in (layer, other)]
    (out,) = launch(
        kernel("norm_feed_forward"),
        [
            x, on_device(norm.module.weight), *layer.arrays, biases[0], *other.arrays, biases[1],
            _floats([layer.factor, other.factor, norm.module.eps]), _integers([streams, depth, layer.out_rows]),
        ],
        {
            "T": x.dtype, **layer.template, "NORM": NORMS.index(norm.kind), "TILE": tile, "ROWS": rows,
            "SIMDGROUPS": SIMDGROUPS, "GATED": gate is not None, "ACTIVATION": ACTIVATIONS.index(activation),
            "HAS_BIAS": layer.bias is not None,
        },
        **_grid(layer.out_rows, rows, streams, tile),
        shapes=[(streams, layer.out_rows)],
        dtypes=[x.dtype],
    )  # fmt: skip
    return out


def takes_feed_forward(x: mx.array, norm: Norm, gate: nn.Module | None, up: nn.Module, activation: str) -> bool:
    """Two layers of one format, both with a bias or both without."""
    layers = [up] if gate is None else [up, gate]
    return activation in ACTIVATIONS and _takes_rows(x, norm) and takes_layers(layers, x)


def linear_added(x: mx.array, layer: nn.Module, residual: mx.array) -> mx.array:
    """See `few_rows.linear_added`."""
    return _linear(x, None, layer, residual, True, residual.dtype)


def takes_linear_added(x: mx.array, layer: nn.Module, residual: mx.array) -> bool:
    """Rows of one type."""
    return _takes_rows(x, None) and residual.dtype == x.dtype and takes_layers([layer], x)


def normed_linear(x: mx.array, norm: Norm, layer: nn.Module, added: mx.array | None, dtype: mx.Dtype) -> mx.array:
    """See `few_rows.normed_linear`."""
    return _linear(x, norm, layer, added, False, dtype)


def takes_normed_linear(x: mx.array, norm: Norm, layer: nn.Module, added: mx.array | None, dtype: mx.Dtype) -> bool:
    """Rows of one type."""
    same = added is None or added.dtype == x.dtype
    return same and dtype in FLOATS and _takes_rows(x, norm) and takes_layers([layer], x)


def draw_embed(
    logits: mx.array, drawing: Drawing, step: int, ids: mx.array, table: mx.array, positions: mx.array | None
) -> tuple[mx.array, mx.array]:
    """See `few_rows.draw_embed`."""
    streams, vocab = logits.shape
    steps, width = ids.shape[1], table.shape[1]
    noise, filters = (nothing(mx.float32) if array is None else array for array in (drawing.noise, drawing.filters))
    places = nothing(table.dtype) if positions is None else on_device(positions)
    found, rows = launch(
        kernel("draw_embed"),
        [logits, noise, filters, on_device(ids), table, places, _integers([steps, step, width])],
        {
            "T": table.dtype, "VOCAB": vocab, "THREADS": DRAWING_THREADS, "SAMPLING": drawing.filters is not None,
            "HAS_POSITIONS": positions is not None,
        },
        grid=(DRAWING_THREADS, streams, 1),
        threadgroup=(DRAWING_THREADS, 1, 1),
        shapes=[(streams, steps), (streams, width)],
        dtypes=[mx.int32, table.dtype],
    )  # fmt: skip
    return found, rows


def takes_draw_embed(
    logits: mx.array, drawing: Drawing, step: int, ids: mx.array, table: mx.array, positions: mx.array | None
) -> bool:
    """Few enough ids that a threadgroup compares each with each."""
    same = positions is None or positions.dtype == table.dtype
    known = logits.dtype == mx.float32 and table.dtype in FLOATS and same
    return known and logits.size > 0 and logits.shape[1] <= MOST_VOCAB and table.shape[0] >= logits.shape[1]


def _cache_attention(queries: mx.array, stored: Tail, tail: Tail, place: Place, reading: Reading) -> tuple[mx.array, mx.array]:
    """What splits of the stored rows have seen, and the tail: as the kernel says it."""
    streams, heads, _, head_dim = queries.shape
    kv_heads, capacity, tail_rows = stored.keys.shape[1], stored.keys.shape[2], tail.keys.shape[2]
    shared = heads // kv_heads
    tile, simdgroups = tile_of(shared), 8 if head_dim <= 128 else 4
    rows_a_split = max(SPLIT_ROWS, -(-capacity // MOST_SPLITS))
    splits = -(-capacity // rows_a_split) + 1
    bias = None if reading.relative_bias is None else reading.relative_bias.astype(queries.dtype)
    most = 0 if bias is None else bias.shape[1] // 2
    sizes = [heads, kv_heads, capacity, tail_rows, rows_a_split, -1 if reading.window is None else reading.window]
    sizes += [place.left_padding is not None, most]
    parts, stats = launch(
        kernel("cache_attention"),
        [
            queries, *(on_device(array) for array in (*stored, *tail)), integers(place.left_padding),
            nothing(queries.dtype) if bias is None else on_device(bias.reshape(-1)), place.counts, _floats([reading.scale]),
            _integers(sizes),
        ],
        {"T": queries.dtype, "HEAD_DIM": head_dim, "TILE": tile, "SIMDGROUPS": simdgroups, "HAS_BIAS": bias is not None},
        grid=(splits * simdgroups * 32, kv_heads * -(-shared // tile), streams),
        threadgroup=(simdgroups * 32, 1, 1),
        shapes=[(splits, streams, heads, head_dim), (splits, streams, heads, 2)],
        dtypes=[mx.float32, mx.float32],
    )  # fmt: skip
    return parts, stats


def _linear(
    x: mx.array, norm: Norm | None, layer: nn.Module, added: mx.array | None, of_each: bool, dtype: mx.Dtype
) -> mx.array:
    streams, depth = x.shape
    weights = read_layer(layer, x.dtype)
    tile = _tile(streams)
    rows = _rows(weights.out_rows, tile)
    absent = nothing(x.dtype)
    (out,) = launch(
        kernel("norm_linear"),
        [
            x, absent if norm is None else on_device(norm.module.weight), *weights.arrays,
            absent if weights.bias is None else on_device(weights.bias), absent if added is None else on_device(added),
            _floats([weights.factor, 0.0 if norm is None else norm.module.eps]),
            _integers([streams, depth, weights.out_rows, of_each]),
        ],
        {
            "T": x.dtype, "OUT": dtype, **weights.template, "NORM": 0 if norm is None else NORMS.index(norm.kind),
            "TILE": tile, "ROWS": rows, "SIMDGROUPS": SIMDGROUPS, "HAS_BIAS": weights.bias is not None,
            "HAS_ADDED": added is not None,
        },
        **_grid(weights.out_rows, rows, streams, tile),
        shapes=[(streams, weights.out_rows)],
        dtypes=[dtype],
    )  # fmt: skip
    return out


def _takes_rows(x: mx.array, norm: Norm | None) -> bool:
    streams, depth = x.shape
    known = norm is None or (norm.kind in NORMS and norm.module.weight.dtype == x.dtype and "bias" not in norm.module)
    return known and 0 < streams <= MOST_STREAMS and x.dtype in FLOATS and depth % PIECE == 0


def _tile(streams: int) -> int:
    """Rows of x that a simdgroup has at once: a power of two."""
    return 1 << (streams - 1).bit_length()


def _rows(out_rows: int, tile: int) -> int:
    """Rows of W that a simdgroup has at once: few where W is small, for all of a GPU to have some."""
    return 4 if tile <= 4 and out_rows >= MANY_ROWS else 2


def _grid(out_rows: int, rows: int, streams: int, tile: int, more: int = 0) -> dict[str, tuple[int, int, int]]:
    """A simdgroup for each `rows` rows of W and tile of x, and `more` threadgroups beyond them."""
    threadgroups = -(-out_rows // (rows * SIMDGROUPS)) + more
    threads = SIMDGROUPS * 32
    return {"grid": (threadgroups * threads, -(-streams // tile), 1), "threadgroup": (threads, 1, 1)}


def _floats(values: list[float]) -> mx.array:
    return mx.array(values, dtype=mx.float32)


def _integers(values: list[int]) -> mx.array:
    return mx.array(values, dtype=mx.int32)
