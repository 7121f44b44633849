"""Tables and cells that reports of all models share: the machine, the weights, ranges of repeats, percentiles."""

import dataclasses
from collections.abc import Mapping, Sequence

from marlin_cli.bench.machine import Machine
from marlin_cli.bench.spreads import Percentiles, Spread
from marlin_cli.prediction.sizes import PARTS
from marlin_cli.reports.forms import Table

PERCENTILES = "50 %, 90 %, 99 %, longest"


def machine_table(machine: Machine, peak_resident_bytes: int) -> Table:
    """The machine, with the most memory that the run held."""
    columns = ["device", f"{machine.device} ({machine.device_reason})"]
    rows = [
        ["processor", machine.device_name],
        ["system", f"{machine.system}, {machine.logical_cpus} logical CPUs"],
        ["versions", f"marlin {machine.marlin_version}, MLX {machine.mlx_version}, Python {machine.python_version}"],
        ["peak resident bytes", f"{peak_resident_bytes:,}"],
        ["energy", machine.energy],
    ]
    return Table("Machine", columns, rows)


def weights_table(names: Sequence[str], stored: Sequence[Mapping[str, int]], loaded: Sequence[Mapping[str, int]]) -> Table:
    """Bytes by part as stored, and in all as loaded, with a column a model."""
    rows = [
        [part, *(f"{sizes.get(part, 0):,}" for sizes in stored)] for part in PARTS if any(part in sizes for sizes in stored)
    ]
    rows.append(["all, stored", *(f"{sum(sizes.values()):,}" for sizes in stored)])
    rows.append(["all, loaded", *(f"{sum(sizes.values()):,}" for sizes in loaded)])
    return Table("Weights, bytes", ["", *names], rows)


def percentiles(found: Percentiles | None) -> str:
    """Milliseconds, as `PERCENTILES` lists them."""
    if found is None:
        return "-"
    return ", ".join(f"{1000 * value:.4g}" for value in dataclasses.astuple(found))


def range_of(spread: Spread | None, scale: float = 1.0) -> str:
    """Median (smallest .. largest) of what was repeated; empty where nothing was."""
    if spread is None:
        return ""
    median, low, high = (_rounded(scale * value) for value in (spread.median, spread.minimum, spread.maximum))
    return f"{median} ({low} .. {high})"


def _rounded(value: float) -> str:
    """Three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
