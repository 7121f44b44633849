"""Writes marlin's own layout: a folder with config.json and safetensors, sharded when large."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from marlin_cli.files import save_arrays, writing_folder

SHARD_BYTES = 5_000_000_000


def write_model(
    path: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, mx.array],
    quantization: Mapping[str, Any] | None,
    marlin: Mapping[str, Any] | None,
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model folder in one step: it is whole under its final name, or it is not there.

    Args:
        config: the architecture's fields; `quantization` (mlx-lm's convention) and `marlin` join it in config.json.
        weights: parameter path -> array.
        shard_bytes: weights beyond this many bytes go on in another file, with an index as transformers writes it.

    Raises:
        OutputError: the folder exists and `overwrite` is off, or it cannot be written.
    """
    document = dict(config)
    if quantization is not None:
        document["quantization"] = dict(quantization)
        # The same table under transformers' name, as mlx-lm writes it.
        document["quantization_config"] = dict(quantization)
    if marlin is not None:
        document["marlin"] = dict(marlin)
    shards = _shards(weights, shard_bytes)
    with writing_folder(path, overwrite=overwrite) as folder:
        names = (
            ["model.safetensors"]
            if len(shards) == 1
            else [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        )
        for name, shard in zip(names, shards, strict=True):
            save_arrays(folder / name, shard, {"format": "mlx"})
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(array.nbytes for array in weights.values())},
                "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
            }
            _write_json(folder / "model.safetensors.index.json", index)
        _write_json(folder / "config.json", document)


def _shards(weights: Mapping[str, mx.array], shard_bytes: int) -> list[dict[str, mx.array]]:
    """Weights in order, cut into groups of at most `shard_bytes` (or one larger array)."""
    shards: list[dict[str, mx.array]] = [{}]
    used = 0
    for name in sorted(weights):
        size = weights[name].nbytes
        if shards[-1] and used + size > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = weights[name]
        used += size
    return shards


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
