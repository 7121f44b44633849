"""What a name stands for: a model, a configuration without weights, statistics or the state of a prompt; by its files alone."""

import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from mlx.utils import tree_flatten

from marlin_cli.api import architecture_at
from marlin_cli.checkpoints import ImportOptions, files_of, fingerprint, read_checkpoint
from marlin_cli.checkpoints.configurations import holds_weights, settings_alone
from marlin_cli.checkpoints.location import locate_model
from marlin_cli.engine.state_files import FORMAT, SUM
from marlin_cli.errors import CheckpointError, MarlinError, UsageError
from marlin_cli.files import kind_of_file
from marlin_cli.models import ARCHITECTURES, Capability, architecture_named, build, config_as_mapping, matrices_of
from marlin_cli.ops import PackedTable, QuantizedLinear
from marlin_cli.ops.device import Device
from marlin_cli.prediction.sizes import bytes_by_part, bytes_in_float32, part_of_weight, weights_by_part
from marlin_cli.statistics.show import Summary, summarise
from marlin_cli.statistics.store import holds_statistics, load_statistics
from marlin_cli.tensor_files import safetensors_header

# The commands that a model is for, by what it does.
COMMANDS = {
    Capability.CONTINUES: ("calibrate", "quantize", "generate", "serve", "bench"),
    Capability.ANSWERS: ("calibrate", "quantize", "generate", "encode", "serve", "bench"),
    Capability.ENCODES: ("calibrate", "quantize", "label", "encode", "bench"),
}

# Kinds of files that no command takes for a model.
UNREAD = ("empty", "JSON", "text", "a page of HTML")


@dataclass(frozen=True)
class Part:
    """A part of a model."""

    part: str
    weights: int
    bits_per_weight: float  # of what is stored, scales included
    formats: list[str]  # of its linear layers
    stored_bytes: int
    loaded_bytes: int  # on the device


@dataclass(frozen=True)
class ModelInfo:
    """What a model is, by its files."""

    path: str
    architecture: str
    layout: str  # of the files
    commands: list[str]
    config: dict[str, Any]
    parts: list[Part]
    disk_bytes: int
    fingerprint: str | None  # of the files, which statistics name; None where it was not asked for
    marlin: dict[str, Any]  # what marlin noted when it packed or imported it

    @property
    def weights(self) -> int:
        return sum(part.weights for part in self.parts)

    @property
    def loaded_bytes(self) -> int:
        return sum(part.loaded_bytes for part in self.parts)


@dataclass(frozen=True)
class ShapePart:
    """A part of a model of which only the shape is known."""

    part: str
    weights: int

    @property
    def bytes_in_16_bits(self) -> int:
        return 2 * self.weights


@dataclass(frozen=True)
class ShapeInfo:
    """What a configuration without weights describes."""

    path: str
    architecture: str
    commands: list[str]
    config: dict[str, Any]
    parts: list[ShapePart]

    @property
    def weights(self) -> int:
        return sum(part.weights for part in self.parts)


@dataclass(frozen=True)
class StatisticsInfo:
    """What a file of statistics holds."""

    path: str
    summary: Summary
    hessians: bool


@dataclass(frozen=True)
class StateInfo:
    """What the state of a prompt says of itself; whether it is whole is seen when it is read."""

    path: str
    facts: dict[str, str]
    disk_bytes: int


Described: TypeAlias = ModelInfo | ShapeInfo | StatisticsInfo | StateInfo


def is_model(name: str) -> bool:
    """Does a name stand for a model with weights, or for nothing that is known here?"""
    path = _path(name)
    return not (_is_file(path) and (_is_safetensors(path) or _kind_of(path) is not None)) and _settings(name) is None


def describe(name: str, device: Device, options: ImportOptions, *, with_fingerprint: bool) -> Described:
    """What a name stands for: a model as every command takes it, a configuration alone, or a file that marlin wrote.

    Args:
        with_fingerprint: read all bytes of a model for it, and see that its weights are numbers.

    Raises:
        MarlinError: none of these, or it cannot be read.
    """
    path = _path(name)
    if _is_file(path):
        if kind := _kind_of(path):
            raise CheckpointError(f"{name}: is {kind}; marlin info takes models, configurations, statistics, states of prompts")
        if holds_statistics(path):
            statistics = load_statistics(path)
            return StatisticsInfo(str(path), summarise(statistics), bool(statistics.hessians))
        if _is_safetensors(path):
            _, facts = safetensors_header(path)
            return StateInfo(str(path), {key: value for key, value in facts.items() if key != SUM}, path.stat().st_size)
    settings = _settings(name)
    if settings is None:
        return _model(name, device, options, with_fingerprint)
    architecture = ARCHITECTURES[settings.model_type]
    network = architecture.network(settings)
    commands = _commands(architecture.capability, settings)
    parts = [ShapePart(part, count) for part, count in weights_by_part(network).items()]
    return ShapeInfo(name, architecture.title, commands, config_as_mapping(settings), parts)


def _commands(capability: Capability, config: Any) -> list[str]:
    """The commands that a model is for: what has no decoder answers nothing, and what has no head labels nothing."""
    found = COMMANDS[capability]
    if capability is Capability.ANSWERS and not config.decoder_layers:
        found = COMMANDS[Capability.ENCODES]
    labels = (
        capability is Capability.ENCODES and getattr(config, "head", "sentences") != "none" or getattr(config, "labels", ())
    )
    return [command for command in found if command != "label" or labels]


def _path(name: str) -> Path:
    return Path(os.path.expanduser(name))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no name of a file
        return False


def _kind_of(path: Path) -> str | None:
    """What a file is that nothing here reads, by its first bytes."""
    kind = None if path.suffix == ".json" else kind_of_file(path)
    return kind if kind in UNREAD or (kind or "").startswith(("compressed", "a pointer")) else None


def _is_safetensors(path: Path) -> bool:
    """Is it a safetensors file of marlin's own that holds no weights: statistics, or a state?"""
    try:
        if kind_of_file(path) != "safetensors":
            return False
        return holds_statistics(path) or safetensors_header(path)[1].get("format") == FORMAT
    except (MarlinError, OSError):
        return False


def _settings(name: str) -> Any | None:
    """The settings of what is a configuration and no weights."""
    return None if holds_weights(name) else settings_alone(name)


def _model(name: str, device: Device, options: ImportOptions, with_fingerprint: bool) -> ModelInfo:
    path = locate_model(name)
    if options.heads == "auto":
        raise UsageError("--import heads=auto tries numbers by running the model, which info does not; name a number")
    architecture = architecture_at(path)
    checkpoint = read_checkpoint(path, options, check_values=with_fingerprint)
    network = build(checkpoint.config, checkpoint.weights, checkpoint.quantization, where=name)
    parameters = dict(tree_flatten(network.parameters()))
    stored = bytes_by_part(checkpoint.weights)
    loaded = bytes_in_float32(parameters, architecture.looked_up) if device.name == "cpu" else bytes_by_part(parameters)
    formats: dict[str, set[str]] = defaultdict(set)
    for layer, module in matrices_of(network).items():
        formats[part_of_weight(f"{layer}.weight")].add(_format(module))
    marlin = {key: value for key, value in (checkpoint.marlin or {}).items() if isinstance(value, (str, int, float, dict))}
    return ModelInfo(
        path=str(path),
        architecture=architecture_named(checkpoint.config, name).title,
        layout=checkpoint.layout,
        commands=_commands(architecture.capability, network.config),
        config=config_as_mapping(network.config),
        parts=[
            Part(part, count, 8 * stored.get(part, 0) / count, sorted(formats[part]), stored.get(part, 0), loaded.get(part, 0))
            for part, count in weights_by_part(network).items()
        ],
        disk_bytes=sum(file.stat().st_size for file in files_of(path)),
        fingerprint=fingerprint(path, options) if with_fingerprint else None,
        marlin=marlin,
    )


def _format(layer: Any) -> str:
    if isinstance(layer, (QuantizedLinear, PackedTable)):
        return f"int{layer.bits}" if layer.mode == "affine" else str(layer.mode)
    return str(layer.weight.dtype).removeprefix("mlx.core.")
