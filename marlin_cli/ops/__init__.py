"""Operations of the engine. `reference` defines each one in plain MLX; faster twins stand beside it."""

from marlin_cli.ops.quantized import QuantizedLinear
from marlin_cli.ops.reference import attention, delay_one_row

__all__ = ["QuantizedLinear", "attention", "delay_one_row"]
