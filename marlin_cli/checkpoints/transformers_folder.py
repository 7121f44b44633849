"""What importers of transformers' folders share: config.json with known fields, and every tensor of the weights files."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from marlin_cli.checkpoints.foreign import Foreign, Taken, read_foreign
from marlin_cli.checkpoints.hugging_face import SUFFIXES, weight_files
from marlin_cli.checkpoints.t5_ends import CONFIG
from marlin_cli.checkpoints.t5_head import HEAD, Head, choose_head, head_flags, stored_head
from marlin_cli.config import describe
from marlin_cli.documents import read_json
from marlin_cli.errors import CheckpointError, ConfigError
from marlin_cli.text import quoted

# transformers' fields -> marlin's, with the values of fields that a file leaves out.
Fields = Mapping[str, tuple[str, Any]]


def has_model_type(path: Path, model_types: Sequence[str]) -> bool:
    """Is this a folder whose config.json names one of `model_types` and is not marlin's own, or a weights file in one?"""
    folder = path if path.is_dir() else path.parent
    if not (folder / CONFIG).is_file() or (path.is_file() and path.suffix not in SUFFIXES):
        return False
    document = read_json(folder / CONFIG)
    return isinstance(document, dict) and document.get("model_type") in model_types


def tensors_of(path: Path, dropped: Callable[[str], bool] = lambda name: False) -> Foreign:
    """The tensors of all weights files of a folder, or of one file, but for those that are `dropped`.

    Raises:
        CheckpointError: no weights, a damaged file, or a tensor that stands in two shards.
    """
    tensors: dict[str, mx.array] = {}
    stored: dict[str, tuple[Path, str]] = {}
    for file in weight_files(path):
        own = read_foreign(file)
        for name, tensor in own.tensors.items():
            if name in tensors:
                raise CheckpointError(f"{file}: {quoted(name)} stands in another shard too")
            if not dropped(name):
                tensors[name] = tensor
        stored.update(own.stored)
    return Foreign(path, tensors, stored=stored)


def tensors_of_model(path: Path) -> Foreign:
    """The same, without the `model.` that stands before most names: a shard whose names all begin so lost it when it was read.

    Raises:
        CheckpointError: as `tensors_of`; or a tensor stands there with and without it.
    """
    foreign = tensors_of(path)
    plain = {name: name.removeprefix("model.") for name in foreign.tensors}
    twice = next((name for name, short in plain.items() if name != short and short in foreign.tensors), None)
    if twice is not None:
        raise CheckpointError(f"{path}: {quoted(twice)} stands there twice")
    return Foreign(
        path,
        {plain[name]: tensor for name, tensor in foreign.tensors.items()},
        stored={plain[name]: place for name, place in foreign.stored.items() if name in plain},
    )


def known_fields(document: Mapping[str, Any], fields: Fields, where: Path) -> dict[str, Any]:
    """marlin's fields of those that transformers has under other names.

    Raises:
        ConfigError: a field that is no number of the right kind.
    """
    return {ours: number(document, theirs, default, where) for theirs, (ours, default) in fields.items()}


def number(document: Mapping[str, Any], name: str, default: Any, where: Path) -> Any:
    """The number `name`, of the kind that `default` is, or `default` where there is none.

    Raises:
        ConfigError: it is something else.
    """
    value = document.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, type(default))):
        raise ConfigError(f"{where}: {name} should be a number, found {describe(value)}")
    return value


def check_layers(path: Path, foreign: Foreign, layers: int) -> None:
    """Refuse a number of layers for which there are too few tensors, before the names of all of them are made.

    Raises:
        CheckpointError: a layer has several tensors; the file has fewer than one for each.
    """
    if layers > len(foreign.tensors):
        raise CheckpointError(
            f"{path}: {CONFIG} asks for {quoted(layers)} layers, the file holds {len(foreign.tensors)} tensors"
        )


def take_head(taken: Taken, path: Path, document: Mapping[str, Any], weights: dict[str, mx.array]) -> Head:
    """Take the head of a relative of T5, by T5's rules, into `weights` where it is one of its own.

    Raises:
        CheckpointError: it should be one of its own, which is not stored.
        ConfigError: a flag that is neither true nor false.
    """
    flags = dataclasses.replace(head_flags(document, path / CONFIG if path.is_dir() else path.parent / CONFIG), model_type="t5")
    own = taken.take(HEAD) if taken.has(HEAD) else None
    head = choose_head(flags, stored_head(own, weights["embedding.weight"]), path)
    if not head.tied and own is not None:
        weights["output.weight"] = own
    return head
