"""Bits per byte that changed models lose on the same held-out windows as the original, kept in a file as they are measured."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from published import machine

from marlin_cli.engine.scoring import bits_of
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.quality.estimates import ratio

WINDOW_BYTES = 2048

Key = tuple[object, ...]


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


class KeptLosses:
    """Bits of the same held-out pieces by model; what `results` (a file of JSON lines) has already is not measured again.

    `divergences` is the KL divergence from the original's predictions, for scores that tell it.
    """

    def __init__(self, results: Path, sizes: np.ndarray, score: Callable[[Any], Mapping[str, np.ndarray]]) -> None:
        """`score` gives `bits` of each piece [pieces], whose bytes are `sizes`, and perhaps its `divergence` in bits."""
        self.results, self.sizes, self.score = results, sizes, score
        self.bits: dict[Key, np.ndarray] = {}
        self.divergences: dict[Key, np.ndarray] = {}
        self.machines: dict[Key, str] = {}
        for line in results.read_text().splitlines() if results.exists() else []:
            self._take(json.loads(line))

    def measure(self, key: Key, make: Callable[[], Any]) -> np.ndarray:
        """The bits by the model that `make` makes."""
        if key not in self.bits:
            start = time.perf_counter()
            model = make()
            made = time.perf_counter() - start
            scores = {name: values.tolist() for name, values in self.score(model).items()}
            row = {"key": key, **scores, "seconds_to_make": round(made, 1), "machine": machine()}
            with self.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self._take(row)
        return self.bits[key]

    def _take(self, row: Mapping[str, Any]) -> None:
        key = tuple(row["key"])
        self.bits[key], self.machines[key] = np.array(row["bits"]), row.get("machine", "")
        if "divergence" in row:
            self.divergences[key] = np.array(row["divergence"])

    def bits_per_byte(self, key: Key) -> float:
        """All bits over all bytes."""
        return float(self.bits[key].sum() / self.sizes.sum())

    def difference(self, key: Key, other: Key) -> tuple[float, float]:
        """Bits per byte that `key` takes more than `other`, and the standard error over pieces."""
        found = ratio(self.bits[key] - self.bits[other], self.sizes)
        return found.value, float(found.standard_error or 0)

    def cell(self, key: Key, base: Key, own: Key, marks: dict[str, str]) -> str:
        """What `key` loses in a table's cell, its share of what `own` loses beyond two standard errors, its machine's mark."""
        if key not in self.bits:
            return ""
        loss, error = self.difference(key, base)
        text = f"{loss:.4f} ± {error:.4f}"
        whole, doubt = self.difference(own, base) if own in self.bits else (0.0, 0.0)
        if key != own and whole > 2 * doubt:
            text += f" ({loss / whole:.0%})"
        return text + marks[self.machines[key]]

    def divergence(self, key: Key) -> tuple[float, float]:
        """KL divergence in bits per byte, and its standard error over pieces."""
        found = ratio(self.divergences[key], self.sizes)
        return found.value, float(found.standard_error or 0)

    def divergence_cell(self, key: Key, own: Key, marks: dict[str, str]) -> str:
        """The divergence of `key` in a table's cell, its share of that of `own`, its machine's mark."""
        if key not in self.divergences:
            return ""
        value, error = self.divergence(key)
        text = f"{value:.5f} ± {error:.5f}"
        if key != own and own in self.divergences:
            text += f" ({value / self.divergence(own)[0]:.0%})"
        return text + marks[self.machines[key]]


class PairedLosses(KeptLosses):
    """Mean bits of each window by MegaByte, in all and by domain."""

    def __init__(self, results: Path, windows: dict[str, list[np.ndarray]]) -> None:
        self.windows = windows
        self.domains = np.array([domain for domain in windows for _ in windows[domain]])
        super().__init__(results, np.ones(len(self.domains)), self._bits_of)

    def bits_per_byte(self, key: Key, domain: str | None = None) -> float:
        """Mean bits per byte over the windows of a domain, or over all."""
        return float(self.bits[key][self._among(domain)].mean())

    def difference(self, key: Key, other: Key, domain: str | None = None) -> tuple[float, float]:
        """Mean of (key - other) over the windows of a domain, or over all, and its standard error."""
        lost = (self.bits[key] - self.bits[other])[self._among(domain)]
        return float(lost.mean()), float(lost.std(ddof=1) / len(lost) ** 0.5)

    def line(self, key: Key, base: Key) -> str:
        """What `key` loses against `base`, in all and by domain."""
        by_domain = [f"{name} {_signed(self.difference(key, base, name))}" for name in self.windows]
        return f"{' '.join(map(str, key)):40} {_signed(self.difference(key, base))}  ({', '.join(by_domain)})"

    def _bits_of(self, network: MegaByte) -> dict[str, np.ndarray]:
        every = [window for part in self.windows.values() for window in part]
        return {"bits": np.array([float(bits_of(network, window, WINDOW_BYTES).mean()) for window in every])}

    def _among(self, domain: str | None) -> np.ndarray:
        return np.full(len(self.domains), True) if domain is None else self.domains == domain


def _signed(found: tuple[float, float]) -> str:
    return f"{found[0]:+.5f} ± {found[1]:.5f}"
