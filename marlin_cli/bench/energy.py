"""Energy by the counters of the processor packages, where Linux shows them (powercap: RAPL of Intel and AMD)."""

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyCounter:
    """Joules used by all processor packages of the machine, by whatever runs there; without counters it tells nothing.

    Args:
        root: the folder of powercap zones. Many systems let none but root read them.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        # intel-rapl:0 is a package, intel-rapl:0:1 a part of it that the package's counter includes.
        self._root = root
        packages = sorted(zone for zone in root.glob("intel-rapl:*") if zone.name.count(":") == 1)
        self._zones = [(zone / "energy_uj", _number(zone / "max_energy_range_uj")) for zone in packages]

    @property
    def reason(self) -> str:
        """Whether energy is counted here, and why it is not."""
        if self.read() is not None:
            return "counted by the processor packages"
        if not self._zones:
            return f"unknown: {self._root} has no counters of processor packages"
        return f"unknown: {self._zones[0][0]} cannot be read by this user"

    def read(self) -> list[int] | None:
        """Microjoules of each package, from any start; None where one cannot be read."""
        found = [_number(counter) for counter, _ in self._zones]
        readable = [value for value in found if value is not None]
        return readable if readable and len(readable) == len(found) else None

    def joules(self, before: list[int] | None, after: list[int] | None) -> float | None:
        """Joules between two readings, less than one turn of a counter apart (minutes at the least)."""
        if before is None or after is None:
            return None
        total = 0
        for (_, largest), first, last in zip(self._zones, before, after, strict=True):
            total += last - first if last >= first else last - first + (largest or 0)
        return total / 1e6


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
