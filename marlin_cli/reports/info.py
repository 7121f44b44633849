"""What `marlin info` tells, for people and programs: of this installation, and of what names stand for. Builds nothing."""

import dataclasses
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from marlin_cli.bench.machine import Machine, describe_machine
from marlin_cli.ops.cpu import kernels, wanted_kernels
from marlin_cli.ops.cpu_build import BuildError, are_built, cache_folder
from marlin_cli.ops.device import Device
from marlin_cli.reports.described import Described, ModelInfo, ShapeInfo, StateInfo, StatisticsInfo
from marlin_cli.reports.forms import Table

# What optional parts of marlin import, by the name of the extra.
EXTRAS = {"plot": "matplotlib", "gguf": "gguf", "serve": "starlette"}

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


def tables_of(found: Described) -> list[Table]:
    """What is known of a model or a file, for people."""
    match found:
        case ModelInfo():
            return _model_tables(found)
        case ShapeInfo():
            return _shape_tables(found)
        case StatisticsInfo():
            return _statistics_tables(found)
    rows = [["is", "the state of a prompt (marlin generate --load-state reads it)"]]
    facts = {**found.facts, "model": found.facts.get("model", "")[:12]}
    rows += [[name.replace("_", " "), value] for name, value in sorted(facts.items()) if name != "format"]
    return [Table(found.path, ["", ""], [*rows, ["on disk", f"{found.disk_bytes:,} bytes"]], numbers=False)]


def _shape_tables(found: ShapeInfo) -> list[Table]:
    facts = [
        [
            "is",
            f"{found.architecture}, a configuration without weights (marlin quantize {found.path} --plan: what it would take)",
        ],
        ["would be for", ", ".join(f"marlin {command}" for command in found.commands)],
        *_lengths(found.config),
    ]
    rows = [[part.part, f"{part.weights:,}", f"{part.bytes_in_16_bits:,}"] for part in found.parts]
    rows.append(["all", f"{found.weights:,}", f"{2 * found.weights:,}"])
    return [Table(found.path, ["", ""], facts, numbers=False), Table("Weights", ["part", "weights", "bytes in 16 bits"], rows)]


def _lengths(config: Mapping[str, Any]) -> list[list[str]]:
    return [[title, f"{config[field]:,}"] for field, title in LENGTHS.items() if field in config]


def _model_tables(found: ModelInfo) -> list[Table]:
    facts = [
        ["is", f"{found.architecture}, {found.layout} layout"],
        ["for", ", ".join(f"marlin {command}" for command in found.commands)],
        *_lengths(found.config),
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


def document_of(found: Installation, described: Sequence[Described]) -> dict[str, Any]:
    """All of it as plain values."""
    kinds = {ModelInfo: "model", ShapeInfo: "configuration", StatisticsInfo: "statistics", StateInfo: "state"}
    return {
        "installation": dataclasses.asdict(found),
        "described": [{"kind": kinds[type(each)], **dataclasses.asdict(each)} for each in described],
    }
