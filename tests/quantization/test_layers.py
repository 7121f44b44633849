"""Reports of packed layers: a number that is none is refused with the layer's name."""

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli.errors import QuantizationError
from marlin_cli.quantization.encoders import encode
from marlin_cli.quantization.formats import FORMATS
from marlin_cli.quantization.layers import report_of
from marlin_cli.quantization.plan import LayerPlan


def planned(name: str) -> LayerPlan:
    return LayerPlan("global.layers.0.ffn.up_proj", "global", 4, 64, FORMATS[name], FORMATS[name].group_size_for(64))


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "int4"])
def test_weights_whose_squares_are_beyond_float32(name: str) -> None:
    weight = mx.random.normal((4, 64)) * 1e25
    with pytest.raises(QuantizationError, match=f"'global.layers.0.ffn.up_proj': as {name} its error is not finite"):
        report_of(weight, encode(weight, FORMATS[name]), planned(name), None)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inputs_that_are_not_finite(value: float) -> None:
    weight = mx.random.normal((4, 64))
    hessian = np.eye(64)
    hessian[3, 3] = value
    with pytest.raises(QuantizationError, match="its error is not finite"):
        report_of(weight, encode(weight, FORMATS["nvfp4"]), planned("nvfp4"), hessian)


def test_scales_that_are_not_finite() -> None:
    weight = mx.random.normal((4, 64))
    packed = encode(weight, FORMATS["int4"])
    packed.scales[0, 0] = mx.inf
    with pytest.raises(QuantizationError, match="its error is not finite"):
        report_of(weight, packed, planned("int4"), None)
