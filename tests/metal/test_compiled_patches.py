"""Whole patches by the Metal kernels of a step, on the emulator: the bytes of decoding by operations, and the launches."""

from collections import Counter

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli.engine import decoding, whole_patches
from marlin_cli.engine.generation import generate
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.stopping import Stopping
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops import dispatch
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.plan import QuantizationSettings

pytestmark = pytest.mark.metal

SIZES = {
    "patch_size": 4, "max_bytes": 96,
    "global_layers": 2, "global_dim": 64, "global_heads": 2,
    "local_layers": 1, "local_dim": 32, "local_heads": 2,
}  # fmt: skip
SHAPES = {
    "prefix": ({}, "nvfp4", {}),
    "dense": ({"ffn": "gelu_tanh", "norm": "layernorm"}, "dense", {}),
    "window": ({"attention_window": 3, "global_kv_heads": 1, "ffn_bias": True}, "int8", {}),
    "drawn": ({"local_positions": "rope"}, "mxfp4", {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01}),
}


def small_network(make, changes, format):
    network = make(MegaByteConfig(**{**SIZES, **changes}))
    if format == "dense":
        return network
    return quantize_network(network, QuantizationSettings(global_format=format, local_format=format)).network


def generated(network, prompts, sampling, count):
    streams = [b""] * len(prompts)
    for piece in generate(network, prompts, Stopping(count, ()), sampling, None):
        streams[piece.stream] += piece.data
    return streams


@pytest.fixture
def on_metal(monkeypatch):
    """Metal is the device, for all who ask; not compiled, as the emulator runs kernels when they are called."""
    monkeypatch.setattr(dispatch, "gpu", lambda: "metal")
    monkeypatch.setattr(whole_patches, "gpu", lambda: "metal")
    monkeypatch.setattr(decoding, "fuse", lambda network: None)
    monkeypatch.setattr(mx, "compile", lambda function: function)


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "format", "drawing"), SHAPES.values(), ids=SHAPES.keys())
def test_bytes(emulated, random_network, on_metal, monkeypatch, changes, format, drawing):
    network, sampling = small_network(random_network, changes, format), Sampling(**drawing)
    prompts = [bytes(np.random.default_rng(seed).integers(0, 256, 3 + 4 * seed, dtype=np.uint8)) for seed in range(2)]
    found = emulated(lambda: mx.array(list(b"".join(generated(network, prompts, sampling, 16)))))
    assert {"norm_projections", "tail_attention_linear", "cache_attention", "joined_linear"} < set(found.launched)
    monkeypatch.setattr(dispatch, "gpu", lambda: None)
    monkeypatch.setattr(whole_patches, "gpu", lambda: None)
    assert bytes(found.result.tolist()) == b"".join(generated(network, prompts, sampling, 16))


def test_launches_of_a_patch(emulated, random_network, on_metal):
    """Four a layer and two a byte in a patch; five a layer in the global step, and one after it."""
    network = small_network(random_network, {}, "nvfp4")
    decoder = whole_patches.patch_decoder(network, 1)
    function = decoder._patch_function(Sampling(), more=True)
    counts, storage = mx.array([3, 0], dtype=mx.int32), [(mx.zeros((1, 2, 8, 32)), mx.zeros((1, 2, 8, 32)))] * 2
    empty = decoder._empty_global
    found = emulated(lambda: function(mx.zeros((1, 1, 32)), counts, None, None, None, storage, empty))
    assert Counter(found.launched) == {
        "norm_projections": 4 * 1 + 2,
        "tail_attention_linear": 4 * 1,
        "norm_feed_forward": 4 * 1 + 2,
        "norm_linear": 4 * (1 + 1) + 2 + 1,
        "draw_embed": 4,
        "cache_attention": 2,
        "joined_linear": 2,
        "patch_embed": 1,
    }
