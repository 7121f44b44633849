"""Seconds of GPTQ on one square layer, and the output error it leaves beside nearest rounding and the scale sweep.

    python benchmarks/gptq_time.py [--columns 4096] [--formats nvfp4,mxfp4,int4]

Weights are normal; the Hessian is of inputs with outlier channels and shared directions, twice as many rows as columns.
"""

import argparse
import time

import mlx.core as mx
import numpy as np

from marlin_cli.bench.machine import describe_machine
from marlin_cli.ops.device import choose_device
from marlin_cli.quantization.formats import FORMATS
from marlin_cli.quantization.methods import METHODS
from marlin_cli.quantization.methods.gptq import output_error


def inputs_hessian(columns: int, generator: np.random.Generator) -> np.ndarray:
    """Mean of x^T x of inputs with log-normal channel sizes and 64 directions in common."""
    rows = 2 * columns
    x = generator.standard_normal((rows, columns), dtype=np.float32)
    x += (
        generator.standard_normal((rows, 64), dtype=np.float32) @ generator.standard_normal((64, columns), dtype=np.float32) / 8
    )
    x *= np.exp(generator.standard_normal(columns, dtype=np.float32))
    return (x.T @ x / rows).astype(np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--formats", default="nvfp4,mxfp4,int4")
    arguments = parser.parse_args()
    generator = np.random.default_rng(0)
    hessian = inputs_hessian(arguments.columns, generator)
    original = generator.standard_normal((arguments.columns, arguments.columns), dtype=np.float32)
    weight = mx.array(original)
    print(describe_machine(choose_device()))
    for name in arguments.formats.split(","):
        format = FORMATS[name]
        group_size = format.group_size_for(arguments.columns)
        errors, seconds = {}, {}
        for method in ("rtn", "mse", "gptq"):
            start = time.perf_counter()
            packed = METHODS[method](weight, format, group_size, mx.array(np.diag(hessian).astype(np.float32)), hessian)
            mx.eval(packed.weight)
            seconds[method] = time.perf_counter() - start
            errors[method] = output_error(original, packed, hessian)
        shares = ", ".join(f"{method} {errors[method] / errors['rtn']:.3f}" for method in errors)
        print(f"{name}: {seconds['gptq']:.1f} s ({seconds['mse']:.1f} s the scales alone); output error over rtn's: {shares}")


if __name__ == "__main__":
    main()
