"""patch_embed on the emulator: it copies, so every number must be the reference's own."""

import mlx.core as mx
import pytest
from kernel_cases import DTYPES

from marlin_cli.ops import metal, reference

pytestmark = pytest.mark.metal

# shape of the ids, vocab, width: one number, ragged threadgroups, fewer than 8 elements, wider than a threadgroup.
SHAPES = {
    "one": ((1,), 1, 1),
    "fewer than 8 elements": ((2, 3), 2, 3),
    "patches": ((2, 3, 8), 256, 40),
    "wide": ((3, 2), 10, 1100),
    "odd width": ((2, 5), 256, 63),
}
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


@EACH_DTYPE
@pytest.mark.parametrize("ids_dtype", [mx.uint8, mx.int32, mx.uint32, mx.int64], ids=["uint8", "int32", "uint32", "int64"])
@pytest.mark.parametrize(("shape", "vocab", "width"), SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("sanitized", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["orders", "sanitized"])
def test_result(emulated, request, shape, vocab, width, ids_dtype, dtype, sanitized):
    if (ids_dtype, dtype) != (mx.uint8, mx.bfloat16):
        request.applymarker(pytest.mark.slow)
    ids = mx.random.randint(0, vocab, shape, key=mx.random.key(0)).astype(ids_dtype)
    table = mx.random.normal((vocab, width), key=mx.random.key(1)).astype(dtype)
    assert metal.takes_patch_embed(ids, table)
    found = emulated(lambda: metal.patch_embed(ids, table), sanitized=sanitized).result
    assert found.dtype == dtype and mx.array_equal(found, reference.patch_embed(ids, table))


def test_slices_are_read_as_they_stand(emulated):
    ids = mx.random.randint(0, 9, (6, 8), key=mx.random.key(0)).astype(mx.uint8)[::2]
    table = mx.random.normal((10, 48), key=mx.random.key(1))[1:, 4:44]
    assert mx.array_equal(emulated(lambda: metal.patch_embed(ids, table)).result, reference.patch_embed(ids, table))
