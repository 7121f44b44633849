"""Every number of a result as a row: model, measure, part, value."""

from collections.abc import Iterator

from marlin_cli.bench.result import Report
from marlin_cli.bench.throughput import Throughput
from marlin_cli.quality.estimates import Estimate
from marlin_cli.quality.quality import Quality, Score
from marlin_cli.reports.forms import Measurement, measurement_of_spread, measurements_of_percentiles

ALL_DOMAINS = "all"


def measurements(report: Report) -> Iterator[Measurement]:
    """Every number of the report that belongs to a model."""
    for model in report.models:
        for part, size in model.stored_weight_bytes.items():
            yield Measurement(model.model, "stored_weight_bytes", part, size)
        for part, size in model.loaded_weight_bytes.items():
            yield Measurement(model.model, "loaded_weight_bytes", part, size)
        if model.throughput is not None:
            yield from _of_throughput(model.model, model.throughput)
        if model.quality is not None:
            for domain, score in [*scores_of(model.quality), *groups_of(model.quality)]:
                yield from _of_score(model.model, domain, score)


ROOFLINE_BY_PART = (
    "matvec_bytes_per_second", "read_bytes", "read_seconds_by_part", "predicted_seconds_by_part", "bandwidth_reached",
)  # fmt: skip
SPEEDS = "prefill_bytes_per_second", "decode_bytes_per_second", "time_to_first_byte_seconds"


def _of_throughput(model: str, result: Throughput) -> Iterator[Measurement]:
    for measure in SPEEDS:
        yield measurement_of_spread(model, measure, "", getattr(result, measure))
    for measure in ("byte_latency_seconds", "patch_latency_seconds"):
        yield from measurements_of_percentiles(model, measure, "", getattr(result, measure))
    if result.joules_per_byte is not None:
        yield Measurement(model, "joules_per_byte", "", result.joules_per_byte)
    for part, seconds in (result.decode_seconds_by_part or {}).items():
        yield Measurement(model, "decode_seconds_by_part", part, seconds)
    if (found := result.roofline) is not None:
        yield Measurement(model, "copy_bytes_per_second", "", found.copy_bytes_per_second)
        for measure in ROOFLINE_BY_PART:
            for part, value in (getattr(found, measure) or {}).items():
                yield Measurement(model, measure, part, value)
        yield Measurement(model, "roofline_share", "", found.share)
    for point in result.sweep:
        for measure in SPEEDS:
            part = f"context {point.context_bytes}, decoded {point.decode_bytes}, batch {point.batch}"
            yield measurement_of_spread(model, measure, part, getattr(point, measure))
    yield Measurement(model, "decoded_bytes", "", result.decoded_bytes)
    for level, size in result.cache_bytes.items():
        yield Measurement(model, "cache_bytes", level, size)
    yield Measurement(model, "working_memory_bytes", "", result.working_memory_bytes)


def _of_score(model: str, domain: str, score: Score) -> Iterator[Measurement]:
    yield Measurement(model, "scored_bytes", domain, score.bytes)
    yield Measurement(model, "scored_windows", domain, score.windows)
    yield Measurement(model, "total_bits", domain, score.total_bits)
    yield _of_estimate(model, "bits_per_byte", domain, score.bits_per_byte, score.bytes)
    if (beside := score.against_reference) is not None:
        for measure in ("bits_per_byte_difference", "kl_bits_per_byte", "top1_agreement"):
            yield _of_estimate(model, measure, domain, getattr(beside, measure), score.bytes)
        for measure in ("kl_median_bits", "kl_percentile_99_bits", "kl_maximum_bits"):
            yield Measurement(model, measure, domain, getattr(beside, measure), over_bytes=score.bytes)


def _of_estimate(model: str, measure: str, part: str, estimate: Estimate, over_bytes: int) -> Measurement:
    return Measurement(model, measure, part, estimate.value, estimate.standard_error, over_bytes=over_bytes)


def scores_of(quality: Quality) -> list[tuple[str, Score]]:
    """The scores of the domains, and of all of them where there are several."""
    several = [(ALL_DOMAINS, quality.all_domains)] if len(quality.domains) > 1 else []
    return [*quality.domains.items(), *several]


def groups_of(quality: Quality) -> list[tuple[str, Score]]:
    """The scores by class of bytes and by position in the patch."""
    positions = [(f"byte {position} of the patch", score) for position, score in quality.patch_positions.items()]
    return [*quality.byte_classes.items(), *positions]
