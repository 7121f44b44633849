"""Metal twins of the operations: which kernel, which variant of it and which grid, by shape.

Each operation has the signature of its twin in `reference`, and a predicate `takes_<operation>` of the same arguments that says
whether a kernel computes it, and MLX's own is not expected to be as fast. Importing this needs no Metal; calling a twin does.
"""

from collections.abc import Sequence
from typing import Literal

import mlx.core as mx

from marlin_cli.ops.kernel_inputs import (
    FLOATS,
    alike,
    factor_input,
    integers,
    on_device,
    page_inputs,
    row_count,
    shared_rows,
    stored,
    stored_template,
    tile_count,
    tile_of,
)
from marlin_cli.ops.kernel_source import launch
from marlin_cli.ops.metal_kernels import PAGES_A_LAUNCH, kernel
from marlin_cli.ops.reference import KeyValueRows, Packed

PIECE = 8  # values of a row, of a head or of weights, that a lane holds at once
MOST_SHARED_ROWS = 16  # rows of queries that read the same keys; more of them are for the matrix units
PREFILL_ROWS, PREFILL_KEYS = 32, 32  # that a threadgroup of the prefill kernel has at once
MOST_PREFILL_HEAD_DIM = 128  # by registers and threadgroup memory
SHORT_SEQUENCE = 64  # keys that one simdgroup goes through alone
THREADGROUPS_AIMED_AT = 256  # enough for the largest GPU; smaller ones run them in turn
FEWEST_ROWS_A_SPLIT = 128
MLX_HEAD_DIMS = (64, 80, 96, 128, 256)  # that MLX's own attention has kernels for


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
    """See `reference.attention`; what `takes_attention` takes."""
    _, heads, rows, head_dim = queries.shape
    kv_heads, total = keys.shape[1], keys.shape[2]
    tile = tile_of(shared_rows(queries, kv_heads))
    tiles = tile_count(queries, kv_heads)
    simdgroups = 1 if total <= SHORT_SEQUENCE else _simdgroups(head_dim)
    bias = queries if relative_bias is None else on_device(relative_bias.astype(queries.dtype).reshape(-1))
    most = 0 if relative_bias is None else relative_bias.shape[1] // 2
    sizes = [heads, kv_heads, rows, total, causal, -1 if window is None else window]
    sizes += [left_padding is not None, lengths is not None, most]
    (out,) = launch(
        kernel("flash_attention"),
        [
            queries,
            keys.astype(queries.dtype),
            values.astype(queries.dtype),
            integers(left_padding),
            integers(lengths),
            bias,
            factor_input(scale),
            mx.array(sizes, dtype=mx.int32),
        ],
        {
            "T": queries.dtype,
            "HEAD_DIM": head_dim,
            "TILE": tile,
            "SIMDGROUPS": simdgroups,
            "HAS_BIAS": relative_bias is not None,
        },
        grid=(tiles * simdgroups * 32, 1, 1),
        threadgroup=(max(simdgroups, 4) * 32, 1, 1),
        shapes=[queries.shape],
        dtypes=[queries.dtype],
    )
    return out


def takes_attention(
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
) -> bool:
    """Short sequences, and few rows of queries that MLX would need a mask for or has no kernel for.

    head_dim is a multiple of 8 up to 256.
    """
    head_dim = queries.shape[-1]
    few = 0 < shared_rows(queries, keys.shape[1]) <= MOST_SHARED_ROWS
    masked = any(array is not None for array in (window, left_padding, lengths, relative_bias))
    short = keys.shape[2] <= SHORT_SEQUENCE
    return (
        _takes_heads(queries)
        and keys.shape[2] > 0
        and keys.dtype in FLOATS
        and values.dtype in FLOATS
        and few
        and (short or masked or head_dim not in MLX_HEAD_DIMS)
    )


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
) -> mx.array:
    """See `reference.paged_attention`; what `takes_paged_attention` takes."""
    heads, rows, kv_heads = queries.shape[1], queries.shape[2], stored(keys[0]).shape[1]
    decoding = shared_rows(queries, kv_heads) <= MOST_SHARED_ROWS
    if decoding and len(keys) == 1 and window is None and left_padding is None and (not causal or rows == 1):
        return _cross_attention(queries, keys[0], values[0], scale, lengths)  # one row, the last, sees all
    counts = [row_count(page) for page in keys]
    total = sum(counts)
    hidden = 0 if window is None else max(0, total - rows - window)  # rows at the start that no query sees
    pages, base = [], 0
    for count, page_keys, page_values in zip(counts, keys, values, strict=True):
        if base + count > hidden:
            pages.append((base, count, _page_inputs(page_keys, page_values)))
        base += count
    rows_a_split = _rows_a_split(queries, keys[0], sum(count for _, count, _ in pages)) if decoding else 0
    final = len(pages) == 1 and pages[0][1] <= rows_a_split if decoding else len(pages) <= PAGES_A_LAUNCH
    queries = mx.contiguous(queries)
    parts = []
    for start in range(0, len(pages), PAGES_A_LAUNCH):
        some = pages[start : start + PAGES_A_LAUNCH]
        absent = PAGES_A_LAUNCH - len(some)
        sizes = [heads, kv_heads, rows, total, some[0][0], rows_a_split, causal, -1 if window is None else window]
        sizes += [left_padding is not None, lengths is not None, *(count for _, count, _ in some), *[0] * absent]
        inputs = [queries, *(array for _, _, arrays in some + some[:1] * absent for array in arrays)]
        inputs += [integers(left_padding), integers(lengths), factor_input(scale), mx.array(sizes, dtype=mx.int32)]
        if decoding:
            splits = sum(-(-count // rows_a_split) for _, count, _ in some)
            parts.append(_parts("flash_attention_kv_fp4", inputs, queries, keys[0], values[0], splits, final))
        else:
            parts.append(_prefill_part(inputs, queries, keys[0], values[0], final))
    return parts[0][0].reshape(queries.shape) if final else _combine(parts, queries)


def takes_paged_attention(
    queries: mx.array,
    keys: Sequence[KeyValueRows],
    values: Sequence[KeyValueRows],
    scale: float,
    *,
    causal: bool = True,
    window: int | None = None,
    left_padding: mx.array | None = None,
    lengths: mx.array | None = None,
) -> bool:
    """Pages with rows, all of keys alike, and all of values; head_dim is a multiple of 8 up to 256.

    Many rows of queries only where keys or values are packed, with a head_dim up to 128: else MLX's own is for them.
    """
    if not keys or len(keys) != len(values) or any(row_count(page) == 0 for page in keys):
        return False
    few = shared_rows(queries, stored(keys[0]).shape[1]) <= MOST_SHARED_ROWS
    packed = isinstance(keys[0], Packed) or isinstance(values[0], Packed)
    many = packed and queries.shape[-1] <= MOST_PREFILL_HEAD_DIM
    return (few or many) and _takes_heads(queries) and alike(keys) and alike(values)


def patch_embed(ids: mx.array, table: mx.array) -> mx.array:
    """See `reference.patch_embed`; what `takes_patch_embed` takes."""
    width, count = table.shape[1], ids.size
    values = 4 if width % 4 == 0 else 1
    threads = width // values
    across = min(threads, 256)
    (out,) = launch(
        kernel("patch_embed"),
        [ids.reshape(-1), table],
        {"VALUES": values},
        grid=(threads, count, 1),
        threadgroup=(across, min(count, 256 // across), 1),
        shapes=[(count, width)],
        dtypes=[table.dtype],
    )
    return out.reshape(*ids.shape[:-1], -1)


def takes_patch_embed(ids: mx.array, table: mx.array) -> bool:
    """Any ids below vocab and any table of floats."""
    return ids.size > 0 and table.size > 0 and table.dtype in FLOATS


def strided_pool(x: mx.array, stride: int, kind: Literal["mean", "max"]) -> mx.array:
    """See `reference.strided_pool`; what `takes_strided_pool` takes."""
    batch, rows, channels = x.shape
    pooled = -(-rows // stride)
    across = min(channels, 256)
    (out,) = launch(
        kernel("strided_pool"),
        [x],
        {"T": x.dtype, "STRIDE": stride, "MAXIMUM": kind == "max"},
        grid=(channels, pooled, batch),
        threadgroup=(across, min(pooled, 256 // across), 1),
        shapes=[(batch, pooled, channels)],
        dtypes=[x.dtype],
    )
    return out


def takes_strided_pool(x: mx.array, stride: int, kind: Literal["mean", "max"]) -> bool:
    """Any floats."""
    return x.size > 0 and x.dtype in FLOATS


def _takes_heads(queries: mx.array) -> bool:
    head_dim = queries.shape[-1]
    return queries.size > 0 and head_dim % PIECE == 0 and head_dim <= 32 * PIECE and queries.dtype in FLOATS


def _simdgroups(head_dim: int) -> int:
    """Simdgroups that share a tile's keys: what they leave for each other must fit 32 KiB twice over."""
    return 8 if head_dim <= 128 else 4


def _rows_a_split(queries: mx.array, keys: KeyValueRows, total: int) -> int:
    """Keys that one threadgroup reads: few enough for all of a large GPU to have work, in multiples of the fewest worth it."""
    tiles = tile_count(queries, stored(keys).shape[1])
    return -(-total * tiles // THREADGROUPS_AIMED_AT // FEWEST_ROWS_A_SPLIT) * FEWEST_ROWS_A_SPLIT


def _cross_attention(
    queries: mx.array, keys: KeyValueRows, values: KeyValueRows, scale: float, lengths: mx.array | None
) -> mx.array:
    """Attention that hides nothing, over one array of keys and one of values, split along its rows."""
    splits = -(-row_count(keys) // _rows_a_split(queries, keys, row_count(keys)))
    part = cross_parts(queries, keys, values, scale, lengths, splits == 1)
    return part[0].reshape(queries.shape) if splits == 1 else _combine([part], queries)


def cross_parts(
    queries: mx.array, keys: KeyValueRows, values: KeyValueRows, scale: float, lengths: mx.array | None, final: bool
) -> list[mx.array]:
    """What splits of the keys have seen, and their peaks and weights, see `_parts`; `final` only where there is one split."""
    total, kv_heads = row_count(keys), stored(keys).shape[1]
    rows_a_split = _rows_a_split(queries, keys, total)
    queries = mx.contiguous(queries)
    sizes = [queries.shape[1], kv_heads, queries.shape[2], total, rows_a_split, lengths is not None]
    inputs = [queries, *_page_inputs(keys, values), integers(lengths), factor_input(scale), mx.array(sizes, dtype=mx.int32)]
    splits = -(-total // rows_a_split)
    return _parts("flash_attention_cross_asymmetric", inputs, queries, keys, values, splits, final)


def _page_inputs(keys: KeyValueRows, values: KeyValueRows) -> list[mx.array]:
    return [on_device(array) for array in page_inputs(keys, values)]


def _parts(
    name: str,
    inputs: list[mx.array],
    queries: mx.array,
    keys: KeyValueRows,
    values: KeyValueRows,
    splits: int,
    final: bool,
) -> list[mx.array]:
    """What `splits` splits of the keys give, and their peaks and weights; where final, the result in the queries' type."""
    batch, heads, rows, head_dim = queries.shape
    kv_heads = stored(keys).shape[1]
    shared = shared_rows(queries, kv_heads)
    tile, simdgroups = tile_of(shared), _simdgroups(head_dim)
    out = queries.dtype if final else mx.float32
    variant = {"HEAD_DIM": head_dim, "TILE": tile, "SIMDGROUPS": simdgroups, "FINAL": final}
    return launch(
        kernel(name),
        inputs,
        {"OUT": out, **stored_template(keys, values), **variant},
        grid=(splits * simdgroups * 32, kv_heads * -(-shared // tile), batch),
        threadgroup=(simdgroups * 32, 1, 1),
        shapes=[(splits, *queries.shape), (splits, batch, heads, rows, 2)],
        dtypes=[out, mx.float32],
    )


def _prefill_part(
    inputs: list[mx.array], queries: mx.array, keys: KeyValueRows, values: KeyValueRows, final: bool
) -> list[mx.array]:
    """What the pages of one launch give to many rows of queries, as `_parts` says it."""
    batch, heads, rows, head_dim = queries.shape
    kv_heads = stored(keys).shape[1]
    out = queries.dtype if final else mx.float32
    k_tile, v_tile = (mx.bfloat16 if isinstance(page, Packed) else page.dtype for page in (keys, values))
    variant = {"K_TILE": k_tile, "V_TILE": v_tile, "HEAD_DIM": head_dim, "KEYS": PREFILL_KEYS, "FINAL": final}
    return launch(
        kernel("flash_attention_kv_fp4_prefill"),
        inputs,
        {"OUT": out, **stored_template(keys, values), **variant},
        grid=(-(-shared_rows(queries, kv_heads) // PREFILL_ROWS) * 128, kv_heads, batch),
        threadgroup=(128, 1, 1),
        shapes=[(1, *queries.shape), (1, batch, heads, rows, 2)],
        dtypes=[out, mx.float32],
    )


def _combine(parts: list[list[mx.array]], queries: mx.array) -> mx.array:
    """The attention over all keys from what splits of them have seen."""
    outputs, stats = (mx.concatenate(list(column), axis=0) for column in zip(*parts, strict=True))
    splits, head_dim = outputs.shape[0], queries.shape[-1]
    rows = queries.size // head_dim
    (out,) = launch(
        kernel("attention_combine"),
        [outputs.reshape(splits, rows, head_dim), stats.reshape(splits, rows, 2)],
        {"T": queries.dtype, "HEAD_DIM": head_dim},
        grid=(head_dim, rows, 1),
        threadgroup=(head_dim, min(rows, 256 // head_dim), 1),
        shapes=[queries.shape],
        dtypes=[queries.dtype],
    )
    return out
