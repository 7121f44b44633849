"""The scales of least squared error, weighted by the mean square of each input channel where it is known."""

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.quantization.encoders import Packed, encode
from marlin_cli.quantization.formats import Format


def mse(
    weight: mx.array,
    format: Format,
    group_size: int,
    importance: mx.array | None = None,
    hessian: npt.NDArray[np.float64] | None = None,
) -> Packed:
    """Sweep the scales of every group of `weight` [rows, columns]; see `encode`."""
    return encode(weight, format, group_size, importance)
