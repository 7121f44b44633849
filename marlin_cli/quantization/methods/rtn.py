"""Round to nearest under the scales that MLX itself would take: the baseline."""

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.quantization.encoders import Packed, mlx_encode
from marlin_cli.quantization.formats import Format


def rtn(
    weight: mx.array,
    format: Format,
    group_size: int,
    importance: mx.array | None = None,
    hessian: npt.NDArray[np.float64] | None = None,
) -> Packed:
    """`mx.quantize` of `weight` [rows, columns]; statistics change nothing."""
    return mlx_encode(weight, format, group_size)
