"""Activations: both twins against float64, at every size, and where nothing is to be had of them."""

import math

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli.ops import dispatch, reference

KINDS = ["gelu", "gelu_tanh", "relu", "silu"]
TWINS = ["reference", "dispatch"]
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
EACH_TWIN = pytest.mark.parametrize("twin", [reference, dispatch], ids=TWINS)

erf = np.vectorize(math.erf)


def exact(x, kind):
    x = x.astype(np.float64)
    with np.errstate(over="ignore"):  # of e^x, where the quotient is 0
        return {
            "gelu": lambda: x * (1 + erf(x / math.sqrt(2))) / 2,
            "gelu_tanh": lambda: x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
            "relu": lambda: np.maximum(x, 0),
            "silu": lambda: x / (1 + np.exp(-x)),
        }[kind]()


@EACH_TWIN
@EACH_KIND
def test_equals_the_exact_function(kind, twin):
    large = np.geomspace(1e-30, 1e30, 61)
    x = np.concatenate([np.linspace(-12, 12, 20_001), large, -large[large < 1e4]]).astype(np.float32)
    error = np.abs(np.array(twin.activation(mx.array(x), kind)) - exact(x, kind))
    assert (error <= 1e-6 + 1e-6 * np.abs(x)).all()
    assert error[np.abs(x) <= 8].max() < 1e-6


@EACH_TWIN
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 341), (1, 16), (4, 1025), (0, 8)])
def test_every_value_of_any_shape(twin, shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = twin.activation(mx.array(x), "gelu")
    assert found.shape == shape
    assert np.allclose(np.array(found), exact(x, "gelu") if x.size else x, atol=1e-6)


@EACH_KIND
def test_rows_that_stand_apart(kind):
    x = mx.random.normal((6, 64), key=mx.random.key(0))
    columns = x[:, ::3]
    assert mx.allclose(dispatch.activation(columns, kind), reference.activation(mx.array(np.array(columns)), kind), atol=1e-6)


@EACH_KIND
def test_what_is_no_number_stays_none(kind):
    found = np.array(dispatch.activation(mx.array([1.0, math.nan, math.inf]), kind))
    assert np.isnan(found).tolist() == [False, True, False]
    assert found[2] == math.inf


@EACH_KIND
def test_gradients_are_those_of_the_reference(kind):
    x = mx.random.normal((3, 37), key=mx.random.key(1))
    squares = [lambda rows, twin=twin: (twin.activation(rows, kind) ** 2).sum() for twin in (dispatch, reference)]
    found, expected = (mx.grad(function)(x) for function in squares)
    assert mx.allclose(found, expected, atol=1e-5)
    assert mx.abs(expected).max() > 0.1


def test_half_precision_stays_with_mlx():
    assert dispatch.activation(mx.ones((2, 2), dtype=mx.bfloat16), "gelu").dtype == mx.bfloat16
