"""How well models predict held-out bytes: bits per byte, and divergence from a reference, with standard errors.

Every byte value counts, 0x00 too, and the denominator is bytes. A network is run teacher-forced and without a cache,
so the bits of the cache play no part.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.engine.finite import not_finite
from marlin_cli.engine.scoring import BYTES_PER_PASS, costs, log2_probabilities, of_bytes
from marlin_cli.errors import UsageError
from marlin_cli.models import Network, architecture_of, continuing_of
from marlin_cli.quality.byte_classes import BYTE_CLASSES, MARGIN_BYTES, classes_of
from marlin_cli.quality.estimates import Estimate, Floats, ratio, stratified
from marlin_cli.quality.held_out import Window
from marlin_cli.quality.journal import Journal
from marlin_cli.quality.pass_sums import ALL, FIRST_CLASS, FIRST_POSITION, Groups, PassSums, from_bytes, to_bytes
from marlin_cli.ranks import ALONE, Ranks
from marlin_cli.text import quoted

REFERENCE = "the reference"

# Log-probabilities [n, length, vocab] of bytes [n, length], computed by the call unless they are at hand.
Kept: TypeAlias = Callable[[npt.NDArray[np.uint8], Callable[[], mx.array]], mx.array]


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
    """Scores of one model: by domain, and of all bytes together with the domains as strata.

    The rest is of all domains as one sample: by what kind of byte it is (`byte_classes`), and by its place in the
    patch of the model, from "0" on. A class or place that no byte has is left out.
    """

    domains: dict[str, Score]
    all_domains: Score
    byte_classes: dict[str, Score] = field(default_factory=dict)
    patch_positions: dict[str, Score] = field(default_factory=dict)
    # By global layer, of a cache that leaves pages out: those that were read, and of how many.
    pages_read: tuple[tuple[int, int], ...] = ()


def measure_quality(
    networks: Mapping[str, Network],
    windows: Mapping[str, Sequence[Window]],
    reference: Network | None = None,
    on_bytes: Callable[[int], None] = lambda count: None,
    *,
    kept_reference: Kept = lambda ids, compute: compute(),
    journal: Journal | None = None,
    ranks: Ranks = ALONE,
) -> list[Quality]:
    """Score networks (by their names) on the same windows (by domain), each from an empty context.

    Ranks share the passes out, each to be done by one of them whole, and put their sums together in the order of the
    passes: so any number of ranks gives the same numbers, bit for bit, and every rank gets them.

    Args:
        reference: what the networks are compared with; when it is one of them, it is run once.
        on_bytes: told after each pass how many bytes it scored.
        kept_reference: where the reference's log-probabilities of given bytes may lie already (see `ReferenceCache`).
        journal: has the sums of passes that were done before, and takes those of each that is.

    Raises:
        UsageError: a window longer than a context, or vocabularies that differ from the reference's.
        CheckpointError: predictions that are not finite.
        DistributedError: another rank ended.
    """
    check_windows_fit(networks, windows, reference)
    passes = [(domain, batch) for domain, part in windows.items() for batch in _batches(part)]
    done = {} if journal is None else journal.load()
    for number in range(ranks.rank, len(passes), ranks.size):
        domain, batch = passes[number]
        if number not in done or not _fits(done[number], networks, batch, reference):
            done[number] = _measured(networks, domain, batch, reference, kept_reference)
            if journal is not None:
                journal.add(number, done[number])
        on_bytes(sum(window.scored for window in batch))
    if journal is not None:
        journal.save()
    results = _gathered(done, len(passes), ranks)
    tallies: list[dict[str, list[PassSums]]] = [{domain: [] for domain in windows} for _ in networks]
    for (domain, _), result in zip(passes, results, strict=True):
        for tally, sums in zip(tallies, result, strict=True):
            tally[domain].append(sums)
    return [quality_of(by_domain) for by_domain in tallies]


def check_windows_fit(
    networks: Mapping[str, Network], windows: Mapping[str, Sequence[Window]], reference: Network | None
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
        if reference is not None and continuing_of(reference).first_byte != continuing_of(network).first_byte:
            raise UsageError(f"--reference: its ids are others than those of {name}; such distributions cannot be compared")


def kl_divergence(expected: mx.array, predicted: mx.array) -> mx.array:
    """KL(expected || predicted) in bits, over the last axis of base-2 log-probabilities [..., vocab]: [...].

    Each id adds p log2(p / q) - (p - q) / ln 2, which is never negative and whose last term sums to nothing: so the
    rounding of the normalisations cancels to first order, and divergences far below it come out.
    """
    p, q = mx.exp(expected * math.log(2)), mx.exp(predicted * math.log(2))
    return (p * (expected - predicted) - (p - q) / math.log(2)).sum(axis=-1)


def _batches(windows: Sequence[Window]) -> Iterator[list[Window]]:
    """Windows of equal length and context in groups of one pass, longest first."""
    ordered = sorted(windows, key=lambda window: (-window.length, window.context))
    for (length, _), equal in itertools.groupby(ordered, key=lambda window: (window.length, window.context)):
        while batch := list(itertools.islice(equal, max(1, BYTES_PER_PASS // length))):
            yield batch


def _measured(
    networks: Mapping[str, Network], domain: str, batch: Sequence[Window], reference: Network | None, kept: Kept
) -> list[PassSums]:
    """One pass of every network.

    Raises:
        CheckpointError: predictions that are not finite; model and domain are named.
    """
    of_domain = f"its predictions of domain {quoted(domain)}"
    data, classes = read_windows(batch)
    context = batch[0].context
    ids = mx.array(data.astype(np.int32))
    scored = ids[:, context:]
    expected = None
    if reference is not None:
        expected = kept(data, lambda: log2_probabilities(reference, ids))[:, context:]
    results = []
    for name, network in networks.items():
        patch_size = architecture_of(network).unit_bytes(network.config)
        positions = np.broadcast_to(np.arange(context, data.shape[1]) % patch_size, classes.shape)
        groups = Groups(classes, positions, patch_size)
        if expected is None:
            # No distribution is asked for, so none is kept.
            results.append(own_sums(groups, _finite(costs(network, ids)[:, context:], name, of_domain)))
            continue
        predicted = expected if network is reference else log2_probabilities(network, ids)[:, context:]
        own = _finite(-of_bytes(network, predicted, scored), name, of_domain)
        theirs = _finite(-of_bytes(network, expected, scored), REFERENCE, of_domain)
        # An id that neither is about may still be none: a divergence sums over all of them.
        _finite(divergences := kl_divergence(expected, predicted), name, of_domain)
        results.append(_compared(own_sums(groups, own), groups, predicted, expected, np.array(divergences), theirs))
    return results


def _fits(found: Sequence[PassSums], networks: Mapping[str, Network], batch: Sequence[Window], reference: object) -> bool:
    """Are these the sums of such a pass?"""
    groups = [FIRST_POSITION + architecture_of(network).unit_bytes(network.config) for network in networks.values()]
    alike = len(found) == len(groups) and all(
        sums.bytes.shape == (len(batch), count) and bool(len(sums.kl)) == (reference is not None)
        for sums, count in zip(found, groups, strict=True)
    )
    return alike and all(sums.bytes[:, ALL].tolist() == [window.scored for window in batch] for sums in found)


def read_windows(batch: Sequence[Window]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """The bytes of windows alike in length and context [n, length], and the classes of those scored."""
    data, classes = [], []
    for window in batch:
        found, before = window.read_with_margins(MARGIN_BYTES)
        data.append(found[before : before + window.length])
        classes.append(classes_of(found)[before + window.context : before + window.length])
    return np.stack(data), np.stack(classes).astype(np.int64)


def own_sums(groups: Groups, own_costs: Floats) -> PassSums:
    """Those of a model alone."""
    sizes, bits = groups.sums(np.ones_like(own_costs)), groups.sums(own_costs)
    nothing = np.zeros((0, sizes.shape[1]))
    return PassSums(sizes, bits, nothing, nothing, nothing, np.zeros(0, dtype=np.float32), np.zeros((2, 0), dtype=np.uint16))


def _compared(
    alone: PassSums,
    groups: Groups,
    predicted: mx.array,
    expected: mx.array,
    divergences: npt.NDArray[np.float32],
    reference_costs: Floats,
) -> PassSums:
    """With those of its predictions beside the reference's."""
    agreements = mx.argmax(predicted, axis=-1) == mx.argmax(expected, axis=-1)
    return PassSums(
        bytes=alone.bytes,
        bits=alone.bits,
        reference_bits=groups.sums(reference_costs),
        agreements=groups.sums(np.array(agreements)),
        kl=groups.sums(divergences),
        kl_of_bytes=divergences.reshape(-1),
        groups_of_bytes=groups.of_bytes(),
    )


def _finite(bits: mx.array, name: str, what: str) -> Floats:
    """As float64.

    Raises:
        CheckpointError: one of them is not finite.
    """
    found = np.array(bits).astype(np.float64)
    if not np.isfinite(found).all():
        raise not_finite(name, what)
    return found


def _gathered(own: Mapping[int, list[PassSums]], count: int, ranks: Ranks) -> list[list[PassSums]]:
    """The results of all passes, in order, from the ranks that did them."""
    if ranks.size == 1:
        return [own[number] for number in range(count)]
    mine = {number: to_bytes(own[number]) for number in range(ranks.rank, count, ranks.size)}
    sizes = np.array([len(mine[number]) for number in mine], dtype="<i8").tobytes()
    everyone = [_split(payload) for payload in ranks.gather(len(mine).to_bytes(8, "little") + sizes + b"".join(mine.values()))]
    return [from_bytes(everyone[number % ranks.size][number // ranks.size]) for number in range(count)]


def _split(payload: bytes) -> list[bytes]:
    """What one rank gave to `_gathered`: a count, that many sizes, and parts of these sizes."""
    count = int.from_bytes(payload[:8], "little")
    ends = 8 + 8 * count + np.cumsum(np.frombuffer(payload[8 : 8 + 8 * count], dtype="<i8"))
    return [payload[end - size : end] for end, size in zip(ends, np.diff(ends, prepend=8 + 8 * count), strict=True)]


def quality_of(tallies: Mapping[str, Sequence[PassSums]]) -> Quality:
    passes = [sums for tally in tallies.values() for sums in tally]
    domains = {domain: _score(tally) for domain, tally in tallies.items()}
    kl_of_bytes = [sums.kl_of_bytes for sums in passes]
    positions = passes[0].bytes.shape[1] - FIRST_POSITION
    patches = range(positions if positions > 1 else 0)  # where a patch is one byte, no place tells bytes apart
    classes = {name: _score(passes, FIRST_CLASS + number) for number, name in enumerate(BYTE_CLASSES)}
    return Quality(
        domains,
        _pooled(list(domains.values()), kl_of_bytes),
        byte_classes={name: score for name, score in classes.items() if score.bytes},
        patch_positions={str(number): score for number in patches if (score := _score(passes, FIRST_POSITION + number)).bytes},
    )


def _score(passes: Sequence[PassSums], group: int = ALL) -> Score:
    """The bytes of one group, over the windows that have any."""
    sizes = _column(passes, "bytes", group)
    has_any = sizes > 0
    sizes = sizes[has_any]
    if not len(sizes):
        return Score(0, 0, 0.0, Estimate(math.nan, None), None)
    bits = _column(passes, "bits", group)[has_any]
    comparison = None
    if len(passes[0].kl):
        comparison = _comparison(
            difference=ratio(bits - _column(passes, "reference_bits", group)[has_any], sizes),
            kl=ratio(_column(passes, "kl", group)[has_any], sizes),
            agreement=ratio(_column(passes, "agreements", group)[has_any], sizes),
            kl_of_bytes=[_divergences(sums, group) for sums in passes],
        )
    return Score(int(sizes.sum()), len(sizes), float(bits.sum()), ratio(bits, sizes), comparison)


def _column(passes: Sequence[PassSums], name: str, group: int) -> Floats:
    return np.concatenate([getattr(sums, name)[:, group] for sums in passes])


def _divergences(sums: PassSums, group: int) -> npt.NDArray[np.float32]:
    """Those of the single bytes of a group."""
    if group == ALL:
        return sums.kl_of_bytes
    return sums.kl_of_bytes[sums.groups_of_bytes[0 if group < FIRST_POSITION else 1] == group]


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
