"""Attention, dense and in pages: the dispatched twin against float64, over masks, shapes and hazards."""

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli.ops import attention, cpu, paged_attention, reference

# batch, heads, kv_heads, rows, total, head_dim
SHAPES = {
    "one row": (1, 2, 2, 1, 37, 16),
    "one key": (2, 1, 1, 1, 1, 8),
    "whole": (2, 4, 2, 9, 9, 32),
    "rows beyond a block": (1, 2, 1, 40, 150, 16),
    "tiles with a tail": (2, 2, 2, 3, 131, 64),
    "a narrow head": (1, 3, 3, 6, 20, 5),
}
MASKS = {
    "causal": {},
    "all": {"causal": False},
    "window": {"window": 3},
    "window both ways": {"window": 2, "causal": False},
    "left padding": {"left_padding": 2},
    "lengths": {"lengths": 3, "causal": False},
    "relative bias": {"relative_bias": 4},
    "relative bias, both ways, lengths": {"relative_bias": 6, "causal": False, "lengths": 1},
}


def random(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def settings_of(mask, batch, heads, total):
    settings = dict(mask)
    if "relative_bias" in mask:
        settings["relative_bias"] = random(heads, 2 * mask["relative_bias"] + 1, seed=9)
    for name in ("left_padding", "lengths"):
        if name in mask:  # the first sequence is whole
            counts = [0 if row == 0 else min(mask[name], total - 1) for row in range(batch)]
            settings[name] = mx.array(counts if name == "left_padding" else [total - count for count in counts])
    return settings


def exact(queries, keys, values, scale, causal=True, window=None, left_padding=None, lengths=None, relative_bias=None):
    """Attention in float64, a row at a time; NaN where a row sees nothing."""
    queries, keys, values = (np.array(each, dtype=np.float64) for each in (queries, keys, values))
    batch, heads, rows, _ = queries.shape
    total, group = keys.shape[2], heads // keys.shape[1]
    out = np.full((batch, heads, rows, values.shape[3]), np.nan)
    for b in range(batch):
        for h in range(heads):
            for r in range(rows):
                position = total - rows + r
                seen = [
                    j for j in range(total)
                    if (not causal or j <= position) and (window is None or abs(j - position) <= window)
                    and (left_padding is None or j >= left_padding[b].item()) and (lengths is None or j < lengths[b].item())
                ]  # fmt: skip
                if not seen:
                    continue
                scores = keys[b, h // group, seen] @ queries[b, h, r] * scale
                if relative_bias is not None:
                    most = relative_bias.shape[1] // 2
                    scores += np.array(relative_bias)[h, np.clip(np.array(seen) - position, -most, most) + most]
                weights = np.exp(scores - scores.max())
                out[b, h, r] = weights @ values[b, h // group, seen] / weights.sum()
    return out


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("twin", ["reference", "dispatch"])
def test_attention(twin, shape, mask):
    batch, heads, kv_heads, rows, total, head_dim = shape
    queries, keys = random(batch, heads, rows, head_dim), random(batch, kv_heads, total, head_dim, seed=1)
    values, settings = random(batch, kv_heads, total, head_dim, seed=2), settings_of(mask, batch, heads, total)
    found = np.array((attention if twin == "dispatch" else reference.attention)(queries, keys, values, 0.3, **settings))
    expected = exact(queries, keys, values, 0.3, **settings)
    real = ~np.isnan(expected)
    assert real.any() and np.isfinite(found).all()
    assert np.abs(found - expected)[real].max() < 1e-5


@pytest.mark.parametrize("bits", [(4, 4), (8, 8), (16, 4), (8, 16)])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_pages(rows, bits):
    sizes = (64, 64, 10)
    queries = random(2, 4, rows, 32)

    def pages(which, seed):
        dense = [random(2, 2, size, 32, seed=seed + n) for n, size in enumerate(sizes)]
        return dense if which == 16 else [reference.pack_rows(page, which) for page in dense]

    keys, values = pages(bits[0], 1), pages(bits[1], 11)
    whole = [mx.concatenate([reference.unpack_rows(page, mx.float32) for page in each], axis=2) for each in (keys, values)]
    padding = mx.array([0, 3])
    found = np.array(paged_attention(queries, keys, values, 0.2, left_padding=padding))
    assert np.abs(found - exact(queries, *whole, 0.2, left_padding=padding)).max() < 1e-5


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize(("bits", "head_dim"), [(4, 48), (4, 16), (8, 96)])
def test_an_odd_number_of_groups_is_packed_and_read(bits, head_dim, rows):
    dense = random(1, 1, rows, head_dim)
    packed = reference.pack_rows(dense, bits)
    assert packed.rows == rows and packed.scales.shape[2] == rows
    twice = reference.pack_rows(mx.concatenate([dense, dense], axis=2), bits)
    found = reference.unpack_rows(packed, mx.float32)
    assert found.shape == dense.shape
    assert mx.array_equal(found, reference.unpack_rows(twice, mx.float32)[:, :, :rows])
    close = reference.attention(dense[:, :, -1:], found, found, 1.0)
    assert mx.allclose(paged_attention(dense[:, :, -1:], [packed], [packed], 1.0), close, atol=1e-5)


def test_keys_that_are_views_and_scores_that_are_huge():
    queries, keys, values = (
        random(1, 2, 3, 16) * 50,
        random(1, 20, 2, 16, seed=1).swapaxes(1, 2) * 50,
        random(1, 2, 40, 16)[:, :, ::2],
    )
    assert np.abs(np.array(attention(queries, keys, values, 1.0)) - exact(queries, keys, values, 1.0)).max() < 1e-4


@pytest.mark.parametrize("known", [True, False], ids=["in memory", "of the graph"])
@pytest.mark.parametrize("rows", [1, 5, 28])
@pytest.mark.parametrize(
    "view",
    [
        lambda: random(2, 3, 40, 16)[:, :, 5:33],
        lambda: random(2, 40, 3, 16).swapaxes(1, 2)[:, :, 5:33],
        lambda: random(2, 3, 16, 28).swapaxes(2, 3),
        lambda: mx.broadcast_to(random(1, 3, 28, 16), (2, 3, 28, 16)),
        lambda: random(2, 3, 28, 32)[..., ::2],
        lambda: random(2, 3, 28, 16)[:, :, ::-1],
    ],
    ids=["first rows of storage", "rows before heads", "channels before rows", "repeated", "each other channel", "backwards"],
)
def test_keys_that_are_views_of_any_kind(view, rows, known):
    queries, keys, values = random(2, 6, rows, 16, seed=1), view(), view()
    if known:
        mx.eval(keys, values)
    assert mx.abs(attention(queries, keys, values, 0.3) - reference.attention(queries, keys, values, 0.3)).max().item() < 1e-5


@pytest.mark.skipif(cpu.kernels()[0] is None, reason=f"no CPU kernels here: {cpu.kernels()[1]}")
def test_the_first_rows_of_a_storage_are_not_copied():
    storage, queries = random(1, 4, 2048, 64), random(1, 4, 1, 64)
    mx.eval(storage, queries)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(attention(queries, storage[:, :, :2000], storage[:, :, :2000], 1.0))
    assert mx.get_peak_memory() - before < storage.nbytes / 4


def test_its_gradients_are_the_reference_s():
    arrays = [random(1, 2, 7, 16, seed=seed) for seed in range(3)] + [random(2, 9, seed=3)]

    def loss(function):
        def squares(queries, keys, values, bias):
            return (function(queries, keys, values, 0.3, window=4, relative_bias=bias) ** 2).sum()

        return mx.grad(squares, argnums=(0, 1, 2, 3))

    for found, expected in zip(loss(attention)(*arrays), loss(reference.attention)(*arrays), strict=True):
        assert mx.abs(found - expected).max().item() < 1e-4 < mx.abs(expected).max().item()


@pytest.mark.parametrize("rows", [1, 3])
def test_packed_pages_with_a_bias_by_distance(rows):
    """As the reference has it, over pages of which one is packed."""
    mx.random.seed(0)
    queries, dense = mx.random.normal((2, 3, rows, 64)), mx.random.normal((2, 3, 40, 64))
    bias = mx.random.normal((3, 2 * 9 + 1))
    pages = [reference.pack_rows(dense[:, :, :25], 8), dense[:, :, 25:]]
    found = paged_attention(queries, pages, pages, 1.0, relative_bias=bias)
    expected = reference.paged_attention(queries, pages, pages, 1.0, relative_bias=bias)
    assert mx.allclose(found, expected, atol=1e-4)
    assert not mx.allclose(found, paged_attention(queries, pages, pages, 1.0), atol=1e-2)
