"""ByT5's step by the Metal kernels, on the emulator: the logits of decoding by operations, and the launches."""

from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from byt5_cases import random_byt5

from marlin_cli.engine import encoder_decoder
from marlin_cli.engine.encoder_decoder import AnswerState
from marlin_cli.ops import dispatch
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.plan import QuantizationSettings

pytestmark = pytest.mark.metal

PACKED = QuantizationSettings(encoder_format="nvfp4", decoder_format="nvfp4", cross_format="mxfp8")


def logits(network, bits, steps):
    state = AnswerState(network, [[5, 9, 1], [7, 1]], memory_bits=bits)
    found = [state.logits]
    for number in range(steps):
        state.push(mx.array([30 + number, 90]))
        found.append(state.logits)
    return mx.stack(found)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_logits(emulated, monkeypatch, bits, packed):
    network = random_byt5(decoder_layers=1, gated_ffn=not packed)
    network = quantize_network(network, PACKED).network if packed else network
    monkeypatch.setattr(encoder_decoder, "fuse_byt5", lambda network: None)
    expected = np.array(logits(network, bits, 17))
    for module in (dispatch, encoder_decoder):
        monkeypatch.setattr(module, "gpu", lambda: "metal")
    monkeypatch.setattr(mx, "compile", lambda function: function)
    found = emulated(lambda: logits(network, bits, 17))
    assert np.abs(np.array(found.result) - expected).max() < 3e-5 * np.abs(expected).max()
    # A step: the input encoded once, and as much memory made of it.
    steps = 18
    step = {
        "norm_projections": 1, "cache_attention": 1, "flash_attention_cross_asymmetric": 1, "joined_linear": 2,
        "norm_linear": 2 + 1, "norm_feed_forward": 1,
    }  # fmt: skip
    launched = Counter(found.launched)
    assert {name: launched[name] for name in step} == {name: steps * count for name, count in step.items()}
