"""Layers that llm-compressor or ModelOpt packed as nvfp4, under MLX's names, and MLX's under llm-compressor's.

Codes and scales are the same bytes in all three: E2M1 with the first weight in the low half of a byte, and an E4M3 scale
for each 16. They differ in names and in the scale of the whole tensor: compressed-tensors divides by
`weight_global_scale`, ModelOpt multiplies by `weight_scale_2`, marlin multiplies by `global_scale`. So nothing is
decoded, and all that may be lost is the last bit of a reciprocal in float32.
Scales of inputs are left out: marlin computes in 16 bits or more.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from marlin_cli.documents import read_json
from marlin_cli.errors import CheckpointError
from marlin_cli.text import quoted

GROUP_SIZE = 16

# MLX's table of config.json.
TABLE = {"group_size": GROUP_SIZE, "bits": 4, "mode": "nvfp4"}

COMPRESSED_TENSORS, MODELOPT = "compressed-tensors", "modelopt"
FORMAT = "nvfp4-pack-quantized"  # compressed-tensors' name of it

# ModelOpt's own file beside config.json, which older versions write instead of a table in it.
MODELOPT_CONFIG = "hf_quant_config.json"

# Formats of a table that an error names.
MOST_FORMATS = 4

# Ends of names that say how inputs or caches were packed.
ACTIVATIONS = (".input_global_scale", ".input_scale", ".k_scale", ".v_scale")


def packing_of(document: Mapping[str, Any], folder: Path) -> str | None:
    """Which tool packed the model as nvfp4, by config.json and what lies beside it; None where no tool says so.

    Raises:
        CheckpointError: another packing, which marlin does not read.
    """
    table = document.get("quantization_config")
    if not isinstance(table, Mapping) and (folder / MODELOPT_CONFIG).is_file():
        beside = read_json(folder / MODELOPT_CONFIG, CheckpointError)
        inner = beside.get("quantization") if isinstance(beside, dict) else None
        if not isinstance(inner, dict):
            raise CheckpointError(f"{folder / MODELOPT_CONFIG}: has no table 'quantization'")
        table = {**inner, "quant_method": MODELOPT}
    if not isinstance(table, Mapping) or "quant_method" not in table:
        return None
    method = table["quant_method"]
    if method == COMPRESSED_TENSORS:
        found = _formats(table)
        if found == [FORMAT]:
            return COMPRESSED_TENSORS
    else:
        found = [table.get("quant_algo")]
        if method == MODELOPT and found == ["NVFP4"]:
            return MODELOPT
    named = "" if found == [None] else f" as {', '.join(map(quoted, found))}"
    raise CheckpointError(
        f"{folder}: packed by {quoted(method)}{named}; marlin reads {FORMAT} of {COMPRESSED_TENSORS}, NVFP4"
        f" of {MODELOPT}, and MLX's packing; take the model as it was before"
    )


def _formats(table: Mapping[str, Any]) -> list[Any]:
    """Formats of all groups, each once; a group without one has that of the table."""
    whole, groups = table.get("format"), table.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        return [whole]
    found: list[Any] = []
    for group in groups.values():
        each = (group.get("format") if isinstance(group, Mapping) else None) or whole
        each = each if isinstance(each, str) else quoted(each)
        if each not in found and len(found) < MOST_FORMATS:
            found.append(each)
    return found


def under_mlx_names(tensors: Mapping[str, mx.array], packing: str, where: Path) -> dict[str, mx.array]:
    """The tensors with `.weight`, `.scales` and `.global_scale` for each packed layer, and without scales of inputs.

    Raises:
        CheckpointError: a packed layer whose tensors are missing, misshapen or of another type, or an impossible scale.
    """
    codes, scale = (
        (".weight_packed", ".weight_global_scale") if packing == COMPRESSED_TENSORS else (".weight", ".weight_scale_2")
    )
    bases = [name.removesuffix(scale) for name in tensors if name.endswith(scale)]
    taken = {f"{base}{end}" for base in bases for end in (codes, ".weight_scale", scale)}
    result = {name: tensor for name, tensor in tensors.items() if name not in taken and not name.endswith(ACTIVATIONS)}
    for base in bases:
        packed, scales = (_of_bytes(tensors, f"{base}{end}", where) for end in (codes, ".weight_scale"))
        if packed.shape != (scales.shape[0], scales.shape[1] * GROUP_SIZE // 2):
            raise CheckpointError(
                f"{where}: {quoted(base + codes)} of shape {list(packed.shape)} does not fit scales of"
                f" shape {list(scales.shape)}"
            )
        result[f"{base}.weight"] = packed.view(mx.uint32)
        result[f"{base}.scales"] = scales
        result[f"{base}.global_scale"] = _factor(tensors[base + scale], packing, f"{where}: {quoted(base + scale)}")
    return result


def _of_bytes(tensors: Mapping[str, mx.array], name: str, where: Path) -> mx.array:
    tensor = tensors.get(name)
    if tensor is None:
        raise CheckpointError(f"{where}: the tensor {quoted(name)} is missing")
    # MLX reads float8 as the bytes that it consists of.
    if tensor.dtype != mx.uint8 or tensor.ndim != 2 or tensor.size == 0:
        kind = str(tensor.dtype).removeprefix("mlx.core.")
        raise CheckpointError(f"{where}: {quoted(name)} is {kind} of shape {list(tensor.shape)}, expected a matrix of bytes")
    return tensor


def _factor(scale: mx.array, packing: str, where: str) -> mx.array:
    """What the decoded weights are multiplied by: a float32 scalar."""
    if scale.size != 1:
        raise CheckpointError(f"{where} has shape {list(scale.shape)}, expected one number")
    value = float(np.array(scale.astype(mx.float32)).reshape(()))
    if not math.isfinite(value) or value <= 0:
        raise CheckpointError(f"{where} is {value}, expected a positive number")
    return mx.array(1 / value if packing == COMPRESSED_TENSORS else value, dtype=mx.float32)


def under_compressed_tensors_names(weights: Mapping[str, mx.array]) -> dict[str, tuple[str, mx.array]]:
    """Weights by MLX's names as llm-compressor stores them: name -> (safetensors' type, array of its bytes or numbers).

    Raises:
        CheckpointError: a layer that is packed otherwise.
    """
    result: dict[str, tuple[str, mx.array]] = {}
    for name, array in weights.items():
        base, _, last = name.rpartition(".")
        scales = weights.get(f"{base}.scales")
        if scales is None:
            result[name] = (_TYPES[array.dtype], array)
        elif last == "weight":
            if scales.dtype != mx.uint8 or array.shape[1] * 8 != scales.shape[1] * GROUP_SIZE:
                raise CheckpointError(
                    f"{quoted(base)} is not packed as nvfp4; {COMPRESSED_TENSORS} is written with nvfp4 alone"
                )
            factor = weights.get(f"{base}.global_scale", mx.array(1.0))
            result[f"{base}.weight_packed"] = ("U8", array.view(mx.uint8))
            result[f"{base}.weight_scale"] = ("F8_E4M3", scales)
            result[f"{base}.weight_global_scale"] = ("F32", (1 / factor.astype(mx.float32)).reshape(1))
        elif last == "bias":
            result[name] = (_TYPES[array.dtype], array)
    return result


_TYPES = {mx.bfloat16: "BF16", mx.float16: "F16", mx.float32: "F32"}


def compressed_tensors_table(ignored: list[str], version: str) -> dict[str, Any]:
    """The `quantization_config` of config.json, as llm-compressor writes it for packed weights and 16-bit inputs.

    Args:
        ignored: linear layers that are not packed.
    """
    weights: dict[str, Any] = {
        "actorder": None, "block_structure": None, "dynamic": False, "group_size": GROUP_SIZE, "num_bits": 4,
        "observer": "minmax", "observer_kwargs": {}, "strategy": "tensor_group", "symmetric": True, "type": "float",
    }  # fmt: skip
    group = {
        "format": FORMAT, "input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights,
    }  # fmt: skip
    return {
        "config_groups": {"group_0": group},
        "format": FORMAT,
        "global_compression_ratio": None,
        "ignore": ignored,
        "kv_cache_scheme": None,
        "producer": {"name": "marlin", "version": version},
        "quant_method": COMPRESSED_TENSORS,
        "quantization_status": "compressed",
    }
