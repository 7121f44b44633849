"""ByT5's network: presets, relative bias, attention in blocks, and the encoder that pools."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from marlin_cli.errors import ConfigError
from marlin_cli.models import byt5, preset
from marlin_cli.models.byt5 import ByT5, buckets_by_distance
from marlin_cli.models.byt5_config import ByT5Config
from marlin_cli.ops import Linear
from marlin_cli.ops.long_attention import cross_attention, relative_attention

SMALL = {"d_model": 32, "ffn_dim": 48, "heads": 2, "head_dim": 16, "encoder_layers": 4, "decoder_layers": 1}


def random_network(seed=0, **changes):
    network = ByT5(ByT5Config(**{**SMALL, **changes}))
    mx.random.seed(seed)
    network.update(tree_map(lambda a: mx.random.normal(a.shape) * a.shape[-1] ** -0.5, network.parameters()))
    return network


@pytest.mark.parametrize("name", ["small", "base", "large", "xl", "xxl"])
def test_presets(name):
    config = preset(f"byt5-{name}")
    assert isinstance(config, ByT5Config) and config.vocab_size == 384
    assert all(width % 32 == 0 for width in (config.d_model, config.ffn_dim, config.heads * config.head_dim))
    with pytest.raises(ConfigError, match="byt5-small"):
        preset("byt5-smal")


def test_the_buckets_of_t5():
    config = ByT5Config()
    both, before = buckets_by_distance(config, True), buckets_by_distance(config, False)
    assert both[128 - 9 : 128 + 10].tolist() == [8, 8, 7, 6, 5, 4, 3, 2, 1, 0, 17, 18, 19, 20, 21, 22, 23, 24, 24]
    assert (both[0], both[-1], before[0], before[128], before[-1]) == (15, 31, 31, 0, 0)
    # Powers of two are the bounds of logarithmic buckets: 16, 32, 64 each begin one.
    assert [both[128 - n] for n in (15, 16, 31, 32, 63, 64)] == [9, 10, 11, 12, 13, 14]


@pytest.mark.parametrize("window", [None, 5, 100])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_blocks_are_the_whole(window, causal, ragged):
    if causal and window is not None:
        pytest.skip("no layer has both")
    mx.random.seed(0)
    batch, heads, rows, most = 2, 3, 41, 7
    queries, keys, values = (mx.random.normal((batch, heads, rows, 8)) for _ in range(3))
    bias = mx.random.normal((heads, 2 * most + 1))
    lengths = [41, 30] if ragged else [rows] * batch
    found = relative_attention(
        queries, keys, values, bias, causal=causal, window=window,
        lengths=mx.array(lengths) if ragged else None, scores_at_once=1000,
    )  # fmt: skip
    distance = np.arange(rows)[None] - np.arange(rows)[:, None]
    scores = np.array(queries @ keys.swapaxes(-1, -2)) + np.array(bias)[:, np.clip(distance, -most, most) + most]
    hidden = (distance > 0) & causal | (np.abs(distance) > (window or rows))
    for stream, length in enumerate(lengths):
        own = np.where(hidden | (np.arange(rows) >= length), -np.inf, scores[stream])[:, :length]
        weights = np.exp(own - own.max(axis=-1, keepdims=True))
        expected = weights / weights.sum(axis=-1, keepdims=True) @ np.array(values[stream])
        assert np.abs(np.array(found[stream])[:, :length] - expected).max() < 1e-5


def test_cross_attention_in_blocks():
    mx.random.seed(0)
    queries, keys, values = (mx.random.normal((2, 3, rows, 8)) for rows in (11, 29, 29))
    lengths = mx.array([29, 13])
    whole = cross_attention(queries, keys, values, lengths)
    assert mx.allclose(cross_attention(queries, keys, values, lengths, scores_at_once=400), whole, atol=1e-6)


@pytest.mark.slow
def test_long_inputs_take_bounded_memory():
    """The scores of 8192 bytes would take 512 MiB a layer, and twice that with their bias."""
    network = random_network(encoder_layers=1, d_model=16, ffn_dim=16, decoder_layers=0)
    ids = mx.array(np.random.default_rng(0).integers(3, 259, (1, 8192)))
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    mx.eval(network.encode(ids))
    assert mx.get_peak_memory() - held < 5 * (128 << 20)


# The encoder that pools


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("total", [1, 3, 4, 5, 23])
def test_pooling_keeps_every_byte_and_ignores_filler(pooling, total):
    network = random_network(downsample_factor=4, pooling=pooling, local_window=3)
    ids = np.random.default_rng(total).integers(3, 259, (1, total))
    alone = network.encode(mx.array(ids))
    assert alone.shape == (1, total, 32)
    filled = np.zeros((2, 31), dtype=np.int64)
    filled[0, :total] = ids
    filled[1] = 77
    together = network.encode(mx.array(filled), mx.array([total, 31]))
    assert mx.allclose(together[:1, :total], alone, atol=1e-5)


def test_local_layers_see_their_window_alone():
    network = random_network(downsample_factor=4, local_window=3)
    ids = np.random.default_rng(0).integers(3, 259, (1, 40))
    other = ids.copy()
    other[0, 20] = 3 if ids[0, 20] != 3 else 4
    bias = network.encoder.local_bias()
    layer = network.encoder.local_layers[0]
    a, b = (layer(network.embedding(mx.array(each)), bias, None, 3) for each in (ids, other))
    changed = np.flatnonzero(np.abs(np.array(a - b))[0].max(axis=-1) > 1e-6)
    assert changed.tolist() == list(range(17, 24))
    # Through the pooled layers every byte is seen by all.
    states = np.abs(np.array(network.encode(mx.array(ids)) - network.encode(mx.array(other))))[0].max(axis=-1)
    assert (states > 1e-7).all()


def test_upper_layers_cost_less_where_they_pool(monkeypatch):
    ids = mx.array(np.random.default_rng(0).integers(3, 259, (1, 768)))
    plain_product, plain_attention = Linear.__call__, byt5.relative_attention
    cost = {}

    def counted_product(layer, x):
        cost["rows"] += x.size // x.shape[-1]
        return plain_product(layer, x)

    def counted_attention(queries, keys, values, bias, *, window=None, **settings):
        rows, total = queries.shape[2], keys.shape[2]
        cost["pairs"] += rows * (total if window is None else min(total, 2 * window + 1))
        return plain_attention(queries, keys, values, bias, window=window, **settings)

    monkeypatch.setattr(Linear, "__call__", counted_product)
    monkeypatch.setattr(byt5, "relative_attention", counted_attention)

    def costs(**changes):
        cost.update(rows=0, pairs=0)
        mx.eval(random_network(d_model=32, ffn_dim=32, encoder_layers=6, decoder_layers=0, **changes).encode(ids))
        return dict(cost)

    plain, pooled = costs(), costs(downsample_factor=8, local_layers=1, local_window=32)
    assert plain == {"rows": 6 * 7 * 768, "pairs": 6 * 768**2}  # four products of attention, three of feed-forward
    assert pooled == {"rows": 7 * (768 + 5 * 96), "pairs": 768 * 65 + 5 * 96**2}


def test_it_trains():
    network = random_network(downsample_factor=4, local_window=8)
    source = mx.array(np.random.default_rng(0).integers(3, 259, (4, 13)))
    target = mx.concatenate([mx.zeros((4, 1), dtype=source.dtype), source[:, :5]], axis=1)

    def loss(network):
        return nn.losses.cross_entropy(network(source, target[:, :-1]), target[:, 1:], reduction="mean")

    step = nn.value_and_grad(network, loss)
    import mlx.optimizers as optimizers

    optimizer = optimizers.Adam(learning_rate=5e-3)
    first = None
    for _ in range(25):
        value, gradients = step(network)
        optimizer.update(network, gradients)
        mx.eval(network.parameters())
        first = value.item() if first is None else first
    assert value.item() < 0.5 * first
    assert all(mx.abs(gradient).max().item() > 0 for _, gradient in tree_flatten(gradients))


def test_sizes_that_do_not_fit_are_refused():
    for changes, message in (
        ({"vocab_size": 258}, "every byte"),
        ({"d_model": 1 << 30}, "for real"),
        ({"relative_buckets": 6}, "multiple of 4"),
        ({"start_id": 384}, "start_id"),
        ({"encoder_layers": 1, "downsample_factor": 2}, "two encoder layers"),
    ):
        with pytest.raises(ConfigError, match=message):
            ByT5Config(**changes)
