"""Any network with its linear layers packed, by nearest values and without a plan."""

import mlx.core as mx

from marlin_cli.models.layers import linear_layers, set_modules
from marlin_cli.ops import QuantizedLinear, round_activations
from marlin_cli.quantization.encoders import encode
from marlin_cli.quantization.formats import FORMATS


def packed(network, format, activation_bits=16):
    """The network with every linear layer in a format."""
    layers = []
    for path, layer in linear_layers(network).items():
        found = encode(layer.weight, FORMATS[format])
        arrays = {"weight": found.weight, "scales": found.scales}
        if "bias" in layer:
            arrays["bias"] = layer.bias
        if found.biases is not None:
            arrays["biases"] = found.biases
        if found.global_scale is not None:
            arrays["global_scale"] = mx.array(found.global_scale)
        settings = {"group_size": found.group_size, "bits": found.format.bits, "mode": found.format.mode}
        layers.append((path, QuantizedLinear(arrays, **settings)))
    set_modules(network, layers)
    round_activations(network, activation_bits)
    return network
