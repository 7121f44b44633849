"""Tables that benchmarks write into a Markdown file, between two lines that mark the place, and the machine they name."""

import os
import platform
from pathlib import Path

import mlx.core as mx

Markers = tuple[str, str]


def markers_of(name: str) -> Markers:
    """The lines that begin and end the place of a benchmark's table."""
    return f"<!-- {name}: written by benchmarks/{name}.py -->\n", f"<!-- end of {name} -->\n"


def write_between_markers(file: Path, text: str, markers: Markers) -> None:
    """Put the table in the place that the file has for it."""
    whole = file.read_text(encoding="utf-8")
    first, last = markers
    if whole.count(first) != 1 or last not in whole.split(first)[1]:
        raise SystemExit(
            f"{file}: the lines {first.strip()!r} and {last.strip()!r} are not there; add them where the table goes"
        )
    before, _, rest = whole.partition(first)
    file.write_text(f"{before}{first}{text}{last}{rest.partition(last)[2]}", encoding="utf-8")


def machine() -> str:
    """Processor, cores and system, and the GPU if that is what multiplies."""
    gpu = "" if mx.default_device().type == mx.DeviceType.cpu else f"{mx.device_info().get('device_name', 'a GPU')}; "
    return f"{gpu}{_processor()}, {os.cpu_count()} logical CPUs, {platform.system()}"


def _processor() -> str:
    """The processor's name where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
