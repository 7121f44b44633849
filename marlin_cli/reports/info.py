"""What `marlin info` tells: of this installation, of a model, of a file of statistics. Runs no model and builds nothing."""

import dataclasses
import importlib.util
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from marlin_cli.api import architecture_at
from marlin_cli.bench.machine import Machine, describe_machine
from marlin_cli.checkpoints import ImportOptions, files_of, fingerprint, read_checkpoint
from marlin_cli.checkpoints.location import locate_model
from marlin_cli.errors import UsageError
from marlin_cli.models import Capability, architecture_named, build, config_as_mapping, linear_layers, part_of
from marlin_cli.ops import QuantizedLinear
from marlin_cli.ops.cpu import kernels, wanted_kernels
from marlin_cli.ops.cpu_build import BuildError, are_built, cache_folder
from marlin_cli.ops.device import Device
from marlin_cli.prediction.sizes import bytes_by_part, bytes_in_float32, weights_by_part
from marlin_cli.reports.forms import Table
from marlin_cli.statistics.show import Summary, summarise
from marlin_cli.statistics.store import holds_statistics, load_statistics

# What optional parts of marlin import, by the name of the extra.
EXTRAS = {"plot": "matplotlib", "gguf": "gguf", "serve": "starlette"}

# The commands that a model is for, by what it does.
COMMANDS = {
    Capability.CONTINUES: ("calibrate", "quantize", "generate", "serve", "bench"),
    Capability.ANSWERS: ("calibrate", "quantize", "generate", "encode", "serve", "bench"),
    Capability.ENCODES: ("calibrate", "quantize", "label", "encode", "bench"),
}

# Fields of a configuration that say how much it reads, by the name that the table gives them.
LENGTHS = {"patch_size": "bytes of a patch", "max_bytes": "context, bytes", "max_positions": "context, positions"}


@dataclass(frozen=True)
class Installation:
    """What runs here, and why."""

    machine: Machine
    kernels: str  # which kernels run on the device
    kernels_reason: str
    cache: str  # the folder of what marlin builds
    cache_bytes: int
    memory_bytes: int  # of the machine
    extras: dict[str, bool]  # is what the extra needs installed?


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
class StatisticsInfo:
    """What a file of statistics holds."""

    path: str
    summary: Summary
    hessians: bool


def installation(device: Device) -> Installation:
    """This machine, its device, the kernels and the cache."""
    name, reason = _kernels(device)
    cache = cache_folder()
    return Installation(
        machine=describe_machine(device),
        kernels=name,
        kernels_reason=reason,
        cache=str(cache),
        cache_bytes=sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) if cache.is_dir() else 0,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        extras={extra: importlib.util.find_spec(module) is not None for extra, module in EXTRAS.items()},
    )


def describe(name: str, device: Device, options: ImportOptions, *, with_fingerprint: bool) -> ModelInfo | StatisticsInfo:
    """What a name stands for: a model as every command takes it, or a file that marlin wrote.

    Args:
        with_fingerprint: read all bytes of a model for it.

    Raises:
        MarlinError: neither, or it cannot be read.
    """
    if names_statistics(name):
        path = Path(os.path.expanduser(name))
        statistics = load_statistics(path)
        return StatisticsInfo(str(path), summarise(statistics), bool(statistics.hessians))
    return _model(name, device, options, with_fingerprint)


def names_statistics(name: str) -> bool:
    """Does a name stand for a file of statistics? Else it is a model's."""
    path = Path(os.path.expanduser(name))
    try:
        return path.suffix == ".safetensors" and path.is_file() and path.stat().st_size > 0 and holds_statistics(path)
    except (OSError, ValueError):  # no name of a file
        return False


def _model(name: str, device: Device, options: ImportOptions, with_fingerprint: bool) -> ModelInfo:
    path = locate_model(name)
    if options.heads == "auto":
        raise UsageError("--import heads=auto tries numbers by running the model, which info does not; name a number")
    architecture = architecture_at(path)
    checkpoint = read_checkpoint(path, options, check_values=False)
    network = build(checkpoint.config, checkpoint.weights, checkpoint.quantization, where=name)
    parameters = dict(tree_flatten(network.parameters()))
    stored = bytes_by_part(checkpoint.weights)
    loaded = (bytes_in_float32 if device.name == "cpu" else bytes_by_part)(parameters)
    formats: dict[str, set[str]] = defaultdict(set)
    for layer, module in linear_layers(network).items():
        formats[part_of(layer)].add(_format(module))
    marlin = {key: value for key, value in (checkpoint.marlin or {}).items() if isinstance(value, (str, int, float, dict))}
    return ModelInfo(
        path=str(path),
        architecture=architecture_named(checkpoint.config, name).title,
        layout=checkpoint.layout,
        commands=list(COMMANDS[architecture.capability]),
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
    if isinstance(layer, QuantizedLinear):
        return f"int{layer.bits}" if layer.mode == "affine" else str(layer.mode)
    return str(layer.weight.dtype).removeprefix("mlx.core.")


def _kernels(device: Device) -> tuple[str, str]:
    """Which kernels run on a device, and why; builds nothing."""
    if device.name != "cpu":
        return f"marlin's for {device.name}", "compiled at first use of each; `marlin bench --kernels` lists them"
    if wanted_kernels() == "reference":
        return "MLX's", "MARLIN_KERNELS=reference"
    try:
        if not are_built():
            return "marlin's for this processor, not built yet", "the first model that runs builds them, in about half a minute"
    except BuildError as error:
        return "MLX's, which are slower", str(error)
    module, reason = kernels()
    return ("MLX's, which are slower" if module is None else f"marlin's, {module.processor_class()}"), reason


def installation_table(found: Installation) -> Table:
    """What runs here, a line each."""
    machine = found.machine
    missing = [f"{extra} (pip install marlin-cli[{extra}])" for extra, here in found.extras.items() if not here]
    rows = [
        ["marlin", machine.marlin_version],
        ["mlx, python", f"{machine.mlx_version}, {machine.python_version}"],
        ["machine", f"{machine.system}, {machine.logical_cpus} processors, {found.memory_bytes / 2**30:.1f} GiB"],
        ["device", f"{machine.device}: {machine.device_name} ({machine.device_reason})"],
        ["kernels", f"{found.kernels} ({found.kernels_reason})"],
        ["cache", f"{found.cache} ({found.cache_bytes:,} bytes)"],
        ["not installed", ", ".join(missing) or "nothing"],
    ]
    return Table("This installation", ["", ""], rows, numbers=False)


def tables_of(found: ModelInfo | StatisticsInfo) -> list[Table]:
    """What is known of a model or a file, for people."""
    return _statistics_tables(found) if isinstance(found, StatisticsInfo) else _model_tables(found)


def _model_tables(found: ModelInfo) -> list[Table]:
    lengths = [[title, f"{found.config[field]:,}"] for field, title in LENGTHS.items() if field in found.config]
    facts = [
        ["is", f"{found.architecture}, {found.layout} layout"],
        ["for", ", ".join(f"marlin {command}" for command in found.commands)],
        *lengths,
        ["on disk", f"{found.disk_bytes:,} bytes"],
        *([] if found.fingerprint is None else [["fingerprint", found.fingerprint[:12]]]),
        *([key.replace("_", " "), _value(value)] for key, value in found.marlin.items()),
    ]
    rows = [
        [part.part, ", ".join(part.formats), f"{part.weights:,}", f"{part.bits_per_weight:.2f}", f"{part.stored_bytes:,}",
         f"{part.loaded_bytes:,}"]
        for part in found.parts
    ]  # fmt: skip
    stored = sum(part.stored_bytes for part in found.parts)
    rows.append(
        ["all", "", f"{found.weights:,}", f"{8 * stored / found.weights:.2f}", f"{stored:,}", f"{found.loaded_bytes:,}"]
    )
    columns = ["part", "layers in", "weights", "bits/weight", "bytes stored", "bytes loaded"]
    return [Table(found.path, ["", ""], facts, numbers=False), Table("Weights", columns, rows)]


def _statistics_tables(found: StatisticsInfo) -> list[Table]:
    summary = found.summary
    domains = ", ".join(f"{name} {count:,}" for name, count in summary.domains.items())
    rows = [
        ["is", "statistics of marlin calibrate (--show prints all of them)"],
        ["of the model", summary.model[:12]],
        ["bytes", f"{summary.bytes:,} ({domains})"],
        ["windows", ", ".join(f"{run.sequence_bytes:,} bytes, seed {run.seed}" for run in summary.runs)],
        ["layers", f"{sum(len(each.layers) for each in summary.layers):,}, attentions {len(summary.attentions):,}"],
        ["Hessians", "yes: fit for --method gptq and awq" if found.hessians else "no (calibrate --hessian keeps them)"],
    ]
    return [Table(found.path, ["", ""], rows, numbers=False)]


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={_value(each)}" for key, each in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def document_of(found: Installation, described: Sequence[ModelInfo | StatisticsInfo]) -> dict[str, Any]:
    """All of it as plain values."""
    kinds = {ModelInfo: "model", StatisticsInfo: "statistics"}
    return {
        "installation": dataclasses.asdict(found),
        "described": [{"kind": kinds[type(each)], **dataclasses.asdict(each)} for each in described],
    }
