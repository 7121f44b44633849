"""Balanced keys: the network computes the same to the last bit, and 4-bit keys lose what they lose without outliers."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from typer.testing import CliRunner

from marlin_cli.cli import app
from marlin_cli.engine.cache import PackedKeyValueCache
from marlin_cli.errors import StatisticsError, UsageError
from marlin_cli.models import shared_inputs
from marlin_cli.models.byt5 import ByT5
from marlin_cli.models.byt5_config import ByT5Config
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.balanced_keys import balancing_factors, with_balanced_keys
from marlin_cli.quantization.plan import QuantizationSettings
from marlin_cli.quantization.sequential import quantize_sequentially
from marlin_cli.statistics.collect import measure, measure_pair
from marlin_cli.statistics.data import Run, Statistics

BYTES = np.random.default_rng(3).integers(0, 256, 96, dtype=np.uint8)


def statistics_of(network, totals):
    return Statistics("m", shared_inputs(network), (Run("c", 96, 0, None),), totals)


def with_outliers_planted(totals):
    """Totals in which some channels of keys have been larger than they were: the network needs no outliers of its own."""
    rng = np.random.default_rng(0)
    for moments in totals.keys.values():
        moments.absolute_maximum[..., rng.random(moments.absolute_maximum.shape[-1]) < 0.2] *= 32
        moments.absolute_maximum[..., 0] *= 8
    return totals


def with_large_keys(network):
    """The same function; a fifth of the pairs of key channels of the global stage is larger."""
    rng = np.random.default_rng(0)
    for layer in network["global"].layers:
        each = layer.attention
        factors = np.where(rng.random((each.kv_heads, 1, each.head_dim // 2)) < 0.2, 32.0, 1.0)
        factors = np.broadcast_to(factors, (each.kv_heads, 2, each.head_dim // 2)).reshape(each.kv_heads, -1)
        each.k_proj.weight = each.k_proj.weight * mx.array(factors.reshape(-1, 1).astype(np.float32))
        readers = np.repeat(factors, each.heads // each.kv_heads, axis=0)
        each.q_proj.weight = each.q_proj.weight / mx.array(readers.reshape(-1, 1).astype(np.float32))
    return network


def logits(network, run_stage=None):
    return np.array(network(mx.array(BYTES.astype(np.int32))[None], run_stage))


def test_a_megabyte_computes_the_same_to_the_last_bit(each_network):
    statistics = statistics_of(each_network, with_outliers_planted(measure(each_network, "code", BYTES)))
    balanced = with_balanced_keys(each_network, statistics)
    np.testing.assert_array_equal(logits(balanced), logits(each_network))
    before, after = (dict(tree_flatten(each.parameters())) for each in (each_network, balanced))
    changed = {name for name in before if not mx.array_equal(before[name], after[name])}
    assert changed and all(name.startswith("global.layers.") for name in changed)


def test_a_byt5_computes_the_same_to_the_last_bit():
    network = ByT5(ByT5Config(d_model=32, ffn_dim=64, heads=2, head_dim=16, encoder_layers=1, decoder_layers=2))
    mx.random.seed(0)
    network.update(tree_map(lambda array: mx.random.normal(array.shape) * 0.3, network.parameters()))
    network.eval()
    statistics = statistics_of(network, with_outliers_planted(measure_pair(network, "pairs", b"some source", b"target")))
    balanced = with_balanced_keys(network, statistics)
    source, target = mx.array([list(range(3, 40))]), mx.array([list(range(30, 50))])
    np.testing.assert_array_equal(np.array(balanced(source, target)), np.array(network(source, target)))
    before, after = (dict(tree_flatten(each.parameters())) for each in (network, balanced))
    changed = {name for name in before if not mx.array_equal(before[name], after[name])}
    assert changed and all(".cross." in name for name in changed)


@pytest.mark.parametrize("changes", [{}, {"global_kv_heads": 1}], ids=["a key a query", "grouped"])
def test_large_keys_lose_no_more_than_others(random_network, changes):
    sizes = {"global_layers": 2, "global_dim": 128, "global_heads": 2, "local_layers": 1, "local_dim": 32, "local_heads": 1}
    network = with_large_keys(random_network(MegaByteConfig(patch_size=4, max_bytes=96, **sizes, **changes)))
    balanced = with_balanced_keys(network, statistics_of(network, measure(network, "code", BYTES)))

    def error(some):
        def run_stage(number, rows):
            caches = [PackedKeyValueCache(4, 16) for _ in some["global"].layers]
            return some.stages[number].stack(rows) if number else some["global"](rows, caches)

        return np.square(logits(some, run_stage) - logits(some)).mean()

    # Squared: the largest keys are 32 times the others, spread by the rotation over 64 channels.
    assert error(balanced) < 0.1 * error(network)


@pytest.mark.parametrize("interleaved", [False, True])
def test_factors_are_powers_of_two_that_pairs_share(interleaved):
    largest = np.array([[1, 2, 3, 33, 0, 0, 5, 0.25], [9, 9, 9, 9, 9, 9, 9, 9000]], np.float32)
    factors = balancing_factors(largest, rotated=True, interleaved=interleaved)
    assert (np.log2(factors) % 1 == 0).all()
    pairs = factors.reshape(2, 4, 2) if interleaved else factors.reshape(2, 2, 4).swapaxes(1, 2)
    np.testing.assert_array_equal(pairs[..., 0], pairs[..., 1])
    assert factors[1].max() == 256  # the most there is, of a channel 1,000 times the others
    assert balancing_factors(np.zeros((1, 4), np.float32)).tolist() == [[1, 1, 1, 1]]
    # What is less than four times the usual is left to the rotation, and so is what is small.
    assert balancing_factors(np.array([[0, 1, 3.9, 1, 4, 11, 0.01, 1, 1]], np.float32)).tolist() == [
        [1, 1, 1, 1, 4, 8, 1, 1, 1]
    ]


def test_quantize_balances_and_says_so(random_network):
    config = MegaByteConfig(
        patch_size=4, max_bytes=96, global_layers=1, global_dim=64, global_heads=2, local_layers=1, local_dim=32,
        local_heads=1,
    )  # fmt: skip
    network = with_large_keys(random_network(config))
    statistics = statistics_of(network, measure(network, "code", BYTES))
    result = quantize_network(network, QuantizationSettings("16bit", "16bit", balance_keys=True), statistics)
    np.testing.assert_array_equal(logits(result.network), logits(network))
    assert result.marlin["balanced_keys"] is True
    path = "global.layers.0.attention.k_proj.weight"
    weights = [np.array(dict(tree_flatten(each.parameters()))[path]) for each in (network, result.network)]
    largest, least = (np.abs(each).max(axis=1) for each in weights), 1e-3
    before, after = (sizes.max() / max(sizes.min(), least) for sizes in largest)
    assert after < before / 4


def test_without_statistics_there_is_nothing_to_balance_by(each_network, random_network, small_sizes):
    settings = QuantizationSettings("16bit", "16bit", balance_keys=True)
    with pytest.raises(UsageError, match="--balance-keys needs statistics"):
        quantize_network(each_network, settings)
    with pytest.raises(UsageError, match="--sequential goes without"):
        quantize_sequentially(each_network, settings, [])
    other = random_network(MegaByteConfig(**{**small_sizes, "global_dim": 4 * small_sizes["global_dim"]}))
    with pytest.raises(StatisticsError, match="channels in 'global.layers.0.attention'"):
        with_balanced_keys(each_network, statistics_of(other, measure(other, "code", BYTES)))
    bare = measure(each_network, "code", BYTES)
    bare.keys.clear()
    with pytest.raises(StatisticsError, match="hold no keys of 'global.layers.0.attention'"):
        with_balanced_keys(each_network, statistics_of(each_network, bare))


def test_the_option_is_refused_without_statistics(tmp_path):
    result = CliRunner().invoke(app, ["quantize", "megabyte-demo", "-o", str(tmp_path / "out"), "--balance-keys"])
    assert result.exit_code != 0
    assert "--balance-keys needs --stats" in str(result.exception) + result.output
