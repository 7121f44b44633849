"""What importers share: the result's type, the options, and the tensors of a foreign file under plain names."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from marlin_cli.checkpoints.pickle_reader import read_pickle
from marlin_cli.errors import CheckpointError
from marlin_cli.files import read_safetensors

# Keys under which training scripts put the state dict of a model.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "ema")


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
    """What shapes and keys of a foreign checkpoint do not reveal; None takes what its constructor takes."""

    heads: int | None = None  # of every stage
    max_bytes: int | None = None  # longest context, where no learned positions say it
    activation: str | None = None  # relu, gelu, gelu_tanh or silu (paper, a bare state dict)
    norm: str | None = None  # layernorm or variance (paper, a bare state dict)
    rope: bool | None = None  # (paper, a bare state dict)
    attention_window: int | None = None  # in patches (paper, a bare state dict)
    head_dim: int | None = None


@dataclass(frozen=True)
class Foreign:
    """A foreign file: its tensors by their own names, and what else stood beside them."""

    path: Path
    tensors: dict[str, mx.array]
    beside: dict[str, Any] = field(default_factory=dict)


def read_foreign(path: Path) -> Foreign:
    """The tensors of a .safetensors, .pt, .pth, .bin or .ckpt file, or of a folder with one of them.

    Raises:
        CheckpointError: no such file, several, or one that is damaged or unsafe.
    """
    if path.is_dir():
        found = [file for file in sorted(path.iterdir()) if file.suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt")]
        if len(found) != 1:
            names = ", ".join(file.name for file in found[:4]) or "none"
            raise CheckpointError(f"{path}: expected config.json or one weights file, found {names}; name the file")
        path = found[0]
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        tensors, _ = read_safetensors(path)
        return Foreign(path, tensors)
    document = read_pickle(path)
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: holds a {type(document).__name__}, expected a state dict; save model.state_dict()")
    beside = document
    for wrapper in WRAPPERS:
        if isinstance(document.get(wrapper), dict):
            document = document[wrapper]
            break
    tensors = {str(key): value for key, value in document.items() if isinstance(value, mx.array)}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors; save model.state_dict()")
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return Foreign(path, tensors, beside if beside is not document else {})


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
