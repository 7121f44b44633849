"""Shapes and hazards that the Metal kernels are checked with: one table for all, and one table of tolerances."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from marlin_cli.ops import metal, reference

# Largest difference to the float32 reference, as a share of its largest number: half a unit in the last place of 16-bit
# results, and what sums in another order cost in float32.
TOLERANCES = {mx.float32: 3e-6, mx.float16: 5.2e-4, mx.bfloat16: 4.2e-3}
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
DENSE = 16  # "bits" of keys or values that are not packed


@dataclass(frozen=True)
class Attention:
    """One attention; `pages` counts rows of each page, and is one number for `attention` over one dense array."""

    pages: tuple[int, ...]
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    rows: int = 1
    head_dim: int = 64
    bits: tuple[int, int] = (DENSE, DENSE)
    causal: bool = True
    window: int | None = None
    left_padding: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    most: int | None = None  # of the relative bias
    strided: bool = False  # slices of longer arrays, transposed queries, values whose head_dim is not the last axis in memory
    factor: float = 1.0  # of the queries: large ones make one key take all
    fast: bool = False  # also part of the plain suite


LOCAL = {
    "patch": Attention((8,), batch=3, rows=8, fast=True),
    "patches, grouped heads, padding, window": Attention(
        (5,), batch=3, heads=4, kv_heads=2, rows=5, head_dim=32, left_padding=(0, 1, 2), window=3
    ),
    "one row of one key": Attention((1,), heads=1, kv_heads=1, head_dim=8),
    "two rows, strided": Attention(
        (20,), batch=2, kv_heads=1, rows=1, head_dim=24, lengths=(20, 7), causal=False, strided=True
    ),
    "T5 encoder, few numbers of bias": Attention((6,), heads=1, kv_heads=1, rows=6, head_dim=16, causal=False, most=2),
    "T5 encoder, ragged": Attention((33,), heads=3, kv_heads=3, rows=13, head_dim=40, causal=False, most=7, lengths=(21,)),
    "T5 decoder, long": Attention((200,), batch=2, most=32, strided=True, fast=True),
    "long, window, two rows, widest head": Attention((150,), heads=1, kv_heads=1, rows=2, head_dim=256, window=70),
    "long, one key takes all": Attention((130,), rows=3, head_dim=72, window=100, factor=300.0),
}

PAGED = {
    "two pages": Attention((40, 9), batch=2, heads=4, bits=(4, 8), rows=1, fast=True),
    "more pages than a launch has": Attention((10, 10, 10, 3), heads=4, bits=(8, 4), rows=3, head_dim=32, window=25),
    "pages before the window": Attention((10, 10, 10, 10, 3), heads=1, kv_heads=1, bits=(4, 4), rows=2, head_dim=32, window=9),
    "one page of several splits": Attention((300,), kv_heads=1, bits=(DENSE, 4), rows=2, head_dim=128, left_padding=(12,)),
    "one page of one split": Attention(
        (30,), batch=2, heads=3, kv_heads=1, bits=(4, DENSE), rows=5, head_dim=48, lengths=(30, 29)
    ),
    "fewer than 8 elements": Attention((1, 1), bits=(4, 4), head_dim=16, window=5),
    "strided": Attention((9, 7), batch=2, kv_heads=1, bits=(4, 4), rows=4, strided=True),
    "strided, dense": Attention((9, 7), batch=2, kv_heads=1, rows=2, head_dim=24, strided=True),
    "widest head": Attention((20, 20), heads=1, kv_heads=1, bits=(8, 8), head_dim=256, rows=2),
    "one key takes all": Attention((40, 30), bits=(4, 4), rows=2, factor=300.0),
}

PREFILL = {
    "ragged": Attention((45,), rows=40, bits=(4, 4), head_dim=32, fast=True),
    "more pages than a launch has": Attention((40, 40, 40, 7), heads=4, rows=20, bits=(4, 8), head_dim=32),
    "pages before the window": Attention((20, 20, 20, 3), heads=4, rows=33, bits=(8, 4), head_dim=32, window=9),
    "padding": Attention((50, 20), batch=2, kv_heads=1, rows=17, bits=(DENSE, 4), left_padding=(0, 12)),
    "lengths, not causal, widest head": Attention((64,), rows=18, bits=(8, DENSE), head_dim=128, causal=False, lengths=(50,)),
    "strided": Attention((34, 7), kv_heads=1, rows=9, bits=(4, DENSE), head_dim=48, strided=True),
}

CROSS = {
    "long, lengths": Attention(
        (300,), batch=2, kv_heads=1, rows=8, head_dim=32, bits=(4, DENSE), causal=False, lengths=(1, 250)
    ),
    "several splits": Attention((400,), batch=1, rows=3, bits=(4, 4), causal=False, fast=True),
    "one step": Attention((70,), heads=4, head_dim=96, bits=(8, 4)),
    "fewer than 8 elements": Attention((1,), head_dim=16, bits=(4, 4)),
    "strided": Attention((33,), batch=2, head_dim=40, rows=2, causal=False, strided=True),
    "strided, packed": Attention((33,), batch=2, head_dim=32, rows=2, causal=False, bits=(8, 4), strided=True),
}

# Each pair of formats that keys and values may have, and each number of rows a tile that a kernel is made for.
FORMATS = [(keys, values) for keys in (4, 8, DENSE) for values in (4, 8, DENSE)]
VARIANTS_PAGED = {
    **{f"keys {k}, values {v}": Attention((9, 8), head_dim=32, bits=(k, v), rows=2) for k, v in FORMATS},
    **{
        f"tile of {rows}, {pages} pages": Attention((9,) * pages, rows=rows, head_dim=32, bits=(4, 8), window=20)
        for rows in (1, 2, 4)
        for pages in (1, 2)
    },
}
VARIANTS_CROSS = {
    **{f"keys {k}, values {v}": Attention((40,), head_dim=32, bits=(k, v), rows=2, causal=False) for k, v in FORMATS},
    **{
        f"tile of {rows}, {total} keys": Attention((total,), rows=rows, head_dim=32, bits=(4, 8), causal=False)
        for rows in (1, 2, 4)
        for total in (40, 150)
    },
}
VARIANTS_PREFILL = {
    f"keys {k}, values {v}": Attention((35,), head_dim=32, bits=(k, v), rows=34) for k, v in FORMATS if min(k, v) < DENSE
}
VARIANTS_LOCAL = {
    f"tile of {rows}, {total} keys, {'bias' if most else 'no bias'}": Attention(
        (total,), rows=rows, head_dim=32, most=most, window=total
    )
    for rows in (1, 2, 4)
    for total in (9, 70)
    for most in (None, 5)
}


@dataclass(frozen=True)
class Arrays:
    """The arguments of one case."""

    queries: mx.array
    keys: list[reference.KeyValueRows]
    values: list[reference.KeyValueRows]
    options: dict[str, Any]

    def float32(self) -> "Arrays":
        """The same numbers in float32; what is packed stays so."""

        def wide(page: reference.KeyValueRows) -> reference.KeyValueRows:
            return page.astype(mx.float32) if isinstance(page, mx.array) else page

        bias = self.options.get("relative_bias")
        options = self.options if bias is None else {**self.options, "relative_bias": bias.astype(mx.float32)}
        return replace(
            self,
            queries=self.queries.astype(mx.float32),
            keys=[wide(page) for page in self.keys],
            values=[wide(page) for page in self.values],
            options=options,
        )


def arrays(case: Attention, dtype: mx.Dtype, seed: int = 0) -> Arrays:
    """Random arguments of a case."""
    random = mx.random.split(mx.random.key(seed), 2 * len(case.pages) + 2)
    queries = _rows(random[0], case, case.heads, case.rows, DENSE, dtype, values=False) * case.factor
    keys = [_rows(k, case, case.kv_heads, n, case.bits[0], dtype, values=False) for k, n in _each_page(random[1:], case)]
    values = [
        _rows(k, case, case.kv_heads, n, case.bits[1], dtype, values=True)
        for k, n in _each_page(random[1 + len(case.pages) :], case)
    ]
    options: dict[str, Any] = {"causal": case.causal, "window": case.window}
    for name in ("left_padding", "lengths"):
        given = getattr(case, name)
        options[name] = None if given is None else mx.array(given)
    if case.most is not None:
        options["relative_bias"] = mx.random.normal((case.heads, 2 * case.most + 1), key=random[-1]).astype(dtype)
    return Arrays(queries, keys, values, options)


def _each_page(keys: mx.array, case: Attention) -> list[tuple[mx.array, int]]:
    return list(zip(keys, case.pages, strict=False))


def _rows(
    key: mx.array, case: Attention, heads: int, count: int, bits: int, dtype: mx.Dtype, *, values: bool
) -> reference.KeyValueRows:
    longer = count + (3 if case.strided else 0)
    longer += longer % 2  # MLX packs no odd number of groups
    rows = mx.random.normal((case.batch, heads, longer, case.head_dim), key=key).astype(dtype)
    if bits != DENSE:
        packed = reference.pack_rows(rows.astype(mx.float32), bits)
        return reference.Packed(packed.packed[:, :, :count], packed.scales[:, :, :count], bits)
    if case.strided:  # in memory: [batch, head_dim, heads, rows] for values, [batch, rows, heads, head_dim] for the others
        axes = (0, 3, 1, 2) if values else (0, 2, 1, 3)
        back = (0, 2, 3, 1) if values else (0, 2, 1, 3)
        rows = mx.contiguous(rows.transpose(axes)).transpose(back)
    return rows[:, :, :count]


def scale_of(case: Attention) -> float:
    return case.head_dim**-0.5


def local(case: Attention, given: Arrays) -> tuple[Callable[[], mx.array], Callable[[], mx.array], bool]:
    """The twin's call, the reference's in float32, and whether the twin takes the case."""
    exact = given.float32()
    arguments = (given.queries, given.keys[0], given.values[0], scale_of(case))
    return (
        lambda: metal.attention(*arguments, **given.options),
        lambda: reference.attention(exact.queries, exact.keys[0], exact.values[0], scale_of(case), **exact.options),
        metal.takes_attention(*arguments, **given.options),
    )


def paged(case: Attention, given: Arrays) -> tuple[Callable[[], mx.array], Callable[[], mx.array], bool]:
    """As `local`, of `paged_attention`."""
    exact = given.float32()
    arguments = (given.queries, given.keys, given.values, scale_of(case))
    return (
        lambda: metal.paged_attention(*arguments, **given.options),
        lambda: reference.paged_attention(exact.queries, exact.keys, exact.values, scale_of(case), **exact.options),
        metal.takes_paged_attention(*arguments, **given.options),
    )
