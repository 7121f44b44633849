"""A packed layer, or table, from the arrays of a file, which kernels read as they are told: so everything is checked here."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from marlin_cli.config import describe
from marlin_cli.errors import CheckpointError
from marlin_cli.ops import PackedTable, QuantizedLinear, Table
from marlin_cli.text import quoted

# Arrays of a packed layer, under its path.
PACKED_ARRAYS = ("weight", "scales", "biases", "bias", "global_scale")

# What is packed so that kernels run it: MLX's name of the kind and bits -> weights that may share a scale.
GROUP_SIZES = {
    ("affine", 4): (32, 64, 128),
    ("affine", 8): (32, 64, 128),
    ("mxfp4", 4): (32,),
    ("mxfp8", 8): (32,),
    ("nvfp4", 4): (16,),
}


def settings_of(path: str, table: Mapping[str, Any]) -> Any:
    """What mlx-lm's table says of the layer at `path`: its own entry, or that of all layers, for which true stands too."""
    own = table.get(path, True)
    return table if own is True else own


def packed_layer(plain: nn.Module, arrays: Mapping[str, mx.array], settings: Any, where: str) -> QuantizedLinear | PackedTable:
    """The packed layer that takes the place of `plain`.

    Args:
        arrays: those of `PACKED_ARRAYS` that the file has; scales are among them.
        settings: the layer's entry in mlx-lm's table: `group_size`, `bits`, `mode`; affine unless it says another.
        where: the file and layer that begin every error.

    Raises:
        CheckpointError: settings of no known format, or arrays of other shapes or types than they ask for.
    """
    if not isinstance(settings, Mapping) or not {"group_size", "bits"} <= settings.keys():
        found = "says nothing of it" if isinstance(settings, Mapping) and not settings else f"has {describe(settings)} for it"
        raise CheckpointError(f"{where} is packed, but the quantization table {found}; expected group_size, bits and mode")
    mode, bits, group_size = settings.get("mode", "affine"), settings["bits"], settings["group_size"]
    whole = type(bits) is int and type(group_size) is int and isinstance(mode, str)
    if not whole or group_size not in GROUP_SIZES.get((mode, bits), ()):
        found = f"{quoted(mode)} with {quoted(bits)} bits in groups of {quoted(group_size)}"
        raise CheckpointError(f"{where} is packed as {found}, which is no format")
    rows, columns = plain["weight"].shape
    affine = mode == "affine"
    shapes: dict[str, tuple[int, ...]] = {"weight": (rows, columns * bits // 32), "scales": (rows, columns // group_size)}
    if affine:
        shapes["biases"] = shapes["scales"]
    if "bias" in plain:
        shapes["bias"] = (rows,)
    scaled = not affine and "global_scale" in arrays
    for name in (name for name in arrays if name not in shapes and not (scaled and name == "global_scale")):
        raise CheckpointError(f"{where} has {name}, for which a layer packed as {mode} has no place")
    for name, shape in shapes.items():
        if name not in arrays:
            raise CheckpointError(f"{where} is packed and has no {name}")
        array = arrays[name]
        if array.shape != shape:
            raise CheckpointError(
                f"{where} has {name} of shape {list(array.shape)}; {bits} bits in groups of {group_size} ask for {list(shape)}"
            )
        wanted = mx.uint32 if name == "weight" else mx.uint8 if name == "scales" and not affine else None
        if array.dtype != wanted if wanted is not None else not mx.issubdtype(array.dtype, mx.floating):
            found = str(array.dtype).removeprefix("mlx.core.")
            raise CheckpointError(f"{where} has {name} of type {found}, which {mode} does not hold")
    if scaled and (arrays["global_scale"].size != 1 or not mx.issubdtype(arrays["global_scale"].dtype, mx.floating)):
        raise CheckpointError(f"{where} has a global_scale that is not one number")
    kind = PackedTable if isinstance(plain, Table) else QuantizedLinear
    return kind(dict(arrays), group_size=group_size, bits=bits, mode=mode)
