"""flash_attention_kv_fp4 and its prefill variant on the emulator: attention over pages, packed or dense."""

import mlx.core as mx
import pytest
from attention_checks import check, check_barriers, each_case
from kernel_cases import DTYPES, PAGED, PREFILL, VARIANTS_PAGED, VARIANTS_PREFILL, arrays, paged

pytestmark = pytest.mark.metal

DECODE = {"flash_attention_kv_fp4", "attention_combine"}
MANY_ROWS = {"flash_attention_kv_fp4_prefill", "attention_combine"}


@each_case(PAGED, VARIANTS_PAGED)
def test_decoding(emulated, case, dtype):
    check(emulated, paged, case, dtype, DECODE)


@each_case(PREFILL, VARIANTS_PREFILL)
def test_prefill(emulated, case, dtype):
    check(emulated, paged, case, dtype, MANY_ROWS)


@pytest.mark.slow
@each_case(PAGED, VARIANTS_PAGED)
def test_decoding_sanitized(emulated, case, dtype):
    check(emulated, paged, case, dtype, DECODE, sanitized=True)


@pytest.mark.slow
@each_case(PREFILL, VARIANTS_PREFILL)
def test_prefill_sanitized(emulated, case, dtype):
    check(emulated, paged, case, dtype, MANY_ROWS, sanitized=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_barriers_of_decoding(emulated, dtype):
    check_barriers(emulated, paged, PAGED["two pages"], dtype, 1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_barriers_of_prefill(emulated, dtype):
    check_barriers(emulated, paged, PREFILL["ragged"], dtype, 2)


@pytest.mark.slow
def test_pages_that_no_row_sees_are_not_read(emulated):
    case = PAGED["pages before the window"]
    given = arrays(case, mx.float32)
    twin, exact, _ = paged(case, given)
    found = emulated(twin)
    assert found.launched == ["flash_attention_kv_fp4", "attention_combine"]  # five pages would be two launches
    assert mx.allclose(found.result, exact(), rtol=1e-5, atol=1e-6)
