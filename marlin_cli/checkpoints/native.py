"""Marlin's own layout: a folder with config.json and model.safetensors, or shards with an index."""

from pathlib import Path

import mlx.core as mx

from marlin_cli.checkpoints import nvfp4
from marlin_cli.checkpoints.foreign import Checkpoint, read_object, shards_of_index, take_table
from marlin_cli.errors import CheckpointError, ConfigError
from marlin_cli.tensor_files import read_safetensors
from marlin_cli.text import quoted

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Keys that other tools add to config.json, which say nothing that marlin needs.
IGNORED_KEYS = ("architectures", "dtype", "torch_dtype", "transformers_version")

# An older name of a key.
RENAMED_KEYS: dict[str, str] = {"conditioning": "layout"}


def recognises(path: Path) -> bool:
    """Is this a folder with a config.json, or a safetensors file beside one?"""
    if path.is_dir():
        return (path / CONFIG).exists()
    return path.suffix == ".safetensors" and (path.parent / CONFIG).exists()


def read(path: Path) -> Checkpoint:
    """Read a model folder, or the safetensors file in it; layers that another tool packed as nvfp4 stay packed.

    Raises:
        CheckpointError: a missing, damaged or contradictory weights file.
        ConfigError: config.json is not a JSON object.
    """
    folder = path if path.is_dir() else path.parent
    document = read_object(folder / CONFIG)
    packing = None if "quantization" in document else nvfp4.packing_of(document, folder)
    if packing is not None:
        document = {key: value for key, value in document.items() if key != "quantization_config"}
    known = {str(key): value for key, value in document.items() if key not in IGNORED_KEYS}
    config = {RENAMED_KEYS.get(key, key): value for key, value in known.items()}
    quantization = take_table(config, "quantization", folder / CONFIG)
    # mlx-lm writes the same table under transformers' name; another table is another tool's packing.
    if take_table(config, "quantization_config", folder / CONFIG) not in (None, quantization):
        raise ConfigError(f"{folder / CONFIG}: 'quantization_config' differs from 'quantization'; marlin reads MLX's packing")
    marlin = take_table(config, "marlin", folder / CONFIG)
    weights: dict[str, mx.array] = {}
    stored: dict[str, tuple[Path, str]] = {}
    for file in weight_files(folder) if path.is_dir() else [path]:
        arrays, _ = read_safetensors(file)
        twice = sorted(arrays.keys() & weights.keys())
        if twice:
            raise CheckpointError(f"{file}: {quoted(twice[0])} stands in another shard too")
        weights.update(arrays)
        stored.update({name: (file, name) for name in arrays})
    if packing is not None:
        weights, quantization = nvfp4.under_mlx_names(weights, packing, path), dict(nvfp4.TABLE)
    return Checkpoint(path, "native", config, weights, quantization, marlin, stored={} if packing is not None else stored)


def files(path: Path) -> list[Path]:
    """All files that a model consists of, config.json first."""
    folder = path if path.is_dir() else path.parent
    return [folder / CONFIG, *(weight_files(folder) if path.is_dir() else [path])]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder.

    Raises:
        CheckpointError: none, or an index that names a missing file or one outside the folder.
    """
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise CheckpointError(f"{folder}: holds neither {SINGLE} nor {INDEX}; name another layout's file itself")
        return [folder / SINGLE]
    return shards_of_index(index)
