"""awq: folding changes nothing the network computes, and recovers what outlying channels cost."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from marlin_cli.errors import UsageError
from marlin_cli.models import linear_layers
from marlin_cli.quantization.apply import plan_network, quantize_network
from marlin_cli.quantization.methods.awq import fold, legal_folds
from marlin_cli.quantization.plan import QuantizationSettings
from marlin_cli.quantization.scaled import rescaled
from marlin_cli.statistics.collect import hessian_channels, measure, shared_inputs
from marlin_cli.statistics.data import Run, Statistics
from marlin_cli.statistics.hessians import HessianAccumulator

BYTES = np.random.default_rng(3).integers(0, 256, 96, dtype=np.uint8)
SETTINGS = QuantizationSettings("int4", "int4", overrides={})


def with_outliers(network):
    """The same function with each foldable channel scaled by up to 100."""
    parameters = dict(tree_flatten(network.parameters()))
    rng = np.random.default_rng(1)
    for found in legal_folds(parameters, gated=network.config.ffn == "swiglu"):
        columns = parameters[f"{found.consumers[0]}.weight"].shape[1]
        fold(parameters, found, (100 ** -(rng.random(columns) ** 6)).astype(np.float32))
    other = type(network)(network.config)
    other.load_weights(list(parameters.items()))
    return other


def statistics_of(network, folder: Path) -> Statistics:
    sums = HessianAccumulator(hessian_channels(network), 1, folder)
    totals = measure(network, "code", BYTES, sums)
    return Statistics("m", shared_inputs(network), (Run("c", 96, 0, None),), totals, sums.sums)


def logits(network) -> np.ndarray:
    return np.array(network(mx.array(BYTES.astype(np.int32))[None]))


def test_folding_is_exact(each_network, tmp_path):
    scaled = with_outliers(each_network)
    np.testing.assert_allclose(logits(scaled), logits(each_network), rtol=2e-3, atol=2e-4)


def test_what_is_chosen_computes_the_same(network_of_64, tmp_path):
    scaled = with_outliers(network_of_64)
    statistics = statistics_of(scaled, tmp_path)
    copy, factors = rescaled(scaled, plan_network(scaled, SETTINGS), statistics)
    assert factors and all((np.log2(f) % 1 == 0).all() for f in factors.values())
    np.testing.assert_allclose(logits(copy), logits(scaled), rtol=1e-4, atol=1e-5)


def test_outliers_cost_less(network_of_64, tmp_path):
    scaled = with_outliers(network_of_64)
    statistics = statistics_of(scaled, tmp_path)
    exact = logits(scaled)
    lost = {
        method: np.square(
            logits(quantize_network(scaled, SETTINGS, None if method == "rtn" else statistics, method=method).network) - exact
        ).mean()
        for method in ("rtn", "awq")
    }
    assert lost["awq"] < 0.6 * lost["rtn"]


def test_without_statistics(network_of_64):
    with pytest.raises(UsageError, match="'awq' needs statistics"):
        quantize_network(network_of_64, SETTINGS, method="awq")


@pytest.fixture
def network_of_64(random_network):
    from marlin_cli.models.megabyte import MegaByteConfig

    network = random_network(
        MegaByteConfig(
            patch_size=4, max_bytes=96, global_layers=2, global_dim=64, global_heads=2, global_ffn_dim=128,
            local_layers=1, local_dim=64, local_heads=2, local_ffn_dim=128,
        )
    )  # fmt: skip
    assert linear_layers(network)
    return network
