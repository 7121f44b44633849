"""Operations of the engine. `reference` defines each one in plain MLX; faster twins stand beside it."""

from marlin_cli.ops.layers import Linear, QuantizedLinear
from marlin_cli.ops.reference import attention, delay_one_row

__all__ = ["Linear", "QuantizedLinear", "attention", "delay_one_row"]
