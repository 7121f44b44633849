"""What importers share: the result's type, the options, a folder's files, and tensors that are handed out by name."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from marlin_cli.checkpoints.pickle_reader import TensorReference
from marlin_cli.checkpoints.state_dicts import Copy, Model, Table, find_model, innermost, tables_of, without_prefixes
from marlin_cli.checkpoints.stored_rows import Stored
from marlin_cli.checkpoints.torch_file import TorchFile
from marlin_cli.config import describe
from marlin_cli.documents import read_json
from marlin_cli.errors import AssumptionWarning, CheckpointError, ConfigError
from marlin_cli.files import check_regular
from marlin_cli.tensor_files import read_safetensors, safetensors_header
from marlin_cli.text import quoted

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")

# Widths of heads that a trial of all of them looks at.
WIDTHS_OF_HEADS = (4, 512)

# Where the state of optimizers, schedules and scalers stands beside a model.
OPTIMIZERS = ("opt", "optim", "optimizer", "optimizer_state_dict", "lr_scheduler", "scheduler", "scaler", "grad_scaler")


@dataclass(frozen=True)
class Checkpoint:
    """A model as read: configuration fields (with `model_type`), and weights by canonical path."""

    path: Path
    layout: str  # the importer's name
    config: dict[str, Any]
    weights: dict[str, mx.array]
    quantization: dict[str, Any] | None = None  # mlx-lm's table of config.json
    marlin: dict[str, Any] | None = None  # marlin's own table of config.json
    assumed: Mapping[str, Any] = field(default_factory=dict)  # what neither file nor caller told, by import option
    stored: Stored = field(default_factory=dict)  # weights of which rows can be read without the others


@dataclass(frozen=True)
class ImportOptions:
    """What shapes and keys of a foreign checkpoint may not reveal; None takes what its constructor takes.

    An option that contradicts what the checkpoint does reveal is refused.
    """

    heads: int | Literal["auto"] | None = None  # of the global stage, which in MEGABYTE-pytorch is every stage
    head_dim: int | None = None  # width of a head
    max_bytes: int | None = None  # longest context, where no learned positions say it
    activation: str | None = None  # relu, gelu_tanh or silu (paper, without model_config)
    norm: str | None = None  # layernorm or variance (paper, without model_config)
    rope: bool | None = None  # (paper, without model_config)
    attention_scale: float | None = None  # (paper, without model_config)
    attention_window: int | None = None  # rows seen before itself, 0: all (paper: patches; spacebyte: bytes)
    bos_byte: int | None = None  # what leads where no learned pads do (paper, without model_config)
    weights: Copy | None = None  # which of two copies, of which one is the mean over the training
    heads_by_trial: bool | None = None  # the heads were chosen by sample bytes, which is an assumption too
    block_bytes: int | None = None  # bytes of a block (block_recurrent)
    patch_rule: str | None = None  # what begins a patch, utf8 or periodic (spacebyte, without model_config)
    language: str | None = None  # whose adapters to take, by its code or the number of its row (la_canine)


@dataclass(frozen=True)
class Foreign:
    """A foreign file: its tensors by their own names, and what else stood beside them."""

    path: Path
    tensors: dict[str, mx.array]
    beside: dict[str, Any] = field(default_factory=dict)
    assumed: Mapping[str, Any] = field(default_factory=dict)  # see `Checkpoint`
    stored: Stored = field(default_factory=dict)  # by the names of `tensors`; see `Checkpoint`

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        """The shape of the tensor `name`, which must have so many dimensions, none of them 0.

        Raises:
            CheckpointError: it is missing, or shaped otherwise.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.path}: the tensor {quoted(name)} is missing")
        if tensor.ndim != dimensions or tensor.size == 0:
            raise CheckpointError(f"{self.path}: {quoted(name)} has shape {list(tensor.shape)}, not {dimensions} dimensions")
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
        raise ConfigError(f"{path}: {quoted(key)} should be a table, found {describe(value)}")
    return value


def weights_file(path: Path) -> Path:
    """The one weights file that `path`, a file or a folder, stands for.

    Raises:
        CheckpointError: no such file, or a folder with none or several.
    """
    if path.is_dir():
        try:
            found = [file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES and file.is_file()]
        except OSError as error:
            raise CheckpointError(f"{path}: cannot read: {error.strerror}") from None
        if len(found) != 1:
            names = ", ".join(quoted(file.name) for file in found[:4]) or "none"
            raise CheckpointError(f"{path}: expected config.json or one weights file, found {names}; name the file")
        return found[0]
    check_regular(path, CheckpointError)
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
            raise CheckpointError(f"{index}: the shard {quoted(name)} lies outside the folder")
        try:
            there = (index.parent / name).exists()
        except (OSError, ValueError):  # no name that a file can have
            there = False
        if not there:
            raise CheckpointError(f"{index}: the shard {quoted(name)} is missing; fetch it again")
        check_regular(index.parent / name, CheckpointError)
    return [index.parent / name for name in names]


def read_foreign(path: Path, markers: Sequence[str] = (), copy: Copy | None = None) -> Foreign:
    """The tensors of a .safetensors file or a file of `torch.save`, or of a folder with one of them.

    Args:
        markers: names of which a model has one. Where it stands they tell, see `state_dicts`; what stands elsewhere is
            left out. Without any, names lose what all of them have before them.
        copy: the copy to take of a model that is there twice.

    Raises:
        CheckpointError: no such file, several, or one that is damaged or unsafe; no model, or several.
    """
    path = weights_file(path)
    if path.suffix == ".safetensors":
        arrays, _ = read_safetensors(path)
        model = find_model(list(arrays), markers, copy, path)
        if model is None:
            names = without_prefixes(list(arrays))
            stored = {name: (path, full) for name, full in names.items()}
            return Foreign(path, {name: arrays[full] for name, full in names.items()}, stored=stored)
        _say_what_is_left(path, model, {name: array.size for name, array in arrays.items()})
        tensors = {name: arrays[full] for name, full in model.names.items()}
        return Foreign(path, _without_counters(tensors), {}, _assumed(model, copy))
    file = TorchFile(path)
    document, everything = _tables_in(file, path)
    model = find_model(list(everything), markers, copy, path)
    if model is None:
        inner, beside = innermost(document)
        references = {str(key): value for key, value in inner.items() if isinstance(value, TensorReference)}
        if not references:
            raise CheckpointError(f"{path}: holds no tensors; save model.state_dict()")
        arrays = file.arrays(references)
        tensors = {name: arrays[full] for name, full in without_prefixes(list(arrays)).items()}
        return Foreign(path, tensors, dict(beside))
    _say_what_is_left(path, model, {name: math.prod(reference.shape) for name, (reference, _) in everything.items()})
    arrays = file.arrays({name: everything[full][0] for name, full in model.names.items()})
    marked = next(full for name, full in model.names.items() if name in markers)
    return Foreign(path, _without_counters(arrays), dict(everything[marked][1].beside), _assumed(model, copy))


def names_in(path: Path) -> list[str]:
    """The names of the tensors that `read_foreign` has to choose from; none of them is read.

    Raises:
        CheckpointError: no such file, several, or one that is damaged or unsafe.
    """
    path = weights_file(path)
    if path.suffix == ".safetensors":
        tensors, _ = safetensors_header(path)
        return list(tensors)
    _, everything = _tables_in(TorchFile(path), path)
    return list(everything)


def _tables_in(file: TorchFile, path: Path) -> tuple[dict[Any, Any], dict[str, tuple[TensorReference, Table]]]:
    """The object that a file of `torch.save` holds, and its tensors under all that they stand in, each with its table."""
    document = file.document
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: holds no dict but a {type(document).__name__}; save model.state_dict()")
    tables = list(tables_of(document))
    return document, {f"{table.under}{name}": (each, table) for table in tables for name, each in table.tensors.items()}


def _say_what_is_left(path: Path, model: Model, sizes: Mapping[str, int]) -> None:
    """A line about tensors that are neither of the model nor of a copy of it, nor of an optimizer; counters are left unsaid."""
    left = [name for name in model.outside if sizes[name] > 1 and name.partition(".")[0] not in OPTIMIZERS]
    if left:
        warnings.warn(
            f"{path}: the model stands under {quoted(model.prefix)}; {len(left):,} other tensors are left out,"
            f" such as {quoted(left[0])}",
            AssumptionWarning,
            stacklevel=2,
        )


def _assumed(model: Model, copy: Copy | None) -> dict[str, str]:
    """The copy that was taken, where there are several and nobody said which."""
    if copy is not None or not model.others:
        return {}
    return {"weights": model.kind}


def _without_counters(tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Without single numbers that have no dimension, such as EMA's `step`: no weight of any layout is one."""
    return {name: tensor for name, tensor in tensors.items() if tensor.ndim}


def heads_of_width(width: int, *others: int) -> list[int]:
    """How many heads an attention so wide may have: those of an even width of some use that divides `others` too."""
    least, most = WIDTHS_OF_HEADS
    fitting = [each for each in range(least, min(most, width) + 1, 2) if not any(whole % each for whole in (width, *others))]
    return [width // each for each in reversed(fitting)]


class Taken:
    """Tensors handed out by name, so that none is forgotten and a missing one is named."""

    def __init__(self, foreign: Foreign) -> None:
        self._path, self._foreign = foreign.path, foreign
        self._left = dict(foreign.tensors)

    def take(self, name: str, shape: tuple[int, ...] | None = None) -> mx.array:
        """The tensor `name`, which must have `shape` when that is given."""
        if name not in self._left:
            raise CheckpointError(f"{self._path}: the tensor {quoted(name)} is missing")
        tensor = self._left.pop(name)
        if shape is not None and tensor.shape != shape:
            raise CheckpointError(
                f"{self._path}: {quoted(name)} has shape {list(tensor.shape)}, the other tensors ask for {list(shape)}"
            )
        return tensor

    def has(self, name: str) -> bool:
        """Is there such a tensor, not taken yet?"""
        return name in self._left

    def drop(self, suffix: str) -> None:
        """Leave out tensors whose names end so (buffers that are computed anew)."""
        self._left = {name: tensor for name, tensor in self._left.items() if not name.endswith(suffix)}

    def drop_zeros(self, name: str) -> None:
        """Leave out a buffer that its class fills with zeros, if it is there.

        Raises:
            CheckpointError: it holds something else.
        """
        if name in self._left and mx.any(self._left.pop(name) != 0).item():
            raise CheckpointError(f"{self._path}: {quoted(name)} holds numbers, where its class has zeros alone")

    def stored(self, weights: Mapping[str, mx.array]) -> Stored:
        """Where those of some weights lie in files that are tensors of them, unchanged."""
        names = {id(tensor): name for name, tensor in self._foreign.tensors.items() if name in self._foreign.stored}
        return {path: self._foreign.stored[names[id(array)]] for path, array in weights.items() if id(array) in names}

    def finish(self) -> None:
        """Raise `CheckpointError` if a tensor has found no place."""
        if self._left:
            name = sorted(self._left)[0]
            raise CheckpointError(f"{self._path}: no place for the tensor {quoted(name)} ({len(self._left)} in all)")
