"""The result of a bench run, and its renderings: tables, JSON, JSON lines, CSV and Markdown. Pure functions."""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from marlin_cli.bench.machine import Machine
from marlin_cli.bench.spreads import Percentiles, Spread
from marlin_cli.bench.throughput import SweepPoint, Throughput, ThroughputSettings
from marlin_cli.engine.decoding import CacheBits
from marlin_cli.prediction.roofline import Roofline
from marlin_cli.prediction.sizes import PARTS
from marlin_cli.quality.estimates import Estimate
from marlin_cli.quality.held_out import Windowing
from marlin_cli.quality.quality import Comparison, Quality, Score
from marlin_cli.text import one_line, printable

FORMAT_VERSION = 2  # of the JSON document

ALL_DOMAINS = "all"


@dataclass(frozen=True)
class QualitySettings:
    """Which bytes the models were scored on."""

    corpora: tuple[str, ...]  # paths or names of recipes
    windowing: Windowing
    reference: str | None = None  # the model that the others are compared with
    denominator: str = "bytes as they lie in the files, 0x00 and what is no text included"  # of bits per byte


@dataclass(frozen=True)
class ModelReport:
    """What was measured of one model. Sizes are by part of the model."""

    model: str
    stored_weight_bytes: dict[str, int]  # in its checkpoint
    loaded_weight_bytes: dict[str, int]  # in memory: on a CPU, 16-bit weights become float32
    cache_bits: CacheBits
    throughput: Throughput | None
    quality: Quality | None
    weights: dict[str, int] = field(default_factory=dict)  # how many numbers; a packed one counts once


@dataclass(frozen=True)
class Report:
    """One run of `marlin bench`."""

    machine: Machine
    throughput_settings: ThroughputSettings | None
    quality_settings: QualitySettings | None
    peak_resident_bytes: int  # of the whole process, all models loaded
    models: tuple[ModelReport, ...]


@dataclass(frozen=True)
class Measurement:
    """One number of one model: a row of the CSV. Fields that do not apply are None."""

    model: str
    measure: str  # with its unit
    part: str  # of the model or the cache, or a domain, class of bytes or position in the patch; empty for none
    value: float  # the median where there is a range
    standard_error: float | None = None
    minimum: float | None = None
    maximum: float | None = None
    interquartile_range: float | None = None
    over_bytes: int | None = None  # of quality: the denominator, bytes as they lie in the files


@dataclass(frozen=True)
class Table:
    """A titled table of text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


# Documents


def to_json(report: Any) -> str:
    """A report (a dataclass) as one JSON document on one line."""
    return _line(_document(report))


def to_jsonl(report: Any) -> str:
    """A JSON document a model, one a line; each repeats the machine and the settings."""
    common = _document(report)
    return "\n".join(_line({**common, "models": [model]}) for model in common["models"])


def csv_of(rows: Iterable[Measurement]) -> str:
    """A row for each measurement, under the fields of `Measurement`."""
    columns = [field.name for field in dataclasses.fields(Measurement)]
    return csv_rows(columns, (dataclasses.asdict(row) for row in rows))


def csv_rows(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows under a line of their columns; what a terminal would take as a command is escaped."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: printable(value) if isinstance(value, str) else value for name, value in row.items()})
    return text.getvalue().rstrip("\n")


def markdown_of(tables: Iterable[Table]) -> str:
    """Tables in Markdown."""
    return "\n\n".join(_markdown(table) for table in tables)


def to_csv(report: Report) -> str:
    """See `csv_of`."""
    return csv_of(measurements(report))


def to_markdown(report: Report) -> str:
    """The tables of `to_tables` in Markdown."""
    return markdown_of(to_tables(report))


RENDERINGS = {"json": to_json, "jsonl": to_jsonl, "csv": to_csv, "md": to_markdown}


def _document(report: Any) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, **dataclasses.asdict(report)}


def _line(document: dict[str, Any]) -> str:
    return json.dumps(document, allow_nan=False)


def _markdown(table: Table) -> str:
    lines = [_markdown_row(table.columns), _markdown_row(["---", *["---:"] * (len(table.columns) - 1)])]
    title = "  \n".join(map(printable, table.title.split("\n")))
    return "\n".join([title, "", *lines, *(_markdown_row(row) for row in table.rows)])


def _markdown_row(cells: Sequence[str]) -> str:
    # A line feed would end the row: names out of files may hold any character.
    return "| " + " | ".join(one_line(cell).replace("\\", "\\\\").replace("|", "\\|") for cell in cells) + " |"


# Rows of numbers


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
            for domain, score in [*_scores(model.quality), *_groups(model.quality)]:
                yield from _of_score(model.model, domain, score)


def measurement_of_spread(model: str, measure: str, part: str, spread: Spread) -> Measurement:
    """The row of repeats of one measurement."""
    return Measurement(
        model, measure, part, spread.median,
        minimum=spread.minimum, maximum=spread.maximum, interquartile_range=spread.interquartile_range,
    )  # fmt: skip


def measurements_of_percentiles(model: str, measure: str, part: str, found: Percentiles | None) -> Iterator[Measurement]:
    """A row for each percentile, after the part's name; nothing where nothing was measured."""
    for name, value in {} if found is None else dataclasses.asdict(found).items():
        yield Measurement(model, measure, f"{part}, {name}" if part else name, value)


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


def _scores(quality: Quality) -> list[tuple[str, Score]]:
    """The scores of the domains, and of all of them where there are several."""
    several = [(ALL_DOMAINS, quality.all_domains)] if len(quality.domains) > 1 else []
    return [*quality.domains.items(), *several]


def _groups(quality: Quality) -> list[tuple[str, Score]]:
    """The scores by class of bytes and by position in the patch."""
    positions = [(f"byte {position} of the patch", score) for position, score in quality.patch_positions.items()]
    return [*quality.byte_classes.items(), *positions]


# Tables for people


def to_tables(report: Report) -> list[Table]:
    """The machine, speed and memory with a column a model, and quality with a table a model."""
    tables = [machine_table(report.machine, report.peak_resident_bytes)]
    if report.throughput_settings is not None:
        tables.append(_speed(report, report.throughput_settings))
        for model in report.models:
            if model.throughput is not None and model.throughput.roofline is not None:
                tables.append(_roofline(model.model, model.throughput, model.throughput.roofline))
        if report.throughput_settings.sweep:
            tables.append(_sweep(report, report.throughput_settings))
    tables.append(
        weights_table(
            [model.model for model in report.models],
            [model.stored_weight_bytes for model in report.models],
            [model.loaded_weight_bytes for model in report.models],
        )
    )
    for model in report.models:
        if model.quality is not None and report.quality_settings is not None:
            tables.append(_quality(model.model, model.quality, report.quality_settings))
            if groups := _groups(model.quality):
                title = f"Quality of {model.model} by kind of byte and by position in the patch, all domains as one sample"
                tables.append(_scores_table(title, "bytes that are", groups, report.quality_settings))
    return tables


def machine_table(machine: Machine, peak_resident_bytes: int) -> Table:
    """The machine, with the most memory that the run held."""
    columns = ["device", f"{machine.device} ({machine.device_reason})"]
    rows = [
        ["processor", machine.device_name],
        ["system", f"{machine.system}, {machine.logical_cpus} logical CPUs"],
        ["versions", f"marlin {machine.marlin_version}, MLX {machine.mlx_version}, Python {machine.python_version}"],
        ["peak resident bytes", f"{peak_resident_bytes:,}"],
        ["energy", machine.energy],
    ]
    return Table("Machine", columns, rows)


def _speed(report: Report, settings: ThroughputSettings) -> Table:
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
        [f"a patch, ms: {PERCENTILES}", *(percentiles(result.patch_latency_seconds) for result in results)],
        ["global cache, bytes", *(f"{result.cache_bytes['global']:,}" for result in results)],
        ["local cache, bytes", *(f"{result.cache_bytes['local']:,}" for result in results)],
        ["working memory, bytes", *(f"{result.working_memory_bytes:,}" for result in results)],
    ]
    if any(result.joules_per_byte is not None for result in results):
        rows.append(["decoding, J/byte of the processor packages", *(_joules(result.joules_per_byte) for result in results)])
    return Table(title, ["", *(model.model for model in report.models)], rows)


def _repeats(report: Report) -> int:
    """How often each model was timed."""
    return max(len(model.throughput.decode_bytes_per_second.samples) for model in report.models if model.throughput)


PERCENTILES = "50 %, 90 %, 99 %, longest"


def percentiles(found: Percentiles | None) -> str:
    """Milliseconds, as `PERCENTILES` lists them."""
    if found is None:
        return "-"
    return ", ".join(f"{1000 * value:.4g}" for value in dataclasses.astuple(found))


def _joules(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _roofline(name: str, speed: Throughput, found: Roofline) -> Table:
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


def _sweep(report: Report, settings: ThroughputSettings) -> Table:
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
    title = f"Speed by context, bytes/s of all streams, median of {settings.repeats} or more (smallest .. largest)"
    return Table(title, ["context", "decoded", "batch", *columns], rows)


def _point(point: SweepPoint) -> tuple[str, str]:
    return range_of(point.prefill_bytes_per_second), range_of(point.decode_bytes_per_second)


def weights_table(names: Sequence[str], stored: Sequence[Mapping[str, int]], loaded: Sequence[Mapping[str, int]]) -> Table:
    """Bytes by part as stored, and in all as loaded, with a column a model."""
    rows = [
        [part, *(f"{sizes.get(part, 0):,}" for sizes in stored)] for part in PARTS if any(part in sizes for sizes in stored)
    ]
    rows.append(["all, stored", *(f"{sum(sizes.values()):,}" for sizes in stored)])
    rows.append(["all, loaded", *(f"{sum(sizes.values()):,}" for sizes in loaded)])
    return Table("Weights, bytes", ["", *names], rows)


def _quality(name: str, quality: Quality, settings: QualitySettings) -> Table:
    title = (
        f"Quality of {name} on {', '.join(settings.corpora)}: total bits over total bytes, {_windows(settings)},"
        " standard errors over windows"
    )
    if settings.reference is not None:
        title += (
            f"\nagainst {settings.reference}: difference of bits/byte; KL(reference || model) in bits/byte, its mean,"
            " median, 99 % and maximum; share of bytes with the same likeliest one"
        )
    return _scores_table(title, "domain", _scores(quality), settings)


def _windows(settings: QualitySettings) -> str:
    windowing = settings.windowing
    if windowing.stride == windowing.window_bytes:
        return f"disjoint windows of {windowing.window_bytes:,} bytes"
    return f"windows of {windowing.window_bytes:,} bytes every {windowing.stride:,}, each byte scored once"


def _scores_table(title: str, first: str, scores: Sequence[tuple[str, Score]], settings: QualitySettings) -> Table:
    columns = [first, "bytes", "windows", "bits/byte", "s.e."]
    if settings.reference is not None:
        columns += ["difference", "s.e.", "KL", "s.e.", "median", "99 %", "max", "top-1"]
    rows = []
    for name, score in scores:
        row = [name, f"{score.bytes:,}", f"{score.windows:,}", *_with_error(score.bits_per_byte, ".5f")]
        rows.append(row + (_beside(score.against_reference) if score.against_reference is not None else []))
    return Table(title, columns, rows)


def _beside(result: Comparison) -> list[str]:
    return [
        *_with_error(result.bits_per_byte_difference, "+.5f"),
        *_with_error(result.kl_bits_per_byte, ".3g"),
        *(f"{bits:.3g}" for bits in (result.kl_median_bits, result.kl_percentile_99_bits, result.kl_maximum_bits)),
        f"{100 * result.top1_agreement.value:.2f} %",
    ]


def _with_error(estimate: Estimate, form: str) -> list[str]:
    error = estimate.standard_error
    return [format(estimate.value, form), "" if error is None else format(error, form.removeprefix("+"))]


def range_of(spread: Spread | None, scale: float = 1.0) -> str:
    """Median (smallest .. largest) of what was repeated; empty where nothing was."""
    if spread is None:
        return ""
    median, low, high = (_rounded(scale * value) for value in (spread.median, spread.minimum, spread.maximum))
    return f"{median} ({low} .. {high})"


def _rounded(value: float) -> str:
    """Three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
