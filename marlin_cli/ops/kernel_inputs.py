"""What the CUDA and the Metal twins of attention share: pages as kernels see them, and their small inputs."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from marlin_cli.ops.reference import KeyValueRows, Packed

FLOATS = (mx.float16, mx.bfloat16, mx.float32)
PAGE_INPUTS = ("keys", "key_scales", "values", "value_scales")
FEWEST_ON_DEVICE = 8  # elements; MLX puts smaller inputs into another address space of Metal


class Stored(NamedTuple):
    """How keys or values stand in memory, [batch, kv_heads, rows, ...]: a kernel is compiled for it."""

    dtype: mx.Dtype  # uint32 where packed
    bits: int  # of one number
    shape: tuple[int, ...]


def stored(page: KeyValueRows) -> Stored:
    """How the rows of a page stand in memory."""
    if isinstance(page, Packed):
        return Stored(mx.uint32, page.bits, page.packed.shape)
    return Stored(page.dtype, 8 * page.dtype.size, page.shape)


def alike(pages: Sequence[KeyValueRows]) -> bool:
    """Whether all pages stand in memory in one way, which the kernels read."""
    kinds = {stored(page)[:2] for page in pages}
    return len(kinds) == 1 and (isinstance(pages[0], Packed) or pages[0].dtype in FLOATS)


def stored_template(keys: KeyValueRows, values: KeyValueRows) -> dict[str, Any]:
    """What a kernel's template says of how keys and values stand in memory."""
    (key_type, key_bits, _), (value_type, value_bits, _) = stored(keys), stored(values)
    return {"K_TYPE": key_type, "K_BITS": key_bits, "V_TYPE": value_type, "V_BITS": value_bits}


def row_count(page: KeyValueRows) -> int:
    """Rows of keys or values that a page holds."""
    return page.rows if isinstance(page, Packed) else page.shape[2]


def shared_rows(queries: mx.array, kv_heads: int) -> int:
    """Rows of queries [batch, heads, rows, head_dim] that read the same keys."""
    return queries.shape[1] // kv_heads * queries.shape[2]


def tile_of(rows: int) -> int:
    """Of rows that read the same keys, how many one warp or simdgroup has at once."""
    return rows if rows <= 2 else 4


def tile_count(queries: mx.array, kv_heads: int) -> int:
    """Tiles of all the queries."""
    rows = shared_rows(queries, kv_heads)
    return queries.shape[0] * kv_heads * -(-rows // tile_of(rows))


def page_inputs(keys: KeyValueRows, values: KeyValueRows) -> list[mx.array]:
    """In the order of PAGE_INPUTS. Dense rows have no scales; a stand-in of as many axes takes their place."""
    inputs: list[mx.array] = []
    for page in (keys, values):
        inputs += [page.packed, page.scales] if isinstance(page, Packed) else [page, _no_scales()]
    return inputs


def integers(values: mx.array | None) -> mx.array:
    """Row counts of each sequence as the kernels read them; a stand-in that is never read where there are none."""
    return unread() if values is None else mx.contiguous(values.astype(mx.int32))


@functools.cache
def unread() -> mx.array:
    """A stand-in for an input that a variant of a kernel does not read: [1] int32."""
    return _made(mx.zeros((1,), dtype=mx.int32))


@functools.cache
def _no_scales() -> mx.array:
    return _made(mx.zeros((1, 1, 1, FEWEST_ON_DEVICE), dtype=mx.uint8))


@functools.cache
def nothing(dtype: mx.Dtype) -> mx.array:
    """A stand-in, in the device's address space, for an input of a type that a variant of a kernel does not read: [8]."""
    return _made(mx.zeros((FEWEST_ON_DEVICE,), dtype=dtype))


def _made(array: mx.array) -> mx.array:
    """The array, evaluated: a graph that is traced where it is made would make it again in each call, by a launch."""
    mx.eval(array)
    return array


def on_device(array: mx.array) -> mx.array:
    """The array, of at least the elements that MLX leaves in the device's address space; more rows, which nothing reads."""
    if array.size >= FEWEST_ON_DEVICE:
        return array
    axis = max(array.ndim - 2, 0)
    a_row = array.size // array.shape[axis]
    more = -(-FEWEST_ON_DEVICE // a_row)
    return mx.pad(array, [(0, more if i == axis else 0) for i in range(array.ndim)])


@functools.lru_cache(maxsize=64)
def factor_input(scale: float) -> mx.array:
    """The scale of attention as an input: [1] float32."""
    return mx.array([scale], dtype=mx.float32)
