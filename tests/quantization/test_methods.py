"""Methods: each leaves less error of the layer's output than the one before it, on inputs that are correlated."""

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli.quantization.encoders import decode
from marlin_cli.quantization.formats import FORMATS
from marlin_cli.quantization.grids import grid_of
from marlin_cli.quantization.methods import METHODS
from marlin_cli.quantization.methods.gptq import inverse_factor, output_error

ALL = pytest.mark.parametrize("name", FORMATS)


def problem(rows: int = 48, columns: int = 256, rank: int = 24) -> tuple[np.ndarray, np.ndarray, mx.array]:
    """Weights, x^T x of inputs that lie near a few directions, and its diagonal."""
    rng = np.random.default_rng(5)
    weight = (rng.standard_normal((rows, columns)) * 0.05).astype(np.float32)
    x = rng.standard_normal((1024, rank)) @ rng.standard_normal((rank, columns)) + 0.3 * rng.standard_normal((1024, columns))
    hessian = x.T @ x / len(x)
    return weight, hessian, mx.array(np.diag(hessian).astype(np.float32))


def errors(name: str) -> dict[str, float]:
    weight, hessian, importance = problem()
    format = FORMATS[name]
    size = format.group_size_for(weight.shape[1])
    return {
        method: output_error(weight, function(mx.array(weight), format, size, importance, hessian), hessian)
        for method, function in METHODS.items()
    }


@ALL
def test_gptq_leaves_much_less_error_of_the_output(name):
    found = errors(name)
    assert found["gptq"] < (0.45 if FORMATS[name].bits == 4 else 0.65) * found["mse"]


@ALL
def test_mse_leaves_no_more_error_of_the_output_than_mlx(name):
    found = errors(name)
    assert found["mse"] < 1.01 * found["rtn"]


@ALL
def test_codes_survive_packing(name):
    weight, hessian, importance = problem(rows=5, columns=128)
    packed = METHODS["gptq"](mx.array(weight), FORMATS[name], FORMATS[name].group_size_for(128), importance, hessian)
    grid = grid_of(packed)
    scale, bias = grid.expanded()
    levels = grid.round_levels((np.array(decode(packed)) - bias) / scale)
    again = grid.pack(levels)
    assert mx.array_equal(decode(again), decode(packed)).item()


def test_the_factor_is_of_the_damped_inverse():
    _, hessian, _ = problem(columns=64)
    order, factor = inverse_factor(hessian)
    damped = hessian + 0.01 * np.diag(hessian).mean() * np.eye(64)
    np.testing.assert_allclose(factor.T @ factor, np.linalg.inv(damped[np.ix_(order, order)]), rtol=2e-3, atol=2e-4)
    assert (np.diff(np.diag(hessian)[order]) <= 0).all()


@pytest.mark.parametrize("kind", ["zero", "rank one", "dead channels", "one row"])
def test_hessians_that_are_hard(kind):
    weight, hessian, importance = problem(rows=1 if kind == "one row" else 8, columns=64)
    if kind == "zero":
        hessian = np.zeros_like(hessian)
    elif kind == "rank one":
        hessian = np.outer(hessian[0], hessian[0])
    elif kind == "dead channels":
        hessian[10:20] = hessian[:, 10:20] = 0
    importance = mx.array(np.diag(hessian).astype(np.float32))
    format = FORMATS["nvfp4"]
    plain = METHODS["mse"](mx.array(weight), format, 16, importance)
    packed = METHODS["gptq"](mx.array(weight), format, 16, importance, hessian)
    assert np.isfinite(np.array(decode(packed))).all()
    assert output_error(weight, packed, hessian) <= output_error(weight, plain, hessian)


def test_two_runs_give_the_same_bytes():
    weight, hessian, importance = problem()
    one, two = (METHODS["gptq"](mx.array(weight), FORMATS["nvfp4"], 16, importance, hessian) for _ in range(2))
    assert mx.array_equal(one.weight, two.weight).item() and mx.array_equal(one.scales, two.scales).item()
