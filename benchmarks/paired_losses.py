"""Bits per byte that changed models lose on the same held-out windows as the original, kept in a file as they are measured."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from published import machine

from marlin_cli.engine.scoring import bits_of
from marlin_cli.models.megabyte import MegaByte

WINDOW_BYTES = 2048


def spread_windows(folder: Path, count: int) -> dict[str, list[np.ndarray]]:
    """For each domain (a folder inside `folder`) `count` windows, spread evenly over the bytes of all its files."""
    chosen = {}
    for domain in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = [file for file in sorted(domain.rglob("*")) if file.is_file()]
        places = [(file, n * WINDOW_BYTES) for file in files for n in range(file.stat().st_size // WINDOW_BYTES)]
        taken = np.linspace(0, len(places) - 1, min(count, len(places))).astype(int)
        chosen[domain.name] = [
            np.frombuffer(file.read_bytes()[start : start + WINDOW_BYTES], dtype=np.uint8)
            for file, start in (places[index] for index in taken)
        ]
    return chosen


class PairedLosses:
    """Mean bits of each window by model; what `results` (a file of JSON lines) has already is not measured again."""

    def __init__(self, results: Path, windows: dict[str, list[np.ndarray]]) -> None:
        self.windows, self.results = windows, results
        self.domains = np.array([domain for domain in windows for _ in windows[domain]])
        lines = results.read_text().splitlines() if results.exists() else []
        rows = [json.loads(line) for line in lines]
        self.bits = {tuple(row["key"]): np.array(row["bits"]) for row in rows}
        self.machines = {tuple(row["key"]): row.get("machine", "") for row in rows}

    def measure(self, key: tuple[object, ...], make: Callable[[], MegaByte]) -> np.ndarray:
        """Mean bits per byte of each window [windows], domain after domain."""
        if key not in self.bits:
            start = time.perf_counter()
            network = make()
            made = time.perf_counter() - start
            bits = [float(bits_of(network, window, WINDOW_BYTES).mean()) for part in self.windows.values() for window in part]
            with self.results.open("a") as file:
                row = {"key": key, "bits": bits, "seconds_to_make": round(made, 1), "machine": machine()}
                file.write(json.dumps(row) + "\n")
            self.bits[key], self.machines[key] = np.array(bits), machine()
        return self.bits[key]

    def bits_per_byte(self, key: tuple[object, ...], domain: str | None = None) -> float:
        """Mean bits per byte over the windows of a domain, or over all."""
        return float(self.bits[key][self._among(domain)].mean())

    def difference(self, key: tuple[object, ...], other: tuple[object, ...], domain: str | None = None) -> tuple[float, float]:
        """Mean of (key - other) over the windows of a domain, or over all, and its standard error."""
        lost = (self.bits[key] - self.bits[other])[self._among(domain)]
        return float(lost.mean()), float(lost.std(ddof=1) / len(lost) ** 0.5)

    def line(self, key: tuple[object, ...], base: tuple[object, ...]) -> str:
        """What `key` loses against `base`, in all and by domain."""
        by_domain = [f"{name} {_signed(self.difference(key, base, name))}" for name in self.windows]
        return f"{' '.join(map(str, key)):40} {_signed(self.difference(key, base))}  ({', '.join(by_domain)})"

    def _among(self, domain: str | None) -> np.ndarray:
        return np.full(len(self.domains), True) if domain is None else self.domains == domain


def _signed(found: tuple[float, float]) -> str:
    return f"{found[0]:+.5f} ± {found[1]:.5f}"
