"""Networks beside MegaByte and ByT5 with packed layers: what a file packs is read back, and does what it stands for."""

import mlx.core as mx
import pytest
from canine_cases import random_canine, random_la_canine
from decoder_cases import random_bygpt5, random_gbst
from mlx.utils import tree_flatten

from marlin_cli.errors import CheckpointError
from marlin_cli.models import fill, linear_layers, part_of
from marlin_cli.ops import QuantizedLinear
from marlin_cli.quantization.plan import QuantizationSettings

TABLE = {"group_size": 32, "bits": 8, "mode": "mxfp8"}
IDS = mx.array([[70, 90, 100, 101, 120, 44, 35, 200]])
NETWORKS = {
    "canine": (lambda: random_canine(head="token", labels=("a", "b")), lambda network: network(IDS)),
    "la_canine": (lambda: random_la_canine(adapter_dim=32, language="cs"), lambda network: network(IDS)),
    "bygpt5": (random_bygpt5, lambda network: network(IDS)),
    "gbst": (random_gbst, lambda network: network(IDS, IDS)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_packed_layers_are_read_back(name):
    make, run = NETWORKS[name]
    network, other = make(), make()
    arrays = dict(tree_flatten(network.parameters()))
    for path in linear_layers(network):
        packed, scales = mx.quantize(arrays[f"{path}.weight"], **TABLE)
        arrays[f"{path}.scales"] = scales
        arrays[f"{path}.weight"] = packed
        rounded = mx.dequantize(packed, scales, **TABLE, dtype=mx.float32)
        other.load_weights([(f"{path}.weight", rounded)], strict=False)
    again = make()
    fill(again, arrays, TABLE, where="here")
    assert all(isinstance(layer, QuantizedLinear) for layer in linear_layers(again).values())
    assert mx.allclose(run(again), run(other), atol=1e-3)
    assert not mx.allclose(run(again), run(network), atol=1e-4)


def test_parts_of_canine():
    parts = {part_of(path) for path in linear_layers(random_canine(head="token", labels=("a", "b")))}
    assert parts == {"local", "global", "head"}
    assert part_of("local.up.conv") == "local" and part_of("layers.0.ffn.up_proj") == "global"


@pytest.mark.parametrize(
    ("bits", "formats"),
    [
        ({}, {"front.proj": "mxfp8", "encoder.layers.0.ffn.down_proj": "mxfp8", "encoder.layers.0.ffn.up_proj": "nvfp4"}),
        ({"encoder_format": "16bit"}, {"front.proj": "16bit", "decoder.layers.0.ffn.up_proj": "nvfp4"}),
        ({"wo_format": "nvfp4"}, {"front.proj": "nvfp4"}),
    ],
)
def test_the_front_of_a_gbst_is_of_its_encoder(bits, formats):
    settings = QuantizationSettings(**bits)
    assert {path: settings.format_for(path) for path in formats} == formats
    assert "front.proj" in linear_layers(random_gbst()) and part_of("front.proj") == part_of("front.score") == "encoder"


def test_a_weight_of_another_network():
    with pytest.raises(CheckpointError, match="^here: the weight .* is missing"):
        fill(random_canine(), dict(tree_flatten(random_bygpt5().parameters())), where="here")
