"""Ways to choose a layer's packed weight, by name: each one file and one pure function of the same form."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.quantization.encoders import Packed
from marlin_cli.quantization.formats import Format
from marlin_cli.quantization.methods.gptq import gptq
from marlin_cli.quantization.methods.mse import mse
from marlin_cli.quantization.methods.rtn import rtn

# (weight [rows, columns], format, group size, mean square of each input channel, mean of x^T x) -> packed weight
Method = Callable[[mx.array, Format, int, mx.array | None, npt.NDArray[np.float64] | None], Packed]

# awq and awq+gptq rescale channels first (`quantization.scaled`), over all layers that share an input, and then are mse
# and gptq; gptq alone does so with channels that stand out (`methods.outliers`), with --sequential too. gptq+hadamard
# rotates the network after that (`methods.hadamard`), and then is gptq.
METHODS: dict[str, Method] = {
    "rtn": rtn,
    "mse": mse,
    "awq": mse,
    "gptq": gptq,
    "awq+gptq": gptq,
    "gptq+hadamard": gptq,
}
RESCALING = ("awq", "awq+gptq")

# Methods that first bring channels in line which stand out.
WITHOUT_OUTLIERS = ("gptq", "gptq+hadamard")

# Methods that cannot run without x^T x.
NEED_HESSIANS = ("gptq", "awq+gptq")
NEED_STATISTICS = ("awq", "gptq", "awq+gptq")

# Methods that change what layers see, so that no statistics of the network are of use.
NEED_SEQUENTIAL = ("gptq+hadamard",)

__all__ = ["METHODS", "NEED_HESSIANS", "NEED_SEQUENTIAL", "NEED_STATISTICS", "RESCALING", "WITHOUT_OUTLIERS", "Method"]
