"""What calibration measured, as immutable arrays, and how two measurements become one. No network, no files."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from marlin_cli.config import did_you_mean
from marlin_cli.errors import StatisticsError
from marlin_cli.statistics.hessians import HessianMapping, SummedHessians
from marlin_cli.statistics.possible import check_domains, check_moments
from marlin_cli.text import quoted

# The mappings of `Totals`.
KINDS = ("inputs", "keys", "values")


@dataclass(frozen=True)
class Moments:
    """Sums over rows of activations, by domain, group and channel.

    A group is a row of the stage's sequence where a layer's input is measured (the leading row is 0, and row i stands
    where byte i of a patch is predicted; one group of all patches in the global stage), and a head where keys or
    values are.

    Attributes:
        count: rows [domains, groups], int64.
        sum_squares: [domains, groups, channels], float64.
        absolute_maximum: [domains, groups, channels], float32.
    """

    count: npt.NDArray[np.int64]
    sum_squares: npt.NDArray[np.float64]
    absolute_maximum: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Totals:
    """All that was measured over some bytes.

    Attributes:
        domains: bytes by domain; its order is that of the first axis of every array.
        inputs: what enters a linear layer, by path; of layers that share an input the first one's path alone.
        keys, values: what a layer would cache (keys after rotation), by path of the attention.
    """

    domains: Mapping[str, int]
    inputs: Mapping[str, Moments]
    keys: Mapping[str, Moments]
    values: Mapping[str, Moments]

    def items(self) -> Iterator[tuple[str, str, Moments]]:
        """(kind, path, moments) of everything, by path within a kind."""
        for kind in KINDS:
            by_path: Mapping[str, Moments] = getattr(self, kind)
            for path in sorted(by_path):
                yield kind, path, by_path[path]


@dataclass(frozen=True)
class Run:
    """One pass over (a share of) a corpus: whatever decides which windows were measured."""

    corpus: str  # fingerprint
    sequence_bytes: int
    seed: int
    max_bytes: int | None
    shard_index: int = 0  # this run took every window whose number leaves this rest ..
    shard_count: int = 1  # .. when divided by this

    def overlaps(self, other: "Run") -> bool:
        """Did both runs measure some window of the same corpus?"""
        same = dataclasses.replace(self, shard_index=0, shard_count=1) == dataclasses.replace(
            other, shard_index=0, shard_count=1
        )
        common = math.gcd(self.shard_count, other.shard_count)
        return same and self.shard_index % common == other.shard_index % common


def check_run(run: Run) -> None:
    """See that a run can have been.

    Raises:
        StatisticsError: sizes below 1, or a shard that is none.
    """
    sizes = [run.sequence_bytes, run.shard_count] + ([] if run.max_bytes is None else [run.max_bytes])
    if min(sizes) < 1 or not 0 <= run.shard_index < run.shard_count:
        raise StatisticsError(f"a run of sizes that cannot be: {quoted(dataclasses.asdict(run))}")


@dataclass(frozen=True)
class Statistics:
    """Activation statistics of one model.

    Attributes:
        model: fingerprint of the model.
        layers: path of every linear layer -> path under which `totals.inputs` has its input.
        runs: what went in.
        totals: the arrays.
        hessians: sums of x^T x [channels, channels] by (path as in `totals.inputs`, domain); empty if not measured.
            They may be read from their file at each access: keep what is used twice.
    """

    model: str
    layers: Mapping[str, str]
    runs: tuple[Run, ...]
    totals: Totals
    hessians: HessianMapping = field(default_factory=dict)

    @property
    def domains(self) -> Mapping[str, int]:
        """Bytes by domain."""
        return self.totals.domains

    @property
    def total_bytes(self) -> int:
        """Bytes of all domains."""
        return sum(self.domains.values())

    def fingerprint(self) -> str:
        """SHA-256 over every number and where it came from."""
        facts = [self.model, dict(self.layers), [dataclasses.asdict(run) for run in self.runs], dict(self.domains)]
        digest = hashlib.sha256(json.dumps(facts).encode())
        for kind, path, moments in self.totals.items():
            digest.update(f"{kind}.{path}".encode())
            for array in (moments.count, moments.sum_squares, moments.absolute_maximum):
                digest.update(np.ascontiguousarray(array).data)
        for path, domain in sorted(self.hessians):
            digest.update(f"hessians.{path}.{domain}".encode())
            digest.update(np.ascontiguousarray(self.hessians[path, domain]).data)
        return digest.hexdigest()

    def mean_square(self, path: str, domain_weights: Mapping[str, float] | None = None) -> npt.NDArray[np.float32]:
        """Mean square of each input channel of a linear layer over all rows: [channels].

        A layer that no row reached has no preference: ones.

        Args:
            domain_weights: share of each domain in the mean, in any unit; the bytes seen of each if None. A domain
                that is left out counts nothing.

        Raises:
            StatisticsError: no such layer or domain, or weights that are negative or all zero.
        """
        moments = self._input_of(path)
        weights = self._weights(self.domains if domain_weights is None else domain_weights)
        rows = moments.count.sum(axis=1)
        weights = np.where(rows > 0, weights, 0.0)
        if not weights.any():
            return np.ones(moments.sum_squares.shape[-1], dtype=np.float32)
        by_domain = moments.sum_squares.sum(axis=1) / np.maximum(rows, 1)[:, None]
        mean: npt.NDArray[np.float64] = weights @ by_domain / weights.sum()
        return mean.astype(np.float32)

    def hessian(self, path: str, domain_weights: Mapping[str, float] | None = None) -> npt.NDArray[np.float64] | None:
        """Mean of x^T x over the rows x of a linear layer's input: [channels, channels]; None if it was not measured.

        Args:
            domain_weights: as in `mean_square`.

        Raises:
            StatisticsError: as `mean_square`.
        """
        rows = self._input_of(path).count.sum(axis=1)
        source = self.layers[path]
        weights = np.where(rows > 0, self._weights(self.domains if domain_weights is None else domain_weights), 0.0)
        used = [
            (weight / count, self.hessians[source, domain])
            for domain, weight, count in zip(self.domains, weights, rows, strict=True)
            if weight > 0 and (source, domain) in self.hessians
        ]
        if not used:
            return None
        total: npt.NDArray[np.float64] = np.zeros(used[0][1].shape, np.float64)
        for share, summed in used:
            total += share * summed
        return total / weights.sum()

    def absolute_maximum(self, path: str) -> npt.NDArray[np.float32]:
        """Largest absolute value of each input channel of a linear layer: [channels].

        Raises:
            StatisticsError: no such layer.
        """
        largest: npt.NDArray[np.float32] = self._input_of(path).absolute_maximum.max(axis=(0, 1), initial=0.0)
        return largest

    def rows(self, path: str) -> int:
        """How many rows of a linear layer's input were measured.

        Raises:
            StatisticsError: no such layer.
        """
        return int(self._input_of(path).count.sum())

    def _input_of(self, path: str) -> Moments:
        if path not in self.layers:
            raise StatisticsError(f"the statistics hold no layer {quoted(path)}; they belong to another model")
        return self.totals.inputs[self.layers[path]]

    def _weights(self, domain_weights: Mapping[str, float]) -> npt.NDArray[np.float64]:
        unknown = [name for name in domain_weights if name not in self.domains]
        if unknown:
            raise StatisticsError(f"no domain {quoted(unknown[0])} in the statistics{did_you_mean(unknown[0], self.domains)}")
        weights = np.array([domain_weights.get(name, 0) for name in self.domains], dtype=np.float64)
        if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
            raise StatisticsError(
                f"weights of domains must be zero or more, and one above it; found {quoted(dict(domain_weights))}"
            )
        return weights


def merge(a: Statistics, b: Statistics) -> Statistics:
    """The statistics of all bytes of both.

    Counts and maxima are what one run over everything would give, bit for bit; sums are so up to the rounding of
    float64 (about 1e-16 of a sum), since they are added in another order. merge(a, b) and merge(b, a) hold the same
    numbers.

    Raises:
        StatisticsError: they are of different models, measured some window twice, or add up to what cannot be.
    """
    if a.model != b.model:
        raise StatisticsError(
            f"statistics of another model ({quoted(b.model[:12])}, not {quoted(a.model[:12])}); measure the same one"
        )
    if a.layers != b.layers:
        raise StatisticsError("the statistics are of layers of other names; the file is damaged")
    for one in a.runs:
        if any(one.overlaps(other) for other in b.runs):
            raise StatisticsError(f"windows of the same corpus (seed {quoted(one.seed)}) are counted already; leave it out")
    if bool(a.hessians) != bool(b.hessians):
        raise StatisticsError("one of the statistics holds Hessians, the other none; calibrate both with --hessian or neither")
    totals = pool(a.totals, b.totals)
    check_domains(totals.domains)
    for kind, path, moments in totals.items():
        check_moments(f"{kind}.{path}", moments.count, moments.sum_squares, moments.absolute_maximum)
    return Statistics(a.model, a.layers, a.runs + b.runs, totals, SummedHessians(a.hessians, b.hessians))


def pool(a: Totals, b: Totals) -> Totals:
    """Both sets of rows as one; they are of the same network. Domains come out sorted by name.

    Raises:
        StatisticsError: they are of layers of other names or shapes.
    """
    if _shapes(a) != _shapes(b):
        raise StatisticsError("the statistics are of layers of another shape; the file is damaged")
    names = sorted({*a.domains, *b.domains})
    place = {name: number for number, name in enumerate(names)}
    places = [place[name] for name in a.domains], [place[name] for name in b.domains]

    def pooled(some: Mapping[str, Moments], others: Mapping[str, Moments]) -> dict[str, Moments]:
        return {path: _pooled(some[path], others[path], places, len(names)) for path in some}

    return Totals(
        domains={name: a.domains.get(name, 0) + b.domains.get(name, 0) for name in names},
        inputs=pooled(a.inputs, b.inputs),
        keys=pooled(a.keys, b.keys),
        values=pooled(a.values, b.values),
    )


def _pooled(a: Moments, b: Moments, places: tuple[list[int], list[int]], domains: int) -> Moments:
    pooled = Moments(
        count=np.zeros((domains, *a.count.shape[1:]), np.int64),
        sum_squares=np.zeros((domains, *a.sum_squares.shape[1:]), np.float64),
        absolute_maximum=np.zeros((domains, *a.absolute_maximum.shape[1:]), np.float32),
    )
    for part, at in zip((a, b), places, strict=True):
        pooled.count[at] += part.count
        pooled.sum_squares[at] += part.sum_squares
        pooled.absolute_maximum[at] = np.maximum(pooled.absolute_maximum[at], part.absolute_maximum)
    return pooled


def _shapes(totals: Totals) -> list[tuple[str, str, tuple[int, ...]]]:
    """Groups and channels of every array."""
    return [(kind, path, moments.sum_squares.shape[1:]) for kind, path, moments in totals.items()]
