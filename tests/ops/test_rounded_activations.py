"""Packed products whose activations are rounded to 8 bits: every twin against float64, over shapes and hazards."""

import mlx.core as mx
import numpy as np
import pytest
from small_networks import FIRST_DEMO

from marlin_cli import MegaByteModel
from marlin_cli.errors import UsageError
from marlin_cli.ops import QuantizedLinear, cpu, dispatch, reference, round_activations
from marlin_cli.quantization.encoders import decode, encode
from marlin_cli.quantization.formats import FORMATS

TWINS = pytest.mark.parametrize("twin", [reference, dispatch], ids=["reference", "dispatch"])
WHOLE = pytest.mark.parametrize("format", [FORMATS[name] for name in ("nvfp4", "mxfp4", "int4", "int8")], ids=str)
# rows of x, rows of the weight, columns: along the depth up to three rows, tiles of columns beyond; ragged tails of each.
SHAPES = [
    (1, 1, 64), (1, 33, 192), (2, 5, 4096), (3, 7, 320), (4, 64, 128), (5, 31, 576), (6, 129, 256), (8, 40, 1472),
    (13, 17, 64), (16, 96, 1472), (17, 33, 320), (67, 50, 192), (530, 37, 96),
]  # fmt: skip


def random(*shape, seed=0):
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def arguments(packed):
    floats = packed.biases is not None
    scales = packed.scales.astype(mx.float32) if floats else packed.scales
    biases = packed.biases.astype(mx.float32) if floats else None
    settings = {"group_size": packed.group_size, "bits": packed.format.bits, "mode": packed.format.mode}
    return (packed.weight, scales, biases), {**settings, "activation_bits": 8}


def in_tiles(twin, format, rows):
    """Whether the twin makes bfloat16 of such activations, for tiles that multiply no others."""
    module = cpu.kernels()[0]
    return twin is dispatch and module is not None and module.takes_tiles(getattr(module.Kind, format.name), rows, 8)


def rounded(x, to_bfloat16=False):
    """As the definition says, one block after another; or the nearest bfloat16."""
    if to_bfloat16:
        return np.array(x.astype(mx.bfloat16).astype(mx.float32), dtype=np.float64)
    x = np.array(x)
    out = np.zeros(x.shape, dtype=np.float64)
    for row, values in enumerate(x):
        for start in range(0, len(values), 32):
            block = values[start : start + 32]
            largest = np.abs(block).max()
            if largest >= 2.0**-120:
                codes = np.rint(block * (np.float32(127) / largest))
                out[row, start : start + 32] = codes * np.float64(largest / np.float32(127))
    return out


def assert_product(found, x, weight, tolerance=3e-6):
    """Within float32 rounding, in the scale of each sum's terms; but a half that rounds the other way moves a code by one."""
    weight = np.array(weight, dtype=np.float64)
    exact, terms = x @ weight.T, np.abs(x) @ np.abs(weight).T
    assert found.shape == exact.shape and np.isfinite(np.array(found)).all()
    assert (np.abs(np.array(found) - exact) <= tolerance * terms + 1e-30).all()


@TWINS
@WHOLE
@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
def test_packed(twin, format, rows, columns, depth):
    x = random(rows, depth) * mx.array(np.geomspace(1e-3, 1e3, rows, dtype=np.float32))[:, None]
    packed = encode(random(columns, depth, seed=1), format)
    arrays, settings = arguments(packed)
    found = twin.packed_linear(x, *arrays, **settings)
    if twin is dispatch:
        tiles = in_tiles(twin, format, rows)
        # Affine weights are floats, of which tiles then take the nearest bfloat16.
        tolerance = 2.0**-9 if tiles and packed.biases is not None else 3e-6
        assert_product(found, rounded(x, tiles), decode(packed) / (packed.global_scale or 1.0), tolerance)
    else:  # MLX's own order of sums is looser
        expected = rounded(x) @ np.array(decode(packed) / (packed.global_scale or 1.0), dtype=np.float64).T
        assert np.abs(np.array(found) - expected).max() < 1e-4 * np.abs(expected).max() + 1e-6


@TWINS
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("depth", [16, 48, 80])
def test_a_depth_that_ends_in_half_a_block(twin, rows, depth):
    x = random(rows, depth)
    packed = encode(random(6, depth, seed=1), FORMATS["nvfp4"])
    arrays, settings = arguments(packed)
    expected = rounded(x, in_tiles(twin, packed.format, rows))
    assert_product(twin.packed_linear(x, *arrays, **settings), expected, decode(packed) / packed.global_scale)


@TWINS
@pytest.mark.parametrize("rows", [3, 40])
def test_packed_mxfp8_takes_activations_as_they_are(twin, rows):
    x, packed = random(rows, 64), encode(random(5, 64, seed=1), FORMATS["mxfp8"])
    arrays, settings = arguments(packed)
    plain = {**settings, "activation_bits": 16}
    assert mx.array_equal(twin.packed_linear(x, *arrays, **settings), twin.packed_linear(x, *arrays, **plain)).item()


@TWINS
@WHOLE
@pytest.mark.parametrize("rows", [1, 7, 50])
def test_packed_hazards(twin, format, rows):
    """Blocks of zeros and of the smallest numbers give nothing; ties go to the even code; NaN and infinity are not lost."""
    packed = encode(random(5, 64, seed=1), format)
    arrays, settings = arguments(packed)
    values = np.zeros((rows, 64), dtype=np.float32)
    values[:, 40] = 1e-39
    assert not np.array(twin.packed_linear(mx.array(values), *arrays, **settings)).any()
    values[:, :4] = [127, 0.5, 1.5, -2.5]
    expected = np.zeros((rows, 64))
    tiles = in_tiles(twin, format, rows)
    expected[:, :4] = values[:, :4] if tiles else [127, 0, 2, -2]
    found = twin.packed_linear(mx.array(values), *arrays, **settings)
    weight = np.array(decode(packed) / (packed.global_scale or 1.0), dtype=np.float64)
    rtol = 2.0**-7 if tiles and packed.biases is not None else 1e-4  # bfloat16 weights, of which some cancel
    np.testing.assert_allclose(np.array(found), expected @ weight.T, rtol=rtol, atol=1e-4)
    for poison in (np.nan, np.inf):
        values[-1, 50] = poison
        found = np.array(twin.packed_linear(mx.array(values), *arrays, **settings))
        assert not np.isfinite(found[-1]).any() and np.isfinite(found[:-1]).all()


def test_a_model_computes_the_same_with_and_without_kernels(tmp_path, monkeypatch):
    path = tmp_path / "packed"
    MegaByteModel.from_pretrained(FIRST_DEMO, device="cpu").quantize(global_bits=4, local_bits=4).save(path)
    data = bytes(range(40, 80))
    plain = MegaByteModel.from_pretrained(path, device="cpu").logits(data)
    fast = MegaByteModel.from_pretrained(path, device="cpu", activation_bits=8).logits(data)
    monkeypatch.setattr("marlin_cli.ops.dispatch.kernels", lambda: (None, "hidden"))
    slow = MegaByteModel.from_pretrained(path, device="cpu", activation_bits=8).logits(data)
    # In tiles the kernels round to bfloat16, the reference to blocks of whole numbers: each is near the exact product.
    module = cpu.kernels()[0]
    alike = module is None or not module.takes_tiles(module.Kind.nvfp4, 1 << 20, 8)
    assert mx.abs(fast - slow).max().item() < (0.05 if alike else 0.2)
    assert all(0.001 < mx.abs(logits - plain).max().item() < 0.3 for logits in (fast, slow))


def test_what_cannot_be_asked_for(monkeypatch):
    layer = QuantizedLinear({}, group_size=16, bits=4, mode="nvfp4")
    with pytest.raises(UsageError, match="--activation-bits must be 8 or 16, found 4"):
        round_activations(layer, 4)
    monkeypatch.setattr("mlx.core.default_device", lambda: mx.Device(mx.gpu))
    with pytest.raises(UsageError, match="--activation-bits 8 is for --device cpu"):
        round_activations(layer, 8)
