"""flash_attention_cross_asymmetric on the emulator: few rows over one long array that no order hides."""

import pytest
from attention_checks import check, check_barriers, each_case
from kernel_cases import CROSS, DTYPES, VARIANTS_CROSS, paged

pytestmark = pytest.mark.metal

KERNELS = {"flash_attention_cross_asymmetric", "attention_combine"}


@each_case(CROSS, VARIANTS_CROSS)
def test_result(emulated, case, dtype):
    check(emulated, paged, case, dtype, KERNELS)


@pytest.mark.slow
@each_case(CROSS, VARIANTS_CROSS)
def test_sanitized(emulated, case, dtype):
    check(emulated, paged, case, dtype, KERNELS, sanitized=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_barriers(emulated, dtype):
    check_barriers(emulated, paged, CROSS["several splits"], dtype, 1)
