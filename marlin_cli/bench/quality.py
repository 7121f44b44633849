"""How well models predict held-out bytes: bits per byte, and divergence from a reference, with standard errors.

Every byte value counts, 0x00 too, and the denominator is bytes. A network is run teacher-forced and without a cache,
so the bits of the cache play no part.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.bench.estimates import Estimate, Floats, ratio, stratified
from marlin_cli.bench.held_out import Window
from marlin_cli.engine.scoring import BYTES_PER_PASS, log2_probabilities
from marlin_cli.errors import CheckpointError, UsageError
from marlin_cli.models.megabyte import MegaByte

REFERENCE = "the reference"


@dataclass(frozen=True)
class Comparison:
    """A model beside the reference, on the same bytes. KL is KL(reference || model) of the next-id distributions."""

    bits_per_byte_difference: Estimate  # the model's less the reference's, paired by window
    kl_bits_per_byte: Estimate
    kl_median_bits: float  # this and the next two: over single bytes
    kl_percentile_99_bits: float
    kl_maximum_bits: float
    top1_agreement: Estimate  # share of bytes where both have the same likeliest id


@dataclass(frozen=True)
class Score:
    """Total bits over total bytes, of one domain or all. The standard error is over windows (see `estimates.ratio`)."""

    bytes: int
    windows: int
    total_bits: float
    bits_per_byte: Estimate
    against_reference: Comparison | None


@dataclass(frozen=True)
class Quality:
    """Scores of one model: by domain, and of all bytes together with the domains as strata."""

    domains: dict[str, Score]
    all_domains: Score


def measure_quality(
    networks: Mapping[str, MegaByte],
    windows: Mapping[str, Sequence[Window]],
    reference: MegaByte | None = None,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> list[Quality]:
    """Score networks (by their names) on the same windows (by domain), each from an empty context.

    Args:
        reference: what the networks are compared with; when it is one of them, it is run once.
        on_bytes: told after each pass how many bytes it scored.

    Raises:
        UsageError: a window longer than a context, or vocabularies that differ from the reference's.
        CheckpointError: predictions that are not finite.
    """
    check_windows_fit(networks, windows, reference)
    tallies = {name: {domain: _Tally() for domain in windows} for name in networks}
    for domain, part in windows.items():
        for batch in _batches(part):
            ids = mx.array(np.stack([window.read() for window in batch]).astype(np.int32))
            expected = None if reference is None else log2_probabilities(reference, ids)
            for name, network in networks.items():
                known = expected if network is reference else None
                predicted = log2_probabilities(network, ids) if known is None else known
                beside = None if expected is None else _beside(predicted, expected, ids)
                tallies[name][domain].add(_costs(predicted, ids, name), beside)
            on_bytes(ids.size)
    return [_quality(by_domain) for by_domain in tallies.values()]


def check_windows_fit(
    networks: Mapping[str, MegaByte], windows: Mapping[str, Sequence[Window]], reference: MegaByte | None
) -> None:
    """Raise the `UsageError` that `measure_quality` would raise."""
    longest = max(window.length for part in windows.values() for window in part)
    for name, network in {**networks, **({} if reference is None else {REFERENCE: reference})}.items():
        config = network.config
        if longest > config.max_bytes:
            raise UsageError(
                f"--window-bytes: {longest} bytes do not fit the context of {name}; ask for {config.max_bytes} or fewer"
            )
        if reference is not None and reference.config.vocab_size != config.vocab_size:
            raise UsageError(
                f"--reference: it predicts {reference.config.vocab_size} ids and {name} {config.vocab_size};"
                " such distributions cannot be compared"
            )


def kl_divergence(expected: mx.array, predicted: mx.array) -> mx.array:
    """KL(expected || predicted) in bits, over the last axis of base-2 log-probabilities [..., vocab]: [...].

    Each id adds p log2(p / q) - (p - q) / ln 2, which is never negative and whose last term sums to nothing: so the
    rounding of the normalisations cancels to first order, and divergences far below it come out.
    """
    p, q = mx.exp(expected * math.log(2)), mx.exp(predicted * math.log(2))
    return (p * (expected - predicted) - (p - q) / math.log(2)).sum(axis=-1)


class _Beside(NamedTuple):
    """A pass of a model beside the reference; all [n, length]."""

    reference_costs: Floats  # bits that each byte costs the reference
    agreements: npt.NDArray[np.bool_]  # is the likeliest id the same?
    divergences: npt.NDArray[np.float32]


@dataclass
class _Tally:
    """One model in one domain, a list entry a pass: sums over each window, and the divergences of single bytes."""

    bytes: list[Floats] = field(default_factory=list)
    bits: list[Floats] = field(default_factory=list)
    reference_bits: list[Floats] = field(default_factory=list)
    agreements: list[Floats] = field(default_factory=list)
    kl: list[Floats] = field(default_factory=list)
    kl_of_bytes: list[npt.NDArray[np.float32]] = field(default_factory=list)

    def add(self, costs: Floats, beside: _Beside | None) -> None:
        """Take in a pass: the bits that its bytes cost [n, length], and how they compare with the reference."""
        windows, length = costs.shape
        self.bytes.append(np.full(windows, length, dtype=np.float64))
        self.bits.append(costs.sum(axis=1))
        if beside is not None:
            self.reference_bits.append(beside.reference_costs.sum(axis=1))
            self.agreements.append(beside.agreements.sum(axis=1, dtype=np.float64))
            self.kl.append(beside.divergences.sum(axis=1, dtype=np.float64))
            self.kl_of_bytes.append(beside.divergences.reshape(-1))


def _batches(windows: Sequence[Window]) -> Iterator[list[Window]]:
    """Windows of equal length in groups of one pass, longest first."""
    ordered = sorted(windows, key=lambda window: -window.length)
    for length, equal in itertools.groupby(ordered, key=lambda window: window.length):
        while batch := list(itertools.islice(equal, max(1, BYTES_PER_PASS // length))):
            yield batch


def _beside(predicted: mx.array, expected: mx.array, ids: mx.array) -> _Beside:
    agreements = mx.argmax(predicted, axis=-1) == mx.argmax(expected, axis=-1)
    divergences = kl_divergence(expected, predicted)
    return _Beside(_costs(expected, ids, REFERENCE), np.array(agreements), np.array(divergences))


def _costs(log2_predictions: mx.array, ids: mx.array, name: str) -> Floats:
    """Bits that each of ids [n, length] costs."""
    chosen = mx.take_along_axis(log2_predictions, ids[..., None], axis=-1)[..., 0]
    costs = -np.array(chosen).astype(np.float64)
    if not np.isfinite(costs).all():
        raise CheckpointError(f"{name}: its predictions are not finite; its weights are damaged or overflow")
    return costs


def _quality(tallies: Mapping[str, _Tally]) -> Quality:
    domains = {domain: _score(tally) for domain, tally in tallies.items()}
    kl_of_bytes = [part for tally in tallies.values() for part in tally.kl_of_bytes]
    return Quality(domains, _pooled(list(domains.values()), kl_of_bytes))


def _score(tally: _Tally) -> Score:
    sizes, bits = np.concatenate(tally.bytes), np.concatenate(tally.bits)
    comparison = None
    if tally.kl:
        comparison = _comparison(
            difference=ratio(bits - np.concatenate(tally.reference_bits), sizes),
            kl=ratio(np.concatenate(tally.kl), sizes),
            agreement=ratio(np.concatenate(tally.agreements), sizes),
            kl_of_bytes=tally.kl_of_bytes,
        )
    return Score(int(sizes.sum()), len(sizes), float(bits.sum()), ratio(bits, sizes), comparison)


def _pooled(scores: Sequence[Score], kl_of_bytes: Sequence[npt.NDArray[np.float32]]) -> Score:
    """All domains together."""
    sizes = [score.bytes for score in scores]
    comparisons = [score.against_reference for score in scores if score.against_reference is not None]
    comparison = None
    if comparisons:
        comparison = _comparison(
            difference=stratified([part.bits_per_byte_difference for part in comparisons], sizes),
            kl=stratified([part.kl_bits_per_byte for part in comparisons], sizes),
            agreement=stratified([part.top1_agreement for part in comparisons], sizes),
            kl_of_bytes=kl_of_bytes,
        )
    return Score(
        bytes=sum(sizes),
        windows=sum(score.windows for score in scores),
        total_bits=math.fsum(score.total_bits for score in scores),
        bits_per_byte=stratified([score.bits_per_byte for score in scores], sizes),
        against_reference=comparison,
    )


def _comparison(
    *, difference: Estimate, kl: Estimate, agreement: Estimate, kl_of_bytes: Sequence[npt.NDArray[np.float32]]
) -> Comparison:
    median, high, maximum = (float(value) for value in np.percentile(np.concatenate(kl_of_bytes), [50, 99, 100]))
    return Comparison(difference, kl, median, high, maximum, agreement)
