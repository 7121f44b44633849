"""Sequential packing of a ByT5: encoder, then the decoder on what the packed encoder says; filler counts nowhere."""

import dataclasses
import functools

import byt5_cases
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from marlin_cli.errors import QuantizationError, UsageError
from marlin_cli.models import shared_inputs
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.plan import QuantizationSettings
from marlin_cli.quantization.sequential import quantize_sequentially
from marlin_cli.statistics.collect import hessian_channels, measure_pair
from marlin_cli.statistics.data import Run, Statistics, pool
from marlin_cli.statistics.hessians import HessianAccumulator

FORMAT = QuantizationSettings(encoder_format="mxfp4", decoder_format="mxfp4", cross_format="mxfp4", wo_format="mxfp4")
SEED = 1  # of the pairs that are packed on


def statistics_of(network, folder):
    sums = HessianAccumulator(hessian_channels(network), 2, folder)
    some = byt5_cases.examples(SEED)
    totals = functools.reduce(pool, (measure_pair(network, each.domain, each.source, each.target, None, sums) for each in some))
    return Statistics("m", shared_inputs(network), (Run("c", 1, 0, None),), totals, sums.sums)


def packed(network, batches=None, **options):
    """The network packed on the pairs of `SEED`, or on other batches."""
    return quantize_sequentially(network, FORMAT, batches or byt5_cases.batches(SEED, network), **options).network


def arrays(network):
    return dict(tree_flatten(network.parameters()))


@pytest.mark.parametrize("changes", byt5_cases.KINDS.values(), ids=byt5_cases.KINDS.keys())
def test_less_is_lost_than_layer_by_layer(changes, tmp_path):
    network = byt5_cases.random_byt5(**changes)
    lost = {
        "rtn": quantize_network(network, FORMAT, method="rtn").network,
        "gptq": quantize_network(network, FORMAT, statistics_of(network, tmp_path), method="gptq").network,
        "sequential": packed(network),
    }
    on_calibration, on_others = (
        {name: byt5_cases.divergence(network, other, seed) for name, other in lost.items()} for seed in (SEED, 99)
    )
    assert on_calibration["sequential"] < 0.5 * on_calibration["gptq"] < 0.5 * on_calibration["rtn"]
    assert on_others["sequential"] < 0.7 * on_others["rtn"]


def test_an_encoder_alone_keeps_its_states():
    network = byt5_cases.random_byt5(decoder_layers=0)
    source = mx.array([[*range(40, 80), 1]])
    exact = network.encode(source)

    def error(other) -> float:
        return mx.square(other.encode(source) - exact).mean().item()

    assert error(packed(network)) < 0.8 * error(quantize_network(network, FORMAT, method="rtn").network)


def test_the_decoder_makes_up_for_the_packed_encoder():
    """Packed on the states of the 16-bit encoder, as `gptq` packs, the decoder would not know what the packed one says."""
    network = byt5_cases.random_byt5()
    decoder_alone = dataclasses.replace(FORMAT, encoder_format="16bit")
    whole = packed(network)
    blind = quantize_sequentially(network, decoder_alone, byt5_cases.batches(SEED, network)).network
    encoder = {path: array for path, array in arrays(whole).items() if path.startswith("encoder.")}
    other = quantize_network(network, FORMAT, method="rtn").network  # its packed layers take the arrays of both
    other.load_weights(list({**arrays(blind), **encoder}.items()), strict=False)
    assert arrays(other).keys() == arrays(whole).keys()
    assert byt5_cases.divergence(network, whole, SEED) < 0.97 * byt5_cases.divergence(network, other, SEED)


def test_filler_counts_nowhere():
    network = byt5_cases.random_byt5()
    batches = byt5_cases.batches(SEED, network)
    rng = np.random.default_rng(0)

    def with_filler(ids):
        return mx.concatenate([ids, mx.array(rng.integers(0, 384, (ids.shape[0], 9)).astype(np.int32))], axis=1)

    longer = [
        (domain, dataclasses.replace(batch, source=with_filler(batch.source), target=with_filler(batch.target)))
        for domain, batch in batches
    ]
    assert all(batch.lengths is not None for _, batch in batches)
    one, two = arrays(packed(network)), arrays(packed(network, longer))
    same = [mx.mean(one[path] == two[path]).item() for path in one]
    assert one.keys() == two.keys() and np.mean(same) > 0.99  # sums differ by rounding, and codes where that decides


@pytest.mark.parametrize("method", ["mse", "gptq", "gptq+hadamard"])
def test_two_runs_give_the_same_arrays(method):
    network = byt5_cases.random_byt5()
    one, two = (arrays(packed(network, method=method)) for _ in range(2))
    assert one.keys() == two.keys()
    for path, array in one.items():
        assert mx.array_equal(array, two[path]).item(), path


def test_domain_weights_choose_among_the_pairs():
    network = byt5_cases.random_byt5()
    batches = byt5_cases.batches(SEED, network)
    chosen = arrays(packed(network, domain_weights={"text": 1.0}))
    alone = arrays(packed(network, [batch for batch in batches if batch[0] == "text"]))
    for path, array in alone.items():
        assert mx.array_equal(array, chosen[path]).item(), path
    with pytest.raises(QuantizationError, match="no domain 'txt'"):
        packed(network, domain_weights={"txt": 1.0})


def test_keys_are_not_balanced_on_the_way():
    with pytest.raises(UsageError, match="--balance-keys"):
        quantize_sequentially(byt5_cases.random_byt5(), dataclasses.replace(FORMAT, balance_keys=True), [])
