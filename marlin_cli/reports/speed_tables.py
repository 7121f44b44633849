"""The tables of speed: at one length of the prompt, by context and number of streams, and beside what reading takes."""

from collections.abc import Sequence

from marlin_cli.bench.result import Report
from marlin_cli.bench.throughput import SweepPoint, Throughput, ThroughputSettings
from marlin_cli.prediction.roofline import Roofline
from marlin_cli.reports.common_tables import PERCENTILES, percentiles, range_of
from marlin_cli.reports.forms import Table


def speed_table(report: Report, settings: ThroughputSettings) -> Table:
    """Speeds after one prompt, latencies and memory, with a column a model."""
    title = (
        f"Speed: {settings.prompt_bytes:,} + 1 + {settings.decode_bytes:,} bytes, median of {_repeats(report)}"
        " (smallest .. largest)"
    )
    results = [model.throughput for model in report.models if model.throughput is not None]
    rows = [
        ["prefill, bytes/s", *(range_of(result.prefill_bytes_per_second) for result in results)],
        ["decode, bytes/s", *(range_of(result.decode_bytes_per_second) for result in results)],
        ["time to first byte, ms", *(range_of(result.time_to_first_byte_seconds, 1000) for result in results)],
        [f"a byte, ms: {PERCENTILES}", *(percentiles(result.byte_latency_seconds) for result in results)],
        *_patches(results),
        *(
            [
                f"{level} cache, bytes",
                *(f"{result.cache_bytes[level]:,}" if level in result.cache_bytes else "" for result in results),
            ]
            for level in dict.fromkeys(level for result in results for level in result.cache_bytes)
        ),
        ["working memory, bytes", *(f"{result.working_memory_bytes:,}" for result in results)],
    ]
    if any(result.joules_per_byte is not None for result in results):
        rows.append(["decoding, J/byte of the processor packages", *(_joules(result.joules_per_byte) for result in results)])
    return Table(title, ["", *(model.model for model in report.models)], rows)


def _patches(results: Sequence[Throughput]) -> list[list[str]]:
    """The row of the wait for a patch; none where no model decoded one, or has any."""
    found = [result.patch_latency_seconds for result in results]
    return [[f"a patch, ms: {PERCENTILES}", *map(percentiles, found)]] if any(found) else []


def _repeats(report: Report) -> int:
    """How often each model was timed."""
    return max(len(model.throughput.decode_bytes_per_second.samples) for model in report.models if model.throughput)


def _joules(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def roofline_table(name: str, speed: Throughput, found: Roofline) -> Table:
    """What a part of a model reads, what that takes, what it was predicted to take, and what it took, with a row a part."""
    rates = ", ".join(f"{kind} {rate / 1e9:.1f}" for kind, rate in found.matvec_bytes_per_second.items())
    title = (
        f"Roofline of {name}, of a byte generated: {found.share:.0%} of its time is what reading takes"
        f"\n(GB/s: copies {found.copy_bytes_per_second / 1e9:.1f}; weights in products: {rates})"
    )
    title += "\nmore than 100 %: weights that stay in the processor's caches"
    read, reached = found.read_bytes, found.bandwidth_reached or {}
    reading, predicted, measured = found.read_seconds_by_part, found.predicted_seconds_by_part, speed.decode_seconds_by_part
    rows = [
        [
            part,
            f"{read[part]:,.0f}" if part in read else "",
            _microseconds(reading[part]) if part in reading else "",
            *("unknown" if times is None else _microseconds(times[part]) for times in (predicted, measured)),
            f"{reached[part]:.0%}" if part in reached else "",
        ]
        for part in (measured or predicted or reading)
    ]
    whole = sum(measured.values()) if measured else 1 / speed.decode_bytes_per_second.median
    expected = "unknown" if predicted is None else _microseconds(sum(predicted.values()))
    sums = [_microseconds(sum(reading.values())), expected, _microseconds(whole)]
    rows.append(["all", f"{sum(read.values()):,.0f}", *sums, f"{found.share:.0%}"])
    return Table(title, ["", "bytes read", "reading, us", "predicted, us", "measured, us", "share of bandwidth"], rows)


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:,.1f}"


def sweep_table(report: Report, settings: ThroughputSettings) -> Table:
    """Speeds by context, length of decoding and number of streams, with two columns a model."""
    results = [model.throughput for model in report.models if model.throughput is not None]
    rows = [
        [
            f"{points[0].context_bytes:,}",
            f"{points[0].decode_bytes:,}",
            str(points[0].batch),
            *(cell for point in points for cell in _point(point)),
        ]
        for points in zip(*(result.sweep for result in results), strict=True)
    ]
    columns = [f"{model.model}: {what}" for model in report.models for what in ("prefill", "decode")]
    title = f"Speed by context\nbytes/s of all streams, median of {settings.repeats} or more (smallest .. largest)"
    return Table(title, ["context", "decoded", "batch", *columns], rows)


def _point(point: SweepPoint) -> tuple[str, str]:
    return range_of(point.prefill_bytes_per_second), range_of(point.decode_bytes_per_second)
