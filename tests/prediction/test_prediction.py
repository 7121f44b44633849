"""Predictions are made of operations, as often as a patch has them. How near they come is for benchmarks to show."""

import functools

import mlx.core as mx
import pytest
from block_recurrent_cases import MELIAD, random_block_recurrent
from blt_cases import random_blt
from evabyte_cases import random_evabyte
from spacebyte_cases import SIZES

from marlin_cli.api import MegaByteModel
from marlin_cli.engine import decoding
from marlin_cli.engine.decoding import CacheBits, Lockstep
from marlin_cli.models import linear_layers, part_of
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.models.megabyte_decoding import miniature_of
from marlin_cli.models.spacebyte import SpaceByte
from marlin_cli.models.spacebyte_config import SpaceByteConfig
from marlin_cli.ops import cpu
from marlin_cli.ops.device import choose_device
from marlin_cli.prediction import prediction
from marlin_cli.prediction.greedy import decoded
from marlin_cli.prediction.prediction import (
    DecodingProbe,
    LayerShape,
    at_bits,
    can_predict,
    layer_shapes,
    predicted_seconds,
)
from marlin_cli.prediction.sizes import bytes_by_part

pytestmark = pytest.mark.skipif(cpu.kernels()[0] is None, reason=f"no CPU kernels here: {cpu.kernels()[1]}")


class Counting:
    """A probe that takes a second a pass for each of its units."""

    def __init__(self, units):
        self.units, self.passes = units, 0

    def seconds(self):
        self.passes += 1
        return float(self.units)


@pytest.fixture
def counted(monkeypatch):
    """Probes that count: a second for each weight of a product, and for each row of a cache that attention reads in a layer."""
    made = {"products": [], "attention": []}

    def products(module, shapes):
        made["products"].append((shapes, Counting(sum(shape.columns * shape.depth for shape in shapes))))
        return made["products"][-1][1]

    def attention(module, stack, rows, bits):
        made["attention"].append((rows, stack.window, bits, Counting(stack.layers * rows)))
        return made["attention"][-1][-1]

    monkeypatch.setattr(prediction, "ProductsOfLayers", products)
    monkeypatch.setattr(prediction, "_attention", attention)
    return made


def test_every_layer_has_its_shape(each_network):
    shapes = layer_shapes(each_network)
    assert [shape.path for shape in shapes] == list(linear_layers(each_network))
    weights = {f"{shape.path}.weight": linear_layers(each_network)[shape.path].weight for shape in shapes}
    sizes = dict.fromkeys(bytes_by_part(weights), 0)
    for shape in shapes:
        sizes[part_of(shape.path)] += shape.nbytes
    assert sizes == bytes_by_part(weights)


@pytest.mark.parametrize("bits, format, width", [(4, "nvfp4", 4.5), (8, "mxfp8", 8.25)])
def test_packed_layers_have_their_format(random_network, small_sizes, bits, format, width):
    config = MegaByteConfig(**{**small_sizes, "local_dim": 32})
    model = MegaByteModel(random_network(config), choose_device("cpu"))
    plain, packed = layer_shapes(model.network), layer_shapes(model.quantize(global_bits=bits, local_bits=bits).network)
    for before, after in zip(plain, packed, strict=True):
        assert (after.path, after.columns, after.depth) == (before.path, before.columns, before.depth)
        assert before.format is None and before.nbytes == 4 * before.columns * before.depth
        if after.format is not None:
            assert after.format == format and after.nbytes == after.columns * after.depth * width / 8
    assert sum(shape.format is not None for shape in packed) > len(packed) / 2


def test_a_patch_passes_the_global_layers_once_and_the_local_ones_for_each_byte(each_network, counted):
    config = each_network.config
    probe = DecodingProbe(config, layer_shapes(each_network), [8, 24], CacheBits(4, 8))
    probe.run(3)
    weights = {"global": 0.0, "local": 0.0, "head": 0.0, "middle": 0.0}
    for path, layer in linear_layers(each_network).items():
        part = part_of(path)
        every = 1 if part in ("local", "head") else config.patch_size
        if part == "middle":
            every = config.bytes_per_token(1 + int(path.split(".")[1]))
        weights[part] += layer.weight.size / every
    [found] = probe.observed(24)
    for part, expected in weights.items():
        if expected:  # the rest of a part is the miniature's, well below a second
            assert found[part] == pytest.approx(expected, abs=0.5), part
    assert found["head"] == weights["head"]
    first, *finer = config.stages
    short, long = counted["attention"][:2]
    assert [each[:3] for each in (short, long)] == [
        (8 // config.patch_size, config.attention_window, [4, 8]), (24 // config.patch_size, config.attention_window, [4, 8]),
    ]  # fmt: skip
    assert found["global cache"] == first.layers * (24 // config.patch_size) / config.patch_size
    assert probe.observed(8)[0]["global cache"] == first.layers * (8 // config.patch_size) / config.patch_size
    local = sum(stage.layers * (stage.length // 2) / config.bytes_per_token(n) for n, stage in enumerate(finer, start=1))
    assert found["local cache"] == local
    assert found["overhead"] > 0 and found["sampling"] > 0


def test_the_observation_in_the_middle_is_the_prediction(random_network, small_sizes, monkeypatch):
    network = random_network(MegaByteConfig(**small_sizes))
    probe = DecodingProbe(network.config, layer_shapes(network), [16])
    for _ in range(3):
        probe.run(1)
    found = probe.seconds_by_part(16)
    assert list(found) == ["global", "global cache", "local", "local cache", "head", "sampling", "overhead"]
    assert all(seconds > 0 for seconds in found.values())
    sums = sorted(sum(parts.values()) for parts in probe.observed(16))
    assert sum(found.values()) == sums[1]


@pytest.mark.parametrize("format", ["nvfp4", "mxfp8", "int4", None])
def test_what_does_not_fit_is_scaled(format, monkeypatch):
    module = cpu.kernels()[0]
    shapes = [LayerShape("local", 64, 64, format, {"nvfp4": 16, "int4": 64}.get(format, 32)) for _ in range(8)]
    made = []

    class Module:
        Product, Kind = module.Product, module.Kind

        @staticmethod
        def ProductProbe(products):
            made.append(len(products))
            return Counting(len(products))

    monkeypatch.setattr(prediction, "LIMIT_BYTES", 3 * shapes[0].nbytes)
    assert prediction.ProductsOfLayers(Module, shapes).seconds() == 8 and made == [3]
    monkeypatch.setattr(prediction, "LIMIT_BYTES", 1)
    assert prediction.ProductsOfLayers(Module, shapes).seconds() == 8 and made == [3, 1]


def test_longer_products_and_caches_take_longer():
    module = cpu.kernels()[0]
    for format in (None, "nvfp4"):
        few, many = (
            prediction.ProductsOfLayers(module, [LayerShape("local", side, side, format, 16)] * 4) for side in (64, 1024)
        )
        assert 0 < min(few.seconds() for _ in range(5)) < min(many.seconds() for _ in range(5))
    short, long = (module.AttentionProbe(2, 4, 2, 64, rows, -1, 32, 4) for rows in (10, 4000))
    windowed = module.AttentionProbe(2, 4, 2, 64, 4000, 16, 32, 4)
    assert 0 < min(short.seconds() for _ in range(5)) < min(long.seconds() for _ in range(5))
    assert min(windowed.seconds() for _ in range(5)) < min(long.seconds() for _ in range(5))


def test_a_miniature_decodes_to_the_end_of_the_context(each_network):
    config = miniature_of(each_network.config)
    assert config.layout == each_network.config.layout and config.patch_size == each_network.config.patch_size
    probe = DecodingProbe(each_network.config, layer_shapes(each_network), [8])
    probe.run(each_network.config.max_bytes // config.patch_size)
    assert sum(probe.seconds_by_part(8).values()) > 0


def test_nothing_is_predicted_without_kernels(random_network, small_sizes, monkeypatch):
    network = random_network(MegaByteConfig(**small_sizes))
    arguments = network.config, layer_shapes(network), [8, 16], CacheBits()
    assert can_predict(network.config) and len(predicted_seconds(*arguments)) == 2
    monkeypatch.setattr(prediction, "kernels", lambda: (None, "none"))
    assert not can_predict(network.config) and predicted_seconds(*arguments) is None


def test_shapes_at_other_bits():
    shapes = [LayerShape("local", 8, 64), LayerShape("global", 8, 24), LayerShape("output", 8, 64)]
    four, eight, floats = (at_bits(shapes, bits) for bits in (4, 8, 16))
    assert [shape.format for shape in four] == ["nvfp4", None, None]
    assert [shape.format for shape in eight] == ["mxfp8", None, None]
    assert floats == shapes and four[0].group_size == 16


def test_parts_of_decoding_lie_within_the_whole(each_network):
    state = Lockstep(each_network, [b"some bytes"])
    before = state.part_seconds
    assert all(seconds >= 0 for seconds in before.values())
    for _ in decoded(state, 20):
        pass
    after = state.part_seconds
    assert ("middle" in after) == bool(each_network.config.middle)
    assert all(after[part] > before[part] for part in after), (before, after)


def test_the_graph_does_not_tell_parts_apart(random_network, small_sizes, monkeypatch):
    monkeypatch.setattr(decoding, "fuse", lambda network: None)
    state = Lockstep(random_network(MegaByteConfig(**small_sizes)), [b"some bytes"])
    assert state.part_seconds is None


@pytest.mark.parametrize(
    "network", [random_blt(), SpaceByte(SpaceByteConfig(**SIZES))], ids=lambda each: each.config.model_type
)
def test_patches_of_unequal_length_count_as_those_of_the_mean(network):
    probe = DecodingProbe(network.config, layer_shapes(network), [32])
    assert probe.unit == (4 if network.config.model_type == "blt" else network.config.patch_bytes) > 1
    probe.run(1)
    parts = probe.seconds_by_part(32)
    assert all(parts[part] > 0 for part in ("global", "window cache", "head", "overhead"))


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize(
    "network",
    [
        random_blt(),
        SpaceByte(SpaceByteConfig(**SIZES)),
        random_evabyte(),
        random_block_recurrent(),
        random_block_recurrent(**MELIAD[3]),
    ],
    ids=["blt", "spacebyte", "evabyte", "block_recurrent", "meliad"],
)
def test_what_is_decoded_by_operations_has_a_miniature_of_its_own_widths(network, bits):
    shapes = at_bits(layer_shapes(network), bits)
    probe = DecodingProbe(network.config, shapes, [24])
    probe.run(2)
    tree = probe._miniature
    for shape in shapes:
        layer = functools.reduce(
            lambda module, name: module[int(name) if name.isdigit() else name], shape.path.split("."), tree
        )
        x = mx.ones((1, 3, shape.depth))
        assert layer(x).shape == (1, 3, shape.columns)
        assert layer.layer["weight"].nbytes <= 4 * shape.columns * 16
    assert probe.seconds_by_part(24)["overhead"] > 0
