"""What a byte must read, counted by hand for a small model."""

import pytest
from mlx.utils import tree_flatten

from marlin_cli.api import MegaByteModel
from marlin_cli.bench.throughput import ThroughputSettings, measure_throughput
from marlin_cli.engine.decoding import CacheBits
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops import cpu
from marlin_cli.ops.device import choose_device
from marlin_cli.prediction.bandwidth import Bandwidth
from marlin_cli.prediction.prediction import layer_shapes, predicted_seconds
from marlin_cli.prediction.roofline import bandwidth_for, reading_of, roofline_of
from marlin_cli.prediction.sizes import bytes_by_part

BANDWIDTH = Bandwidth(10.0, 1000.0, {"nvfp4": 100.0})


@pytest.fixture
def model(random_network, small_sizes):
    return MegaByteModel(random_network(MegaByteConfig(**small_sizes)), choose_device("cpu"))


def test_reading_by_part_at_the_bandwidth_of_its_format(model):
    config = model.config
    plain, packed = (
        roofline_of(each, 16, 1000.0, None, BANDWIDTH) for each in (model, model.quantize(global_bits=4, local_bits=4))
    )
    sizes = bytes_by_part(dict(tree_flatten(model.network.parameters())))
    assert plain.read_bytes["global"] == sizes["global"] / config.patch_size
    assert plain.read_bytes["local"] == sizes["local"]
    assert plain.read_seconds_by_part["local"] == pytest.approx(sizes["local"] / 1000)
    # 4 patches of keys and values in float32, read once a patch; a local sequence half on average.
    assert plain.read_bytes["global cache"] == 2 * 4 * config.global_layers * 4 * config.global_dim / config.patch_size
    assert packed.read_bytes["global cache"] == plain.read_bytes["global cache"]
    assert packed.read_bytes["local"] < 0.4 * plain.read_bytes["local"]
    assert packed.read_seconds_by_part["local"] > plain.read_seconds_by_part["local"]  # at a tenth of the bandwidth
    for found in (plain, packed):
        assert found.share == pytest.approx(sum(found.read_seconds_by_part.values()) / 1000)
        assert found.bandwidth_reached is None and found.predicted_seconds_by_part is None


def test_packed_caches_are_smaller(random_network, small_sizes):
    network = random_network(MegaByteConfig(**{**small_sizes, "global_heads": 1}))
    caches = []
    for bits in (CacheBits(16, 16), CacheBits(4, 16), CacheBits(4, 4)):
        model = MegaByteModel(network, choose_device("cpu"), cache_bits=bits)
        caches.append(roofline_of(model, 16, 1.0, None, BANDWIDTH).read_bytes["global cache"])
    whole, half, none = caches
    assert none == pytest.approx(whole * 4.5 / 32) and half == pytest.approx((whole + none) / 2)


def test_the_bandwidth_that_each_part_reaches(model):
    reading = roofline_of(model, 16, 1.0, None, BANDWIDTH).read_seconds_by_part
    measured = {**{part: 2 * seconds for part, seconds in reading.items()}, "local": reading["local"] / 4, "overhead": 1.0}
    found = roofline_of(model, 16, sum(measured.values()), measured, BANDWIDTH)
    assert found.bandwidth_reached == pytest.approx({**dict.fromkeys(reading, 0.5), "local": 4.0})
    assert found.share == pytest.approx(sum(reading.values()) / sum(measured.values()))


@pytest.mark.skipif(cpu.kernels()[0] is None, reason=f"no CPU kernels here: {cpu.kernels()[1]}")
def test_a_part_that_no_byte_passed_reaches_nothing(model):
    """One byte in the middle of a patch, say."""
    _, reading = reading_of(model, 16, BANDWIDTH)
    found = roofline_of(model, 16, 1.0, {**dict.fromkeys(reading, 1.0), "global": 0.0}, BANDWIDTH)
    assert found.bandwidth_reached is not None and found.bandwidth_reached.keys() == reading.keys() - {"global"}


def test_predictions_have_the_parts_that_are_measured(model):
    [speed] = measure_throughput([model], ThroughputSettings(20, 9, 1))
    [predicted] = predicted_seconds(model.config, layer_shapes(model.network), [24], model.cache_bits)
    assert list(predicted) == list(speed.decode_seconds_by_part)
    read = roofline_of(model, 24, 1.0, None, BANDWIDTH).read_seconds_by_part
    assert [*read, "sampling", "overhead"] == list(predicted)  # in one order, so that a part has one colour on a page


def test_the_formats_of_the_model_are_measured(model, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "marlin_cli.prediction.roofline.measure_bandwidth", lambda *given, **named: asked.append((*given, named))
    )
    bandwidth_for(model)
    bandwidth_for(model.quantize(global_bits=4, local_bits=4))
    assert asked == [([], {"activation_bits": 16}), (["nvfp4"], {"activation_bits": 16})]
