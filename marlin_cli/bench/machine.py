"""What a measurement ran on: the machine, its device and the versions. Measures nothing itself."""

import os
import platform
import resource
import sys
from dataclasses import dataclass
from importlib.metadata import version

import mlx.core as mx

from marlin_cli.bench.energy import EnergyCounter
from marlin_cli.ops.device import Device
from marlin_cli.version import __version__


@dataclass(frozen=True)
class Machine:
    """The machine and software of one run."""

    device: str  # metal, cuda or cpu
    device_reason: str  # why this one
    device_name: str  # as MLX has it
    system: str
    logical_cpus: int
    python_version: str
    mlx_version: str
    marlin_version: str
    energy: str = "unknown"  # whether joules can be counted, and if not, why


def describe_machine(device: Device) -> Machine:
    """This machine, with the device that the models run on."""
    return Machine(
        device=device.name,
        device_reason=device.reason,
        device_name=str(mx.device_info().get("device_name", "unknown")),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        logical_cpus=os.cpu_count() or 1,
        python_version=platform.python_version(),
        mlx_version=version("mlx"),
        marlin_version=__version__,
        energy=EnergyCounter().reason,
    )


def peak_resident_bytes() -> int:
    """The most memory that this process has held so far, of everything it did."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
