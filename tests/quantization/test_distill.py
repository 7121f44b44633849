"""Distillation: a packed copy ends nearer to the original on bytes it was not tuned on, in the same format and size."""

import dataclasses

import byt5_cases
import mlx.core as mx
import numpy as np
import pytest

from marlin_cli.errors import QuantizationError
from marlin_cli.models import linear_layers
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops import Linear, QuantizedLinear
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.distill import DistillSettings, differentiable_linear, distill, settings_for
from marlin_cli.quantization.encoders import decode
from marlin_cli.quantization.layers import packed_of
from marlin_cli.quantization.plan import QuantizationSettings

STEPS = 25
CONFIG = MegaByteConfig(
    patch_size=4,
    max_bytes=96,
    global_layers=1,
    global_dim=32,
    global_heads=2,
    local_layers=1,
    local_dim=32,
    local_heads=2,
    global_ffn_dim=64,
    local_ffn_dim=64,
)


def batches(seed: int, count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, 2, 32), dtype=np.uint8))


def divergence(network, other) -> float:
    """Mean KL divergence in nats over bytes no other test sees."""
    total = 0.0
    for windows in batches(99, 4):
        ids = mx.array(windows.astype(np.int32))
        p, q = (a - mx.logsumexp(a, axis=-1, keepdims=True) for a in (network(ids), other(ids)))
        total += (mx.exp(p) * (p - q)).sum(axis=-1).mean().item()
    return total / 4


@pytest.mark.parametrize(("name", "share"), [("nvfp4", 0.85), ("mxfp4", 0.85), ("int4", 0.85)])
def test_the_divergence_falls_and_the_size_stays(name, share, random_network):
    network = random_network(CONFIG)
    packed = quantize_network(network, QuantizationSettings(name, name)).network
    seen = []
    tuned = distill(
        network,
        packed,
        batches(1, STEPS),
        DistillSettings(0.03, 1e-3, steps=STEPS, parts=None),
        on_step=lambda step, value: seen.append(value),
    )
    assert len(seen) == STEPS
    assert divergence(network, tuned) < share * divergence(network, packed)
    before, after = linear_layers(packed), linear_layers(tuned)
    for path, module in before.items():
        if isinstance(module, QuantizedLinear):
            one, two = packed_of(module), packed_of(after[path])
            assert (one.format, one.group_size, one.nbytes) == (two.format, two.group_size, two.nbytes)
            assert (one.scales.dtype, one.weight.dtype) == (two.scales.dtype, two.weight.dtype)


@pytest.mark.parametrize("step", [1, 3])
def test_a_divergence_that_is_not_finite_ends_it_at_once(step, random_network):
    network = random_network(CONFIG)
    packed = quantize_network(network, QuantizationSettings("nvfp4", "nvfp4")).network
    seen = []

    def stepped(number, value):
        seen.append(value)
        if number == step - 2:
            network.output.weight = network.output.weight * mx.nan

    if step == 1:
        network.output.weight = network.output.weight * mx.nan
    with pytest.raises(QuantizationError, match=f"at step {step} of 9 the divergence of the tuned network is not finite"):
        distill(network, packed, batches(1, 9), DistillSettings(steps=9), on_step=stepped)
    assert np.isfinite(seen).all()


def test_a_last_step_into_nothing_is_noticed(random_network):
    network = random_network(CONFIG)
    packed = quantize_network(network, QuantizationSettings("int4", "int4")).network
    with pytest.raises(QuantizationError, match="the last step of 1 made it not finite"):
        distill(network, packed, batches(1, 1), DistillSettings(steps=1, scale_rate=1e38, free_rate=1e38))


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8", "int4", "int8"])
def test_no_steps_change_nothing(name, random_network):
    network = random_network(CONFIG)
    packed = quantize_network(network, QuantizationSettings(name, name)).network
    same = distill(network, packed, [])
    for path, module in linear_layers(packed).items():
        if isinstance(module, QuantizedLinear):
            one, two = packed_of(module), packed_of(linear_layers(same)[path])
            assert mx.array_equal(one.scales, two.scales).item(), path
            assert mx.array_equal(decode(one), decode(two)).item(), path  # a zero may lose its sign


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "int4"])
def test_a_byt5_answers_more_nearly_as_it_did(name):
    network = byt5_cases.random_byt5()
    formats = QuantizationSettings(encoder_format=name, decoder_format=name, cross_format=name, wo_format=name)
    packed = quantize_network(network, formats).network
    batches = [batch for seed in range(12) for _, batch in byt5_cases.batches(seed, network, 16)]
    seen = []
    tuned = distill(
        network,
        packed,
        batches,
        DistillSettings(0.003, 1e-4, 1e-4, steps=20, parts=None),
        on_step=lambda step, value: seen.append(value),
    )
    assert len(seen) == 20
    assert byt5_cases.divergence(network, tuned, 99) < 0.75 * byt5_cases.divergence(network, packed, 99)
    one, two = (linear_layers(each) for each in (packed, tuned))
    assert all(packed_of(one[path]).nbytes == packed_of(two[path]).nbytes for path in one if path != "output")


def test_filler_is_not_tuned_on():
    """The divergence of a padded batch is that of its pairs, whatever the rows behind an answer's end predict."""
    network = byt5_cases.random_byt5()
    packed = quantize_network(network, QuantizationSettings()).network
    (_, batch), *_ = byt5_cases.batches(1, network)
    filler = mx.full((batch.target.shape[0], 30), 77, dtype=batch.target.dtype)
    longer = dataclasses.replace(batch, target=mx.concatenate([batch.target, filler], axis=1))
    seen = []
    for each in (batch, longer):
        distill(network, packed, [each], settings_for(network, 1), on_step=lambda step, value: seen.append(value))
    assert seen[0] == pytest.approx(seen[1], rel=1e-3) and seen[0] > 0


def test_a_model_that_is_not_packed(random_network):
    network = random_network(CONFIG)
    with pytest.raises(QuantizationError, match="nothing to tune"):
        distill(network, network, [])
    assert all(isinstance(module, Linear) for module in linear_layers(network).values())


def test_the_gradient_of_a_product():
    x, weight = mx.random.normal((2, 3, 8), key=mx.random.key(0)), mx.random.normal((5, 8), key=mx.random.key(1))
    toll = mx.random.normal((2, 3, 5), key=mx.random.key(2))
    found = mx.grad(lambda a, b: (differentiable_linear(a, b) * toll).sum(), argnums=(0, 1))(x, weight)
    expected = mx.grad(lambda a, b: ((a @ b.T) * toll).sum(), argnums=(0, 1))(x, weight)
    for one, two in zip(found, expected, strict=True):
        assert mx.allclose(one, two, rtol=1e-4, atol=1e-5).item()


def test_steps_are_shorter_for_a_byt5(random_network):
    plain, short = settings_for(random_network(CONFIG), 7), settings_for(byt5_cases.random_byt5(), 7)
    assert plain == DistillSettings(steps=7) and short.steps == 7
    assert short.level_rate < plain.level_rate and short.free_rate < plain.free_rate
    assert short.parts is None  # most of what packing costs is lost in the encoder
