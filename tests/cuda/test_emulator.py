"""The CUDA emulator finds planted faults, and the kernels do not depend on the order in which threads run."""

import functools

import mlx.core as mx
import numpy as np
import pytest
from cuda_emulator import Emulated, compiler

from marlin_cli.ops import cuda, cuda_kernels, reference

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(compiler() is None, reason="no C++ compiler on Linux here")]
NVFP4 = {"group_size": 16, "bits": 4, "mode": "nvfp4"}


def random(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def product_error():
    """Of a product that all warps of a block take part in, x through shared memory."""
    x, plain = random(3, 1024), random(20, 1024, seed=1)
    weight, scales = mx.quantize(plain, **NVFP4)
    with mx.stream(mx.cpu):
        exact = x @ mx.dequantize(weight, scales, **NVFP4, dtype=mx.float32).T
        return mx.abs(cuda.packed_linear(x, weight, scales, None, **NVFP4) - exact).max().item()


def attention_error():
    """Of one that all warps of a block take part in, and two blocks."""
    queries, keys, values = random(1, 2, 2, 32), random(1, 1, 300, 32, seed=1), random(1, 1, 300, 32, seed=2)
    with mx.stream(mx.cpu):
        exact = reference.attention(queries, keys, values, 0.2)
        return mx.abs(cuda.paged_attention(queries, [keys], [values], 0.2) - exact).max().item()


@pytest.mark.parametrize("error", [product_error, attention_error])
@pytest.mark.parametrize("backwards", [False, True])
def test_the_order_of_threads_does_not_matter(error, backwards, monkeypatch):
    monkeypatch.setattr(cuda, "kernel", functools.partial(Emulated, backwards=backwards))
    assert error() < 1e-4


FAULTS = {
    "sums are read before they are there": (product_error, "__syncthreads();\nfor (int i", "for (int i"),
    "x is read before it is there": (product_error, "__syncthreads();\n}\n", "}\n"),
    "warps join before they are done": (attention_error, "__syncthreads();\nif (warp > 0 ||", "if (warp > 0 ||"),
    "a group is forgotten": (attention_error, "tile.join_groups();", ""),
    "two blocks write one part": (attention_error, "(blockIdx.x * int64_t(gridDim.z) + batch)", "batch"),
    "a scale of the wrong group": (product_error, "word * GROUPS / 4", "0"),
}


QUICK = "sums are read before they are there"


@pytest.mark.parametrize(
    ("error", "right", "wrong"),
    [pytest.param(*fault, id=name, marks=[] if name == QUICK else pytest.mark.slow) for name, fault in FAULTS.items()],
)
def test_a_fault_shows(error, right, wrong, monkeypatch):
    sources = [source.header() + source.body() for source in cuda_kernels.SOURCES.values()]
    assert any(right in source for source in sources)  # else nothing is planted
    errors = []
    for backwards in (False, True):
        kernel = functools.partial(Emulated, backwards=backwards, edit=lambda text: text.replace(right, wrong))
        monkeypatch.setattr(cuda, "kernel", kernel)
        errors.append(error())
    assert not max(errors) < 1e-4  # NaN is a fault too


def test_a_lane_that_misses_a_shuffle_is_found(monkeypatch):
    leave = "if (threadIdx.x == 3) return;\ntile.join_groups();"
    edit = lambda text: text.replace("tile.join_groups();", leave)  # noqa: E731
    monkeypatch.setattr(cuda, "kernel", functools.partial(Emulated, edit=edit))
    with pytest.raises(AssertionError, match="a lane left"):
        attention_error()
