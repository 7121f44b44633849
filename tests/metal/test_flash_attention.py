"""flash_attention on the emulator: short sequences, and few rows that need a mask."""

import mlx.core as mx
import pytest
from attention_checks import check, check_barriers, each_case
from kernel_cases import DTYPES, LOCAL, VARIANTS_LOCAL, arrays, local

pytestmark = pytest.mark.metal


@each_case(LOCAL, VARIANTS_LOCAL)
def test_result(emulated, case, dtype):
    check(emulated, local, case, dtype, {"flash_attention"})


@pytest.mark.slow
@each_case(LOCAL, VARIANTS_LOCAL)
def test_sanitized(emulated, case, dtype):
    check(emulated, local, case, dtype, {"flash_attention"}, sanitized=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_barriers(emulated, dtype):
    check_barriers(emulated, local, LOCAL["T5 decoder, long"], dtype, 1)


def test_rows_that_see_nothing_are_finite(emulated):
    case = LOCAL["patches, grouped heads, padding, window"]
    twin, _, _ = local(case, arrays(case, mx.float32))
    padding = mx.array(case.left_padding)
    filler = mx.broadcast_to((mx.arange(case.rows) < padding[:, None])[:, None, :, None], (3, 4, 5, 32))
    assert mx.array_equal(mx.where(filler, emulated(twin).result, 0), mx.zeros((3, 4, 5, 32)))


def test_a_nan_key_is_not_hidden(emulated):
    case = LOCAL["patch"]
    given = arrays(case, mx.float32)
    given.keys[0][1, 0, 3, 5] = float("nan")
    twin, _, _ = local(case, given)
    seen = mx.isnan(emulated(twin).result).any(axis=-1)
    assert seen[1, 0, 3:].all() and seen.sum() == 5
