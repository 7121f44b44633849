"""The kernels of a step of decoding on the emulator: products of a few rows with what stands before and after them."""

from collections.abc import Callable, Mapping

import few_rows_cases as cases
import mlx.core as mx
import pytest
from few_rows_cases import FORMATS, Case
from kernel_cases import DTYPES

from marlin_cli.ops import few_rows, metal_few_rows

pytestmark = pytest.mark.metal

# What every product is checked with: each format, ragged numbers of streams and rows, one row, a factor.
PRODUCTS = {
    **{f"{name}": Case(format=name, fast=name == "nvfp4") for name in FORMATS},
    "two streams": Case(streams=2, format="int4"),
    "three streams, ragged": Case(streams=3, width=136, out_rows=41),
    "eight streams": Case(streams=8, format="mxfp8", out_rows=33),
    "fewer streams than a tile": Case(streams=5, width=64, format="int4 of 32", out_rows=18),
    "fewer than 8 elements": Case(width=8, out_rows=1),
    "wide": Case(width=1096, out_rows=9),
    "many rows": Case(width=64, format="mxfp4", out_rows=2051),
    "a factor": Case(format="nvfp4", factor=0.3, streams=2),
}
NORMS = {name: Case(norm=name, streams=2) for name in ("rmsnorm", "layernorm", "variance")}
LINEARS = {**PRODUCTS, **NORMS, "a bias": Case(bias=True, streams=2, format="nvfp4")}
FEED_FORWARDS = {
    **{name: case for name, case in PRODUCTS.items() if case.out_rows > 1},
    **NORMS,
    **{f"{name}, no gate": Case(gated=False, activation=name, format="mxfp8") for name in ("gelu", "gelu_tanh", "relu")},
    "gelu, gated": Case(activation="gelu", streams=2),
    "a bias": Case(bias=True, streams=3, format="int8"),
}
PROJECTIONS = {
    **{name: Case(format=name, fast=name == "nvfp4") for name in FORMATS},
    **NORMS,
    "rotated": Case(streams=3, base=10000.0, before=40, at=0, fast=True),
    "rotated, neighbours, padding": Case(streams=3, base=500.0, interleaved=True, before=11, left_padding=(0, 3, 12)),
    "grouped heads": Case(streams=2, heads=4, kv_heads=1, head_dim=24, width=72, at=7, base=10000.0),
    "one row, one head, smallest": Case(width=8, heads=1, kv_heads=1, head_dim=8, tail_rows=1, at=0),
    "eight streams": Case(streams=8, width=64, format="mxfp4", base=1e4, tail_rows=16, at=15),
    "widest head": Case(width=64, heads=1, kv_heads=1, head_dim=256, base=1e4),
    "many rows": Case(width=32, heads=32, kv_heads=16, head_dim=32, format="mxfp4", base=1e4),
    "a factor": Case(format="nvfp4", factor=0.3),
}
TAILS = {
    **{name: Case(format=name, head_dim=64, fast=name == "nvfp4") for name in FORMATS},
    "first row": Case(streams=2, at=0),
    "last row, grouped heads": Case(streams=3, heads=6, kv_heads=2, head_dim=24, width=41, at=7),
    "long tail": Case(tail_rows=64, at=63, head_dim=64),
    "eight streams": Case(streams=8, width=33, format="mxfp8", at=6),
    "tiles of fewer streams": Case(streams=8, width=24, heads=8, head_dim=256, kv_heads=8, format="mxfp4"),
    "smallest": Case(width=3, heads=1, kv_heads=1, head_dim=8, tail_rows=1, at=0),
}
CACHES = {
    **{name: Case(format=name, head_dim=64, before=9, capacity=20, fast=name == "nvfp4") for name in FORMATS},
    "several splits": Case(streams=2, before=300, capacity=512, at=5, heads=4, kv_heads=2, fast=True),
    "splits without rows": Case(before=3, capacity=400, at=0),
    "window": Case(before=150, capacity=256, window=20, at=2, heads=3, kv_heads=1),
    "window within the tail": Case(before=150, capacity=256, window=1, at=5),
    "padding": Case(streams=3, before=40, capacity=64, left_padding=(0, 41, 7), head_dim=64, heads=5, kv_heads=5),
    "a tail with a bias alone": Case(at=5, most=4),
    "a tail with padding alone": Case(streams=2, at=5, left_padding=(1, 4)),
    "a long tail alone": Case(tail_rows=70, at=66),
    "relative bias": Case(streams=2, before=140, capacity=160, at=4, most=9, head_dim=64),
    "relative bias, fewer than 8 elements": Case(before=2, capacity=8, heads=1, kv_heads=1, most=1, head_dim=16, width=5),
    "grouped heads, ragged tile": Case(heads=7, kv_heads=1, head_dim=40, before=17, capacity=17),
    "widest head": Case(heads=1, kv_heads=1, head_dim=256, before=70, capacity=80, at=7),
    "a factor": Case(format="nvfp4", factor=0.3, before=9, capacity=20),
}  # fmt: skip

MEMORIES = {
    "plain": Case(streams=2, memory=(40, 16, 16), lengths=(3, 40), head_dim=64, heads=3, fast=True),
    "packed": Case(memory=(300, 4, 8), format="nvfp4"),
    "one row": Case(memory=(1, 16, 16), head_dim=16, width=33),
}

# Fewer of them, as these kernels are compiled for the others.
ADDED = {name: PRODUCTS[name] for name in ("dense", "nvfp4", "int8", "three streams, ragged", "fewer than 8 elements")}


def linear(case: Case, dtype: mx.Dtype) -> tuple[Callable, Callable, bool]:
    x, (norm, exact_norm), (layer, exact) = (
        cases.rows(case, dtype),
        cases.norm(case, dtype),
        cases.layer(case, dtype, case.out_rows),
    )
    added = mx.random.normal((case.out_rows,), key=mx.random.key(5)).astype(dtype)
    arguments = x, norm, layer, added, dtype
    wide = x.astype(mx.float32), exact_norm, exact, added.astype(mx.float32), mx.float32
    return (
        lambda: [metal_few_rows.normed_linear(*arguments)],
        lambda: [few_rows.normed_linear(*wide)],
        metal_few_rows.takes_normed_linear(*arguments),
    )


def head(case: Case, dtype: mx.Dtype) -> tuple[Callable, Callable, bool]:
    x, (norm, exact_norm), (layer, exact) = (
        cases.rows(case, dtype),
        cases.norm(case, dtype),
        cases.layer(case, dtype, case.out_rows),
    )
    arguments = x, norm, layer, None, mx.float32
    wide = x.astype(mx.float32), exact_norm, exact, None, mx.float32
    return (
        lambda: [metal_few_rows.normed_linear(*arguments)],
        lambda: [few_rows.normed_linear(*wide)],
        metal_few_rows.takes_normed_linear(*arguments),
    )


def added(case: Case, dtype: mx.Dtype) -> tuple[Callable, Callable, bool]:
    x, (layer, exact) = cases.rows(case, dtype), cases.layer(case, dtype, case.out_rows)
    residual = cases.rows(case, dtype, case.out_rows, seed=6)
    return (
        lambda: [metal_few_rows.linear_added(x, layer, residual)],
        lambda: [few_rows.linear_added(x.astype(mx.float32), exact, residual.astype(mx.float32))],
        metal_few_rows.takes_linear_added(x, layer, residual),
    )


def feed_forward(case: Case, dtype: mx.Dtype) -> tuple[Callable, Callable, bool]:
    x, (norm, exact_norm) = cases.rows(case, dtype), cases.norm(case, dtype)
    (up, exact_up), (gate, exact_gate) = (cases.layer(case, dtype, case.out_rows, seed=seed) for seed in (1, 4))
    arguments = x, norm, gate if case.gated else None, up, case.activation
    wide = x.astype(mx.float32), exact_norm, exact_gate if case.gated else None, exact_up, case.activation
    return (
        lambda: [metal_few_rows.feed_forward(*arguments)],
        lambda: [few_rows.feed_forward(*wide)],
        metal_few_rows.takes_feed_forward(*arguments),
    )


def projections(case: Case, dtype: mx.Dtype) -> tuple[Callable, Callable, bool]:
    x, (norm, exact_norm), (parts, exact) = cases.rows(case, dtype), cases.norm(case, dtype), cases.projections(case, dtype)
    (tail, wide_tail), place = cases.tail(case, dtype), cases.place(case)

    def flat(result: tuple[mx.array, few_rows.Tail]) -> list[mx.array]:
        return [result[0], *result[1]]

    arguments = x, norm, parts, tail, place
    return (
        lambda: flat(metal_few_rows.projections(*arguments)),
        lambda: flat(few_rows.projections(x.astype(mx.float32), exact_norm, exact, wide_tail, place)),
        metal_few_rows.takes_projections(*arguments),
    )


def attention(case: Case, dtype: mx.Dtype) -> tuple[Callable, Callable, bool]:
    queries = cases.rows(case, dtype, case.heads * case.head_dim).reshape(case.streams, case.heads, 1, case.head_dim)
    stored, wide_stored = (None, None) if case.capacity is None else cases.tail(case, dtype, case.capacity, seed=8)
    (tail, wide_tail), place, (reading, exact) = cases.tail(case, dtype), cases.place(case), cases.reading(case, dtype)
    residual = cases.rows(case, dtype, seed=6)
    arguments = queries, stored, tail, place, reading, residual
    wide = queries.astype(mx.float32), wide_stored, wide_tail, place, exact, residual.astype(mx.float32)
    return (
        lambda: [metal_few_rows.attention_out(*arguments)],
        lambda: [few_rows.attention_out(*wide)],
        metal_few_rows.takes_attention_out(*arguments),
    )


def memory(case: Case, dtype: mx.Dtype) -> tuple[Callable, Callable, bool]:
    queries = cases.rows(case, dtype, case.heads * case.head_dim).reshape(case.streams, case.heads, 1, case.head_dim)
    (rows, exact_rows), (reading, exact) = cases.memory(case, dtype), cases.reading(case, dtype)
    lengths, residual = None if case.lengths is None else mx.array(case.lengths), cases.rows(case, dtype, seed=6)
    arguments = queries, *rows, lengths, reading, residual
    wide = queries.astype(mx.float32), *exact_rows, lengths, exact, residual.astype(mx.float32)
    return (
        lambda: [metal_few_rows.memory_attention_out(*arguments)],
        lambda: [few_rows.memory_attention_out(*wide)],
        metal_few_rows.takes_memory_attention_out(*arguments),
    )


PARTS: dict[str, tuple[Callable, Mapping[str, Case], set[str]]] = {
    "normed_linear": (linear, LINEARS, {"norm_linear"}),
    "head": (head, NORMS, {"norm_linear"}),
    "linear_added": (added, ADDED, {"norm_linear"}),
    "feed_forward": (feed_forward, FEED_FORWARDS, {"norm_feed_forward"}),
    "projections": (projections, PROJECTIONS, {"norm_projections"}),
    "tail": (attention, TAILS, {"tail_attention_linear"}),
    "cache": (attention, CACHES, {"cache_attention", "joined_linear"}),
    "memory": (memory, MEMORIES, {"flash_attention_cross_asymmetric", "joined_linear"}),
}


def every_case(dtypes: Mapping[str, mx.Dtype], fast: bool) -> pytest.MarkDecorator:
    """Every case of every part in these types; where `fast`, the plain suite has some, in bfloat16."""
    given = []
    for part, (call, table, kernels) in PARTS.items():
        for name, case in table.items():
            for label, dtype in dtypes.items():
                marks = () if fast and case.fast and dtype == mx.bfloat16 else (pytest.mark.slow,)
                given.append(pytest.param(call, case, kernels, dtype, id=f"{part}-{name}-{label}", marks=marks))
    return pytest.mark.parametrize(("call", "case", "kernels", "dtype"), given)


def check(emulated, call: Callable, case: Case, kernels: set[str], dtype: mx.Dtype, **how) -> None:
    twin, exact, takes = call(case, dtype)
    assert takes
    found = emulated(twin, **how)
    assert set(found.launched) == kernels
    for result, expected in zip(found.result, exact(), strict=True):
        cases.close(result, expected, dtype if result.dtype == dtype else mx.float32)


@every_case(DTYPES, fast=True)
def test_result(emulated, call, case, kernels, dtype):
    check(emulated, call, case, kernels, dtype)


@every_case({"bfloat16": mx.bfloat16}, fast=False)
def test_sanitized(emulated, call, case, kernels, dtype):
    check(emulated, call, case, kernels, dtype, sanitized=True)


# Barriers of the whole text, of which the first two stand in the part that all share: before the mean, and before the squares.
BARRIERS = {
    "linear, squares": (linear, NORMS["rmsnorm"], 1),
    "linear, mean": (linear, NORMS["layernorm"], 0),
    "linear, squares off the mean": (linear, NORMS["variance"], 1),
    "feed-forward": (feed_forward, NORMS["rmsnorm"], 1),
    "feed-forward, mean": (feed_forward, NORMS["layernorm"], 0),
    "projections": (projections, NORMS["rmsnorm"], 1),
    "projections, mean": (projections, NORMS["variance"], 0),
    "attention to the tail": (attention, TAILS["last row, grouped heads"], 2),
    "joined attention": (attention, CACHES["several splits"], 2),
}


@pytest.mark.slow
@pytest.mark.parametrize(("call", "case", "number"), BARRIERS.values(), ids=BARRIERS.keys())
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_barriers(emulated, call, case, number, dtype):
    """Each one, cut out, is missed."""
    cases.check_barrier(lambda **how: emulated(call(case, dtype)[0], **how), number)


@pytest.mark.slow
def test_the_barrier_of_cache_attention(emulated):
    cases.check_barrier(lambda **how: emulated(attention(CACHES["several splits"], mx.bfloat16)[0], **how), 0)


# What leaves each kernel to compile and free of races: the reference alone can tell.
WRONG = {
    "no factor": (linear, PRODUCTS["a factor"], "lane) * factors[0];", "lane);"),
    "a stream's neighbour": (
        linear,
        PRODUCTS["three streams, ragged"],
        "const int stream = first + lane / ROWS, row",
        "const int stream = first + (TILE - 1 - lane / ROWS) % TILE, row",
    ),
    "up for gate": (feed_forward, FEED_FORWARDS["nvfp4"], "MARLIN_WEIGHTS(weights, gate)", "MARLIN_WEIGHTS(weights, up)"),
    "turned the other way": (projections, PROJECTIONS["rotated"], "one * cosine - other * sine", "one * cosine + other * sine"),
    "a row early": (projections, PROJECTIONS["rotated"], "float(counts[0] + at", "float(counts[0] + at - 1"),
    "a row is not seen": (attention, TAILS["nvfp4"], "seen = counts[1] + 1;", "seen = counts[1];"),
    "the tail is not seen": (attention, CACHES["nvfp4"], "in_tail ? counts[1] + 1", "in_tail ? 0"),
    "rows that are not there": (
        attention,
        CACHES["splits without rows"],
        "metal::min(counts[0], (split + 1) * rows_a_split)",
        "metal::min(capacity, (split + 1) * rows_a_split)",
    ),
    "parts of unequal peaks": (attention, CACHES["several splits"], "stats[(at * HEADS + head) * 2] - peak", "0.0f"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("call", "case", "right", "wrong"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_kernel_is_found(emulated, call, case, right, wrong):
    """The table of cases is not blind to it."""
    edited = []

    def edit(text: str) -> str:
        edited.append(right in text)
        return text.replace(right, wrong)

    twin, exact, _ = call(case, mx.float32)
    found = emulated(twin, change=edit)
    assert any(edited)
    with pytest.raises(AssertionError):
        for result, expected in zip(found.result, exact(), strict=True):
            cases.close(result, expected, mx.float32)


@pytest.mark.parametrize("name", ["normed_linear", "feed_forward", "projections"])
def test_a_nan_stays_in_its_stream(emulated, name):
    case = Case(streams=3, base=1e4)
    x, (norm, _), (parts, _) = cases.rows(case, mx.float32), cases.norm(case, mx.float32), cases.projections(case, mx.float32)
    x[1, 5] = float("nan")
    up, gate = (cases.layer(case, mx.float32, 64, seed=seed)[0] for seed in (1, 4))
    call = {
        "normed_linear": lambda: metal_few_rows.normed_linear(x, norm, up, None, mx.float32),
        "feed_forward": lambda: metal_few_rows.feed_forward(x, norm, gate, up, "silu"),
        "projections": lambda: metal_few_rows.projections(x, norm, parts, cases.tail(case, mx.float32)[0], cases.place(case))[
            0
        ],
    }[name]
    found = mx.isnan(emulated(call).result.reshape(3, -1))
    assert found[1].all() and not found[0].any() and not found[2].any()


@pytest.mark.parametrize("table", [TAILS["first row"], CACHES["several splits"]], ids=["tail", "cache"])
def test_rows_that_are_not_there_are_not_read(emulated, table):
    """What stands behind the new row, and behind the rows of the storage, may be anything."""
    queries = cases.rows(table, mx.float32, table.heads * table.head_dim).reshape(table.streams, table.heads, 1, -1)
    stored = None if table.capacity is None else cases.tail(table, mx.float32, table.capacity, seed=8)[0]
    tail, place, reading = cases.tail(table, mx.float32)[0], cases.place(table), cases.reading(table, mx.float32)[0]
    residual = cases.rows(table, mx.float32, seed=6)
    expected = few_rows.attention_out(queries, stored, tail, place, reading, residual)

    def spoilt(rows: few_rows.Tail | None, count: int) -> few_rows.Tail | None:
        if rows is None:
            return None
        there = mx.arange(rows.keys.shape[2])[:, None] < count
        return few_rows.Tail(*(mx.where(there, array, mx.array(float("nan"))) for array in rows))

    given = queries, spoilt(stored, table.before), spoilt(tail, table.at + 1), place, reading, residual
    cases.close(emulated(lambda: metal_few_rows.attention_out(*given)).result, expected, mx.float32)
