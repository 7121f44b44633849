"""strided_pool on the emulator."""

import mlx.core as mx
import pytest
from kernel_cases import DTYPES, TOLERANCES

from marlin_cli.ops import metal, reference

pytestmark = pytest.mark.metal

# shape, stride: one number, fewer rows than the stride, a ragged tail, one channel, wider than a threadgroup, nothing to pool.
SHAPES = {
    "one": ((1, 1, 1), 2),
    "fewer rows than the stride": ((1, 2, 3), 4),
    "ragged": ((2, 9, 33), 4),
    "one channel": ((3, 50, 1), 3),
    "wide": ((1, 8, 300), 2),
    "stride of one": ((2, 3, 5), 1),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("kind", ["mean", "max"])
@pytest.mark.parametrize(("shape", "stride"), SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("sanitized", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["orders", "sanitized"])
def test_result(emulated, request, shape, stride, kind, dtype, sanitized):
    x = mx.random.normal(shape, key=mx.random.key(0)).astype(dtype)
    assert metal.takes_strided_pool(x, stride, kind)
    found = emulated(lambda: metal.strided_pool(x, stride, kind), sanitized=sanitized).result
    expected = reference.strided_pool(x.astype(mx.float32), stride, kind)
    assert found.dtype == dtype and found.shape == expected.shape
    assert mx.abs(found.astype(mx.float32) - expected).max() <= TOLERANCES[dtype] * mx.abs(expected).max()


@pytest.mark.parametrize("kind", ["mean", "max"])
@pytest.mark.parametrize("row", range(3))
def test_a_nan_stays(emulated, kind, row):
    x = mx.ones((1, 5, 9))
    x[0, row, 4] = float("nan")
    found = mx.isnan(emulated(lambda: metal.strided_pool(x, 3, kind)).result)
    assert found[0, 0, 4] and found.sum() == 1
