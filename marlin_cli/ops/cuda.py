"""CUDA twins of the operations: which kernel, which variant of it and which grid, by shape.

Each operation has the signature of its twin in `reference`, and a predicate `takes_<operation>` of the same arguments that says
whether the kernels compute it here, at a speed worth having. Importing this needs no CUDA; calling a twin does.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import mlx.core as mx

from marlin_cli.ops.cuda_decoded import copies
from marlin_cli.ops.cuda_kernels import PAGES_A_LAUNCH, kernel
from marlin_cli.ops.kernel_inputs import (
    FLOATS,
    alike,
    factor_input,
    integers,
    page_inputs,
    row_count,
    shared_rows,
    stored,
    stored_template,
    tile_count,
    tile_of,
    unread,
)
from marlin_cli.ops.kernel_source import launch
from marlin_cli.ops.reference import KeyValueRows

MOST_ROWS_OF_X, MOST_ROWS_OF_FLOAT32 = 64, 32  # of which decoding for each 32 takes less than writing the decoded weight
SHARED_X_BYTES = 32768
# Multiplications below which MLX's own products are taken, which its package brings compiled: the host hands them out in 23 us
# instead of 32. Above, with 1 to 7 rows of a square of 1,024 or 2,048, theirs take up to three times as long as ours (H200).
WORTH_A_LAUNCH = 2**20
# Rows of x from which on MLX compiles its own products at first use, up to 43 s each without a word, by an algorithm that is
# slower than decoding the weight once for a dense product, or no faster.
FEW_ROWS = 8
SMALL_WEIGHT = 2**20  # numbers, of which decoding takes less time than MLX's dense product takes to begin
LARGE_WEIGHT = 2**26  # numbers, of which dense products of more than 16 rows take less time than decoding
WORTH_COMPILING = 2**26  # numbers to copy: MLX has its own gather at hand
MOST_SHARED_ROWS = 64  # rows of queries that read the same keys; more of them are matrix products, which are MLX's
MOST_KEYS_UNSPLIT = 4096
MOST_KEYS_PLAIN = 32
# Of queries or keys that are copied where they have gaps, as a prompt's rows are read once and copying takes microseconds: a
# kernel that follows strides takes MLX more than a second to compile, in each process.
COPIED_BYTES = 1 << 22


def packed_linear(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    *,
    group_size: int,
    bits: int,
    mode: str,
) -> mx.array:
    """See `reference.packed_linear`; what `takes_packed_linear` takes."""
    settings: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": mode}
    rows, columns = x.size // x.shape[-1], x.shape[-1]
    taken = _takes_gemm(x, weight, scales, **settings)
    if not taken or _dense_is_faster(rows, weight.shape[0], columns):

        def make() -> mx.array:
            return unpacked(weight, scales, biases, **settings, dtype=x.dtype)

        copy = copies().of(weight, x.dtype, weight.shape[0] * columns * x.dtype.size, make)
        if copy is None and not taken:
            copy = make()
        if copy is not None:
            return x @ copy.T
    flat = x.ndim == 2  # a reshape is work for the host, which is as busy as the GPU when rows are few
    how = _gemm_launch(rows, weight.shape[0], columns, bits, group_size, mode == "affine", x.dtype)
    zeros = scales if biases is None else biases
    (out,) = kernel("marlin_gemm_fp4")(inputs=[x if flat else x.reshape(-1, columns), weight, scales, zeros], **how)
    return out if flat else out.reshape(*x.shape[:-1], weight.shape[0])


def takes_packed_linear(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array | None,
    *,
    group_size: int,
    bits: int,
    mode: str,
) -> bool:
    """Few rows of x with enough work to be worth a launch; 8 and more of 16 bits, which MLX is slow at, or slow to begin."""
    if x.dtype not in FLOATS or weight.ndim != 2 or x.size == 0 or x.shape[-1] % 32:
        return False
    rows = x.size // x.shape[-1]
    known = (mode, bits) in (("nvfp4", 4), ("mxfp4", 4), ("mxfp8", 8), ("affine", 4), ("affine", 8))
    if rows >= FEW_ROWS and x.dtype != mx.float32 and known:
        return True
    taken = _takes_gemm(x, weight, scales, group_size=group_size, bits=bits, mode=mode)
    return taken and x.size * weight.shape[0] >= WORTH_A_LAUNCH


def product_way(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None, *, group_size: int, bits: int, mode: str
) -> tuple[str, str]:
    """What multiplies these on an NVIDIA GPU, and why, for people. Nothing is computed."""
    settings: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": mode}
    if not takes_packed_linear(x, weight, scales, biases, **settings):
        if _takes_gemm(x, weight, scales, **settings):
            return "MLX", "too little work for a launch of ours, which takes the host longer"
        return "MLX", "float32 rows, or a format or a width that the kernels do not take"
    if not _takes_gemm(x, weight, scales, **settings):
        return (
            "decoded, dense",
            "many rows: with a copy that is kept; where MARLIN_DECODED leaves no room made anew",
        )
    if _dense_is_faster(x.size // x.shape[-1], weight.shape[0], x.shape[-1]):
        return "decoded, dense", "many rows: with a copy that is kept; where MARLIN_DECODED leaves no room marlin_gemm_fp4"
    return "marlin_gemm_fp4", "few rows: each weight is decoded once for up to 32 of them"


def _takes_gemm(x: mx.array, weight: mx.array, scales: mx.array, *, group_size: int, bits: int, mode: str) -> bool:
    """Some rows of x and what `marlin_gemm_fp4` knows: whole numbers for x of 16 bits alone, as those bits are exact then."""
    if mode == "affine":
        known = bits in (4, 8) and group_size % 32 == 0 and x.dtype != mx.float32 and scales.dtype == x.dtype
    else:
        known = (mode, bits, group_size) in (("nvfp4", 4, 16), ("mxfp4", 4, 32), ("mxfp8", 8, 32))
    most = MOST_ROWS_OF_FLOAT32 if x.dtype == mx.float32 else MOST_ROWS_OF_X
    return known and x.size <= most * x.shape[-1]


def _dense_is_faster(rows_of_x: int, rows: int, columns: int) -> bool:
    """Whether a dense product with a copy that is decoded already beats `marlin_gemm_fp4` (H200)."""
    return rows_of_x > (16 if rows * columns >= LARGE_WEIGHT else 64 if rows * columns <= SMALL_WEIGHT else 32)


def unpacked(
    weight: mx.array, scales: mx.array, biases: mx.array | None, *, group_size: int, bits: int, mode: str, dtype: mx.Dtype
) -> mx.array:
    """The weight [rows, columns] in `dtype` of one packed in 4 or 8 bits; `mx.dequantize` takes four times as long."""
    rows, columns = weight.shape[0], weight.shape[1] * 32 // bits
    (out,) = launch(
        kernel("unpack"),
        [weight, scales, scales if biases is None else biases],
        {"T": dtype, "BITS": bits, "GROUP": group_size, "AFFINE": mode == "affine"},
        grid=(_whole_blocks(rows * columns // 8), 1, 1),
        threadgroup=(256, 1, 1),
        shapes=[(rows, columns)],
        dtypes=[dtype],
    )
    return out


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
    head_dim = queries.shape[-1]
    kv_heads, total = keys.shape[1], keys.shape[2]
    if (
        not causal
        and window is None
        and left_padding is None
        and relative_bias is None
        and total > _rows_a_split(queries, [keys])
    ):
        return _cross_attention(queries, keys, values, scale, lengths)
    tile, tiles = tile_of(shared_rows(queries, kv_heads)), tile_count(queries, kv_heads)
    warps = 4 if total > 128 else 1
    read_once = queries.shape[2] > 1 and max(queries.nbytes, keys.nbytes) <= COPIED_BYTES
    (out,) = launch(
        kernel("flash_attention", in_rows=read_once),
        [
            queries,
            keys.astype(queries.dtype),
            values.astype(queries.dtype),
            integers(left_padding),
            integers(lengths),
            queries if relative_bias is None else mx.contiguous(relative_bias.astype(queries.dtype)),
            factor_input(scale),
        ],
        {
            "T": queries.dtype,
            "HEAD_DIM": head_dim,
            "TILE": tile,
            "WARPS": warps,
            "CAUSAL": causal,
            "HAS_WINDOW": window is not None,
            "WINDOW": window or 0,  # values become part of a kernel's name, so none is below 0
            "HAS_PADDING": left_padding is not None,
            "HAS_LENGTHS": lengths is not None,
            "HAS_BIAS": relative_bias is not None,
        },
        grid=(-(-tiles * warps // 4) * 128, 1, 1),
        threadgroup=(128, 1, 1),
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
    """Few rows of queries of 16 to 256 numbers; masked, biased or short ones, as MLX's own is fast at the rest."""
    total = keys.shape[2]
    plain = window is None and left_padding is None and lengths is None and relative_bias is None
    most = MOST_KEYS_PLAIN if plain else MOST_KEYS_UNSPLIT
    return _takes_queries(queries, keys.shape[1]) and 0 < total <= most and keys.dtype in FLOATS


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
    plain = window is None and left_padding is None
    if len(keys) == 1 and plain and (not causal or queries.shape[2] == 1):  # one row, the last, sees all
        return _cross_attention(queries, keys[0], values[0], scale, lengths)
    rows_a_split = _rows_a_split(queries, keys)
    counts = [row_count(page) for page in keys]
    one_part = len(keys) == 1 and counts[0] <= rows_a_split
    parts, first = [], 0
    for start in range(0, len(keys), PAGES_A_LAUNCH):
        some = slice(start, start + PAGES_A_LAUNCH)
        pages = [page_inputs(k, v) for k, v in zip(keys[some], values[some], strict=True)]
        pages += pages[:1] * (PAGES_A_LAUNCH - len(pages))
        inputs = [queries, *(array for page in pages for array in page)]
        inputs += [integers(left_padding), integers(lengths), factor_input(scale)]
        template = {
            "CAUSAL": causal,
            "HAS_WINDOW": window is not None,
            "WINDOW": window or 0,  # values become part of a kernel's name, so none is below 0
            "HAS_PADDING": left_padding is not None,
            "HAS_LENGTHS": lengths is not None,
        }
        splits = sum(-(-count // rows_a_split) for count in counts[some])
        span = (first + 1, sum(counts), rows_a_split)
        parts.append(_part("flash_attention_kv_fp4", inputs, span, template, queries, keys[0], values[0], splits, one_part))
        first += sum(counts[some])
    return parts[0][0][0] if one_part else _combine(parts, queries)


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
    """Few rows of queries; head_dim is a multiple of 16 up to 256; all pages of keys of one kind, and all of values."""
    if not keys or any(row_count(page) == 0 for page in keys):
        return False
    return alike(keys) and alike(values) and _takes_queries(queries, stored(keys[0]).shape[1])


def patch_embed(ids: mx.array, table: mx.array) -> mx.array:
    """See `reference.patch_embed`; what `takes_patch_embed` takes."""
    width, count = table.shape[1], ids.size
    at_once = 16 // table.dtype.size
    values = at_once if width % at_once == 0 else 1
    (out,) = launch(
        kernel("patch_embed"),
        [ids.reshape(-1), table],
        {"T": table.dtype, "VALUES": values},
        grid=(_whole_blocks(count * width // values), 1, 1),
        threadgroup=(256, 1, 1),
        shapes=[(count, width)],
        dtypes=[table.dtype],
    )
    return out.reshape(*ids.shape[:-1], -1)


def takes_patch_embed(ids: mx.array, table: mx.array) -> bool:
    """Any ids below vocab and any table of floats, where the copy takes longer than compiling it."""
    return ids.size * table.shape[1] >= WORTH_COMPILING and table.dtype in FLOATS


def strided_pool(x: mx.array, stride: int, kind: Literal["mean", "max"]) -> mx.array:
    """See `reference.strided_pool`; what `takes_strided_pool` takes."""
    batch, rows, channels = x.shape
    pooled = -(-rows // stride)
    (out,) = launch(
        kernel("strided_pool"),
        [x],
        {"T": x.dtype, "STRIDE": stride, "MAXIMUM": kind == "max"},
        grid=(_whole_blocks(batch * pooled * channels), 1, 1),
        threadgroup=(256, 1, 1),
        shapes=[(batch, pooled, channels)],
        dtypes=[x.dtype],
    )
    return out


def takes_strided_pool(x: mx.array, stride: int, kind: Literal["mean", "max"]) -> bool:
    """Any floats."""
    return x.size > 0 and x.dtype in FLOATS


def _takes_queries(queries: mx.array, kv_heads: int) -> bool:
    head_dim = queries.shape[-1]
    few = shared_rows(queries, kv_heads) <= MOST_SHARED_ROWS
    return few and queries.size > 0 and head_dim % 16 == 0 and head_dim <= 256 and queries.dtype in FLOATS


@functools.lru_cache(maxsize=1024)
def _gemm_launch(
    rows_of_x: int, rows: int, columns: int, bits: int, group_size: int, affine: bool, dtype: mx.Dtype
) -> dict[str, Any]:
    """What a call of `marlin_gemm_fp4` needs beside its inputs, made once a shape: the host has no time to spare."""
    plan = _gemm_plan(rows_of_x, rows, columns, bits, dtype)
    threads = 32 * plan["WARPS"]
    return {
        "template": [("T", dtype), ("BITS", bits), ("GROUP", group_size), ("AFFINE", affine), *plan.items()],
        "grid": (-(-rows // (16 * plan["ROW_TILES"])) * threads, -(-rows_of_x // (8 * plan["X_TILES"])), 1),
        "threadgroup": (threads, 1, 1),
        "output_shapes": [(rows_of_x, rows)],
        "output_dtypes": [dtype],
    }


def _gemm_plan(rows_of_x: int, rows: int, columns: int, bits: int, dtype: mx.Dtype) -> dict[str, int | bool]:
    """How much of the weight and of x a block of `marlin_gemm_fp4` works on, as was fastest on an H200."""
    if dtype == mx.float32:  # three parts of each x take three times the registers, and time to split
        if rows_of_x > 8:
            return _plan(2, 2, 1)
        shared = 6 * rows_of_x * -(-columns // 128) * 128 <= SHARED_X_BYTES
        wide = not shared or (bits == 4 and rows >= 8192)
        return _plan(2 if wide else 1, 1, 2 if shared else 1, shared=shared)
    narrow, middle, wide = rows <= 1024, rows < 4096, rows >= 8192
    if rows_of_x <= 8:
        tiles, stages = (2, 1 if bits == 4 else 2) if wide else (1, 2 if bits == 4 or narrow else 4)
    elif rows_of_x <= 16:
        tiles, stages = (1, 2 if bits == 4 else 3) if middle or (bits == 8 and not wide) else (2, 1)
    elif rows_of_x <= 32 and (narrow or (middle and bits == 8)):
        tiles, stages = 1, 2
    else:
        tiles, stages = (1 if narrow else 2), 1
    x_tiles = 1 if rows_of_x <= 8 else 2 if rows_of_x <= 16 or (rows_of_x <= 32 and middle) else 4
    # With two registers more than 128 a multiprocessor had one block instead of two: bounded by count, not measured yet.
    return _plan(tiles, x_tiles, stages, together=512 if x_tiles == 2 else 0)


def _plan(row_tiles: int, x_tiles: int, stages: int, *, shared: bool = False, together: int = 0) -> dict[str, int | bool]:
    """The template of a plan; see marlin_gemm_fp4.cu."""
    tiles = {"ROW_TILES": row_tiles, "X_TILES": x_tiles, "STAGES": stages}
    return {**tiles, "WARPS": 8, "TOGETHER": together, "X_SHARED": shared}


def _rows_a_split(queries: mx.array, keys: Sequence[KeyValueRows]) -> int:
    """Keys that one block reads: as many as leave four blocks for each multiprocessor of a large GPU, in whole steps."""
    tiles = tile_count(queries, stored(keys[0]).shape[1])
    total = sum(row_count(page) for page in keys)
    return min(max(128, -(-total * tiles // 528 // 128) * 128), 2048)


def _cross_attention(
    queries: mx.array, keys: KeyValueRows, values: KeyValueRows, scale: float, lengths: mx.array | None
) -> mx.array:
    """Attention that is not causal, over one array of keys and one of values, split along its rows."""
    rows_a_split = _rows_a_split(queries, [keys])
    splits = -(-row_count(keys) // rows_a_split)
    inputs = [queries, *page_inputs(keys, values), integers(lengths), factor_input(scale)]
    template = {"HAS_LENGTHS": lengths is not None}
    one_part = splits == 1
    name = "flash_attention_cross_asymmetric"
    part = _part(name, inputs, (rows_a_split,), template, queries, keys, values, splits, one_part)
    return part[0][0] if one_part else _combine([part], queries)


def _part(
    name: str,
    inputs: list[mx.array],
    span: tuple[int, ...],
    template: dict[str, Any],
    queries: mx.array,
    keys: KeyValueRows,
    values: KeyValueRows,
    splits: int,
    one_part: bool,
) -> list[mx.array]:
    """Outputs and log weights of `splits` parts of the keys; where it is the only part, its output has the queries' type.

    `span` reaches the kernel as the shape of an array: numbers in a new array would wait for its page to come from the host.
    """
    batch, heads, rows, head_dim = queries.shape
    kv_heads = stored(keys).shape[1]
    shared = shared_rows(queries, kv_heads)
    tile = tile_of(shared)
    out = queries.dtype if one_part else mx.float32
    variant = {"HEAD_DIM": head_dim, "TILE": tile, **template}
    return launch(
        kernel(name),
        [*inputs, mx.broadcast_to(unread(), span)],
        {"T": queries.dtype, "OUT": out, **stored_template(keys, values), **variant},
        grid=(splits * 128, kv_heads * -(-shared // tile), batch),
        threadgroup=(128, 1, 1),
        shapes=[(splits, *queries.shape), (splits, batch, heads, rows)],
        dtypes=[out, mx.float32],
    )


def _combine(parts: list[list[mx.array]], queries: mx.array) -> mx.array:
    """The attention over all keys from that over parts of them."""
    outputs = parts[0][0] if len(parts) == 1 else mx.concatenate([part[0] for part in parts], axis=0)
    log_weights = parts[0][1] if len(parts) == 1 else mx.concatenate([part[1] for part in parts], axis=0)
    splits, head_dim = outputs.shape[0], queries.shape[-1]
    (out,) = launch(
        kernel("attention_combine"),
        [outputs.reshape(splits, -1, head_dim), log_weights.reshape(splits, -1)],
        {"T": queries.dtype, "HEAD_DIM": head_dim},
        grid=(queries.size // head_dim * 128, 1, 1),
        threadgroup=(128, 1, 1),
        shapes=[queries.shape],
        dtypes=[queries.dtype],
    )
    return out


def _whole_blocks(threads: int) -> int:
    return -(-threads // 256) * 256
