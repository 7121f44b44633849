"""What a model says of itself in a Python shell."""

from marlin_cli.api import ContinuingModel
from marlin_cli.ops.device import choose_device
from tests.small_networks import CONTINUING, random_weights


def test_a_model_says_what_it_is():
    model = ContinuingModel(random_weights(CONTINUING["megabyte"]), choose_device("cpu"))
    assert repr(model) == "<ContinuingModel: MegaByte, not packed, on cpu>"
    packed = model.quantize(4, 8)
    assert repr(packed) == "<ContinuingModel: MegaByte, packed ({'global': 'nvfp4', 'local': 'mxfp8'}), on cpu>"
