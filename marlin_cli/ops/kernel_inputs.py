"""What the CUDA and the Metal twins share: small inputs of their attention kernels, and the names of a page's arrays."""

import functools

import mlx.core as mx

from marlin_cli.ops.reference import KeyValueRows, Packed

FLOATS = (mx.float16, mx.bfloat16, mx.float32)
PAGE_INPUTS = ("keys", "key_scales", "values", "value_scales")


def row_count(page: KeyValueRows) -> int:
    """Rows of keys or values that a page holds."""
    return page.rows if isinstance(page, Packed) else page.shape[2]


def tile_of(shared_rows: int) -> int:
    """Rows of queries that one warp or simdgroup has at once."""
    return shared_rows if shared_rows <= 2 else 4


def integers(values: mx.array | None) -> mx.array:
    """Row counts of each sequence as the kernels read them; a stand-in that is never read where there are none."""
    return unread() if values is None else mx.contiguous(values.astype(mx.int32))


@functools.cache
def unread() -> mx.array:
    """A stand-in for an input that a variant of a kernel does not read: [1] int32."""
    return mx.zeros((1,), dtype=mx.int32)


@functools.lru_cache(maxsize=64)
def factor_input(scale: float) -> mx.array:
    """The scale of attention as an input: [1] float32."""
    return mx.array([scale], dtype=mx.float32)
