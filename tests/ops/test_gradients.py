"""Operations of GPU twins that MLX knows no gradient of: what dispatch gives them is the reference's."""

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli.ops import dispatch, reference


def random(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


@pytest.fixture(params=["metal", "cuda"])
def twins(request, monkeypatch):
    """A stand-in for kernels: the reference's numbers behind `stop_gradient`, as a kernel hides how they came about."""
    module = getattr(dispatch, request.param)
    monkeypatch.setattr(dispatch, "gpu", lambda: request.param)
    for name in ("attention", "patch_embed", "strided_pool"):
        plain = getattr(reference, name)
        monkeypatch.setattr(module, name, lambda *each, plain=plain, **settings: mx.stop_gradient(plain(*each, **settings)))
        monkeypatch.setattr(module, f"takes_{name}", lambda *each, **settings: True)


def assert_same_gradients(found, expected, *arrays):
    numbers = tuple(range(len(arrays)))
    found, expected = (mx.grad(lambda *each, f=f: (f(*each) ** 2).sum(), argnums=numbers)(*arrays) for f in (found, expected))
    for ours, theirs in zip(found, expected, strict=True):
        assert mx.abs(ours - theirs).max().item() < 1e-4 < mx.abs(theirs).max().item()


def test_attention(twins):
    arrays = [random(1, 2, 7, 16, seed=seed) for seed in range(3)] + [random(2, 9, seed=3)]

    def attend(module):
        return lambda q, k, v, bias: module.attention(q, k, v, 0.3, causal=False, relative_bias=bias)

    assert_same_gradients(attend(dispatch), attend(reference), *arrays)


def test_patch_embed(twins):
    ids = mx.array([[[1, 2], [2, 0]]])
    embed = [lambda table, module=module: module.patch_embed(ids, table) for module in (dispatch, reference)]
    assert_same_gradients(*embed, random(3, 4))


def test_strided_pool(twins):
    pool = [lambda x, module=module: module.strided_pool(x, 3, "max") for module in (dispatch, reference)]
    assert_same_gradients(*pool, random(2, 7, 5))
