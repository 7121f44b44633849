"""What every attention kernel is checked for; the tables of `kernel_cases` are the parameters."""

import re
from collections.abc import Callable, Iterable, Mapping

import kernel_cases
import mlx.core as mx
import pytest
from kernel_cases import DTYPES, TOLERANCES, Attention

BARRIER = re.compile(r"threadgroup_barrier\(mem_flags::mem_threadgroup\);")


def each_case(*tables: Mapping[str, Attention]) -> pytest.MarkDecorator:
    """Every case of the tables in every type. The plain suite has those marked fast, in bfloat16."""
    given = []
    for name, case in ((name, case) for table in tables for name, case in table.items()):
        for label, dtype in DTYPES.items():
            marks = () if case.fast and dtype == mx.bfloat16 else (pytest.mark.slow,)
            given.append(pytest.param(case, dtype, id=f"{name}-{label}", marks=marks))
    return pytest.mark.parametrize(("case", "dtype"), given)


def check(emulated, calls: Callable, case: Attention, dtype: mx.Dtype, kernels: Iterable[str], **how) -> None:
    """The kernels give the reference's result."""
    twin, exact, takes = calls(case, kernel_cases.arrays(case, dtype))
    assert takes
    found, expected = emulated(twin, **how), exact()
    assert found.result.dtype == dtype and found.result.shape == expected.shape
    assert mx.isfinite(found.result).all()
    # A row of filler holds nothing that is defined.
    positions = mx.arange(sum(case.pages) - case.rows, sum(case.pages))
    real = positions[:, None] >= mx.array(case.left_padding or (0,) * case.batch)[:, None, None, None]
    off = mx.where(real, mx.abs(found.result.astype(mx.float32) - expected), 0)
    difference = off.max() / mx.abs(expected).max()
    assert difference.item() <= TOLERANCES[dtype]
    assert set(found.launched) <= set(kernels)


def check_barriers(emulated, calls: Callable, case: Attention, dtype: mx.Dtype, count: int) -> None:
    """Each of the `count` barriers, cut out, is missed."""
    twin, _, _ = calls(case, kernel_cases.arrays(case, dtype))
    for number in range(count):
        cut = False

        def without(text: str, number: int = number) -> str:
            nonlocal cut
            barriers = list(BARRIER.finditer(text))
            if not barriers:  # the kernel that joins the parts has none
                return text
            assert len(barriers) == count
            cut = True
            return text[: barriers[number].start()] + text[barriers[number].end() :]

        with pytest.raises(AssertionError, match="order-dependent|random order"):
            emulated(twin, change=without)
        assert cut
