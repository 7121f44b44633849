"""What importers of transformers' folders share: config.json with known fields, and every tensor of the weights files."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from marlin_cli.checkpoints.foreign import Foreign, Taken, read_foreign
from marlin_cli.checkpoints.hugging_face import CONFIG, SUFFIXES, weight_files
from marlin_cli.config import describe
from marlin_cli.documents import read_json
from marlin_cli.errors import CheckpointError, ConfigError

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
    for file in weight_files(path):
        for name, tensor in read_foreign(file).tensors.items():
            if name in tensors:
                raise CheckpointError(f"{file}: {name!r} stands in another shard too")
            if not dropped(name):
                tensors[name] = tensor
    return Foreign(path, tensors)


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
        raise CheckpointError(f"{path}: {CONFIG} asks for {layers:,} layers, the file holds {len(foreign.tensors)} tensors")


def take_tied_head(taken: Taken, path: Path, embedding: mx.array, *, tied: bool) -> None:
    """Take the output head of a model that uses its embeddings for one, where the file holds them twice.

    Raises:
        CheckpointError: it is another table than the embeddings.
    """
    if tied and taken.has("lm_head.weight"):
        head = taken.take("lm_head.weight")
        if head.shape != embedding.shape or not mx.array_equal(head, embedding).item():
            raise CheckpointError(
                f"{path}: 'lm_head.weight' differs from the embeddings, and {CONFIG} ties the two or does not say;"
                " set tie_word_embeddings false if the head is one of its own"
            )
