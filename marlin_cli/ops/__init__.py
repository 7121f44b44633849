"""Operations of the engine. `reference` defines each one in plain MLX; faster twins stand beside it."""

from marlin_cli.ops.dispatch import activation, attention, paged_attention, patch_embed, strided_pool
from marlin_cli.ops.layers import Linear, QuantizedLinear, round_activations
from marlin_cli.ops.reference import delay_one_row
from marlin_cli.ops.tables import PackedTable, Table

__all__ = [
    "Linear",
    "PackedTable",
    "QuantizedLinear",
    "Table",
    "activation",
    "attention",
    "delay_one_row",
    "paged_attention",
    "patch_embed",
    "round_activations",
    "strided_pool",
]
