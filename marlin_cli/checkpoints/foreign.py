"""What importers share: the result's type, the options, and the tensors of a foreign file under plain names."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from marlin_cli.checkpoints.pickle_reader import TensorReference
from marlin_cli.checkpoints.torch_file import TorchFile
from marlin_cli.config import describe
from marlin_cli.documents import read_json
from marlin_cli.errors import CheckpointError, ConfigError
from marlin_cli.tensor_files import read_safetensors

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")

# Keys under which training scripts put the state dict of a model, the nearest to the weights last.
WRAPPERS = ("checkpoint", "state_dict", "model_state_dict", "model", "module")

# What data parallelism, torch.compile and training classes put before every name.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")


@dataclass(frozen=True)
class Checkpoint:
    """A model as read: configuration fields (with `model_type`), and weights by canonical path."""

    path: Path
    layout: str  # the importer's name
    config: dict[str, Any]
    weights: dict[str, mx.array]
    quantization: dict[str, Any] | None = None  # mlx-lm's table of config.json
    marlin: dict[str, Any] | None = None  # marlin's own table of config.json


@dataclass(frozen=True)
class ImportOptions:
    """What shapes and keys of a foreign checkpoint may not reveal; None takes what its constructor takes.

    An option that contradicts what the checkpoint does reveal is refused.
    """

    heads: int | None = None  # of the global stage, which in MEGABYTE-pytorch is every stage
    head_dim: int | None = None  # width of a head
    max_bytes: int | None = None  # longest context, where no learned positions say it
    activation: str | None = None  # relu, gelu_tanh or silu (paper, without model_config)
    norm: str | None = None  # layernorm or variance (paper, without model_config)
    rope: bool | None = None  # (paper, without model_config)
    attention_window: int | None = None  # patches that a patch sees before itself (paper; before model_config's)


@dataclass(frozen=True)
class Foreign:
    """A foreign file: its tensors by their own names, and what else stood beside them."""

    path: Path
    tensors: dict[str, mx.array]
    beside: dict[str, Any] = field(default_factory=dict)

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """The shape of the tensor `name`, which must have so many dimensions, none of them 0.

        Raises:
            CheckpointError: it is missing, or shaped otherwise.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.path}: the tensor {name!r} is missing")
        if tensor.ndim != dimensions or tensor.size == 0:
            raise CheckpointError(f"{self.path}: {name!r} has shape {list(tensor.shape)}, not {dimensions} dimensions")
        return tensor.shape


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: it holds something else, or is no JSON.
    """
    document = read_json(path)
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected an object, found {describe(document)}")
    return document


def take_table(document: dict[str, Any], key: str, path: Path) -> dict[str, Any] | None:
    """The table `key` of an object that was read from `path`, which is taken out of it.

    Raises:
        ConfigError: the value is something else.
    """
    value = document.pop(key, None)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{path}: {key!r} should be a table, found {describe(value)}")
    return value


def weights_file(path: Path) -> Path:
    """The one weights file that `path`, a file or a folder, stands for.

    Raises:
        CheckpointError: no such file, or a folder with none or several.
    """
    if path.is_dir():
        found = [file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES and file.is_file()]
        if len(found) != 1:
            names = ", ".join(file.name for file in found[:4]) or "none"
            raise CheckpointError(f"{path}: expected config.json or one weights file, found {names}; name the file")
        return found[0]
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    return path


def shards_of_index(index: Path) -> list[Path]:
    """The files that an index of transformers' kind, beside them, names.

    Raises:
        CheckpointError: no index, or a file that is missing or lies outside the folder.
    """
    document = read_json(index, CheckpointError)
    table = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(f"{index}: has no table weight_map of weights and files")
    names = sorted(set(table.values()))
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: the shard {name!r} lies outside the folder")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: the shard {name!r} is missing; fetch it again")
    return [index.parent / name for name in names]


def read_foreign(path: Path) -> Foreign:
    """The tensors of a .safetensors file or a file of `torch.save`, or of a folder with one of them.

    Raises:
        CheckpointError: no such file, several, or one that is damaged or unsafe.
    """
    path = weights_file(path)
    if path.suffix == ".safetensors":
        tensors, _ = read_safetensors(path)
        return Foreign(path, _without_prefixes(tensors))
    file = TorchFile(path)
    beside = document = file.document
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: holds no dict but a {type(document).__name__}; save model.state_dict()")
    while inner := next((document[key] for key in WRAPPERS if isinstance(document.get(key), dict)), None):
        beside, document = document, inner
    references = {str(key): value for key, value in document.items() if isinstance(value, TensorReference)}
    if not references:
        raise CheckpointError(f"{path}: holds no tensors; save model.state_dict()")
    return Foreign(path, _without_prefixes(file.arrays(references)), {} if beside is document else beside)


def _without_prefixes(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    while prefix := next((each for each in PREFIXES if tensors and all(name.startswith(each) for name in tensors)), ""):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


class Taken:
    """Tensors handed out by name, so that none is forgotten and a missing one is named."""

    def __init__(self, foreign: Foreign) -> None:
        self._path = foreign.path
        self._left = dict(foreign.tensors)

    def take(self, name: str, shape: tuple[int, ...] | None = None) -> mx.array:
        """The tensor `name`, which must have `shape` when that is given."""
        if name not in self._left:
            raise CheckpointError(f"{self._path}: the tensor {name!r} is missing")
        tensor = self._left.pop(name)
        if shape is not None and tensor.shape != shape:
            raise CheckpointError(
                f"{self._path}: {name!r} has shape {list(tensor.shape)}, the other tensors ask for {list(shape)}"
            )
        return tensor

    def has(self, name: str) -> bool:
        """Is there such a tensor, not taken yet?"""
        return name in self._left

    def drop(self, suffix: str) -> None:
        """Leave out tensors whose names end so (buffers that are computed anew)."""
        self._left = {name: tensor for name, tensor in self._left.items() if not name.endswith(suffix)}

    def finish(self) -> None:
        """Raise `CheckpointError` if a tensor has found no place."""
        if self._left:
            name = sorted(self._left)[0]
            raise CheckpointError(f"{self._path}: no place for the tensor {name!r} ({len(self._left)} in all)")
