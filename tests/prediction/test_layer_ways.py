"""The ways of a model's layers: one line a shape and format, each with what the kernels choose."""

import pytest

from marlin_cli.models.megabyte import MegaByteConfig
from marlin_cli.ops import cpu
from marlin_cli.prediction.bandwidth import Bandwidth
from marlin_cli.prediction.layer_ways import ROWS, layer_ways
from marlin_cli.prediction.prediction import layer_shapes
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.plan import QuantizationSettings

pytestmark = pytest.mark.skipif(cpu.kernels()[0] is None, reason=f"no CPU kernels here: {cpu.kernels()[1]}")


def test_layers_by_shape_and_format(random_network, small_sizes):
    network = random_network(MegaByteConfig(**{**small_sizes, "global_dim": 64, "local_dim": 64}))
    shapes = layer_shapes(quantize_network(network, QuantizationSettings()).network)
    found = layer_ways(shapes, Bandwidth(copy=1e9, matvec=1e9))
    assert sum(each.layers for each in found) == len(shapes)
    assert len({(each.shape.columns, each.shape.depth, each.shape.format) for each in found}) == len(found)
    module = cpu.kernels()[0]
    for each in found:
        assert len(each.ways) == len(ROWS) and each.bytes_a_second > 0 and each.share == each.bytes_a_second / 1e9
        if each.shape.format is None:
            assert set(each.ways) == {"dense"}
        else:
            assert set(each.ways) <= set(module.way_names(getattr(module.Kind, each.shape.format), 16))
