"""Encoders: MLX reads our bytes as we mean them, and they never leave more error than MLX's own."""

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli.errors import QuantizationError
from marlin_cli.quantization.encoders import (
    decode,
    encode,
    mlx_encode,
    pack_codes,
    relative_error,
    round_e2m1,
    squared_error,
)
from marlin_cli.quantization.formats import FORMATS, default_format, format_of

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
EACH = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())


def weights(kind: str, rows: int = 64, columns: int = 256, std: float = 0.02) -> mx.array:
    rng = np.random.default_rng(7)
    values = {
        "gaussian": lambda: rng.standard_normal((rows, columns)),
        "heavy tails": lambda: rng.standard_t(3, (rows, columns)),
        "uniform": lambda: rng.uniform(-1, 1, (rows, columns)),
        "sparse": lambda: rng.standard_normal((rows, columns)) * (rng.random((rows, columns)) < 0.1),
        "one huge channel": lambda: rng.standard_normal((rows, columns)) * np.where(np.arange(columns) == 3, 100, 1),
        "not centred": lambda: rng.standard_normal((rows, columns)) + 5,
    }[kind]()
    return mx.array((values * std).astype(np.float32))


@EACH
@pytest.mark.parametrize("kind", ["gaussian", "heavy tails", "uniform", "sparse", "one huge channel", "not centred"])
@pytest.mark.parametrize("std", [1.0, 0.02, 1e-3])
def test_no_more_error_than_mlx_leaves(format, kind, std):
    weight = weights(kind, std=std)
    packed = encode(weight, format)
    assert squared_error(weight, packed) <= squared_error(weight, mlx_encode(weight, format, packed.group_size)) * 1.0001


@pytest.mark.parametrize(("name", "share"), [("nvfp4", 0.85), ("mxfp4", 0.96), ("int4", 0.95), ("int8", 0.97)])
def test_less_error_than_mlx_leaves_on_common_weights(name, share):
    weight = weights("gaussian")
    packed = encode(weight, FORMATS[name])
    assert relative_error(weight, packed) < share * relative_error(weight, mlx_encode(weight, FORMATS[name], packed.group_size))


@pytest.mark.parametrize("std", [1e6, 1.0, 0.02, 1e-3, 1e-6, 1e-15])
def test_nvfp4_is_as_exact_for_weights_of_any_size(std):
    assert 0.080 < relative_error(weights("gaussian", std=std), encode(weights("gaussian", std=std), FORMATS["nvfp4"])) < 0.083


@EACH
@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (3, 64), (5, 192), (7, 320), (257, 128)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_mlx_multiplies_by_what_we_decode(format, rows, columns, dtype):
    weight = weights("gaussian", rows, columns).astype(dtype)
    packed = encode(weight, format)
    x = mx.random.normal((3, columns), key=mx.random.key(1))
    product = mx.quantized_matmul(
        x, packed.weight, packed.scales.astype(mx.float32) if packed.biases is not None else packed.scales,
        None if packed.biases is None else packed.biases.astype(mx.float32),
        group_size=packed.group_size, bits=format.bits, mode=format.mode,
    )  # fmt: skip
    product = product * (packed.global_scale or 1.0)
    expected = x @ decode(packed).T
    assert mx.abs(product - expected).max().item() < 2e-5 * mx.abs(expected).max().item() + 1e-12


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_an_odd_number_of_groups(rows):
    weight = weights("gaussian", rows, 48)
    ours, theirs = encode(weight, FORMATS["nvfp4"]), mlx_encode(weight, FORMATS["nvfp4"], 16)
    assert decode(ours).shape == decode(theirs).shape == (rows, 48)
    assert relative_error(weight, ours) < relative_error(weight, theirs) < 0.15


@EACH
def test_one_group_and_awkward_values(format):
    size = format.group_sizes[-1] if format.mode == "affine" else format.group_sizes[0]
    for values in (np.zeros(size), np.full(size, 0.5), np.arange(size) - 5.0, np.eye(1, size)[0] * 1e-3):
        weight = mx.array(values[None].astype(np.float32))
        decoded = np.array(decode(encode(weight, format, size)))
        assert np.isfinite(decoded).all()
        assert np.abs(decoded - values).max() <= 0.2 * np.abs(values).max()


@EACH
def test_importance_moves_the_error_to_where_it_matters_least(format):
    weight = weights("heavy tails", rows=128)
    importance = mx.array(np.random.default_rng(2).gamma(0.2, size=256).astype(np.float32))
    plain, weighted = encode(weight, format), encode(weight, format, importance=importance)
    before, after = (squared_error(weight, packed, importance) for packed in (plain, weighted))
    assert after <= before
    if format.bits == 4:
        assert after < 0.97 * before


@EACH
def test_equal_weights_give_equal_bytes(format):
    first, second = (encode(weights("gaussian"), format) for _ in range(2))
    for name in ("weight", "scales"):
        assert mx.array_equal(getattr(first, name), getattr(second, name))


@EACH
def test_chunks_change_nothing(format, monkeypatch):
    weight = weights("gaussian", rows=37)
    whole = encode(weight, format)
    monkeypatch.setattr("marlin_cli.quantization.encoders.CHUNK_WEIGHTS", 256 * 5)
    pieces = encode(weight, format)
    assert mx.array_equal(whole.weight, pieces.weight) and mx.array_equal(whole.scales, pieces.scales)


@EACH
def test_a_decoded_weight_packs_to_itself(format):
    decoded = decode(encode(weights("gaussian"), format))
    assert relative_error(decoded, encode(decoded, format)) < (1e-6 if format.mode != "affine" else 1e-2)


@EACH
def test_sizes_are_as_the_format_says(format):
    packed = encode(weights("gaussian").astype(mx.bfloat16), format)
    extra = 4 if packed.global_scale is not None else 0
    assert packed.nbytes - extra == 64 * 256 * format.bits_per_weight(packed.group_size) / 8


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(bad):
    weight = np.zeros((2, 64), dtype=np.float32)
    weight[1, 3] = bad
    with pytest.raises(QuantizationError, match="NaN or infinite"):
        encode(mx.array(weight), FORMATS["nvfp4"])


def test_columns_that_no_group_divides_are_refused():
    with pytest.raises(QuantizationError, match="24 columns"):
        encode(mx.zeros((2, 24)), FORMATS["mxfp4"])
    assert FORMATS["int4"].group_size_for(96) == 32 and FORMATS["nvfp4"].group_size_for(8) is None


def test_e2m1_rounds_to_the_nearest_and_ties_to_even():
    values = np.concatenate([np.linspace(0, 7, 1401), (E2M1[1:] + E2M1[:-1]) / 2]).astype(np.float32)
    distance = np.abs(values[:, None] - E2M1)
    tied = distance == distance.min(axis=1, keepdims=True)
    even = np.where(tied & (np.arange(8) % 2 == 0), 1, 0)
    index = np.where(tied.sum(axis=1) > 1, even.argmax(axis=1), distance.argmin(axis=1))
    assert np.array_equal(np.array(round_e2m1(mx.array(values))), E2M1[index])


def test_the_first_weight_lies_in_the_lowest_bits():
    assert pack_codes(mx.arange(8)[None], 4).item() == 0x76543210
    assert pack_codes(mx.arange(4)[None], 8).item() == 0x03020100


def test_formats_by_width_and_by_mlx_name():
    assert (default_format(4).name, default_format(8).name) == ("nvfp4", "mxfp8")
    assert all(format_of(each.mode, each.bits) is each for each in FORMATS.values())
    with pytest.raises(QuantizationError, match="3-bit affine"):
        format_of("affine", 3)
