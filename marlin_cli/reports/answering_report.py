"""The result of a bench run over models that answer in each form; see `forms` for what all models share."""

from collections.abc import Iterator, Sequence

from marlin_cli.bench.answering_result import AnsweringReport, PairSettings
from marlin_cli.bench.answering_speed import AnsweringSpeed
from marlin_cli.bench.throughput import ThroughputSettings
from marlin_cli.quality.estimates import Estimate
from marlin_cli.quality.pairs import PairQuality, PairScore
from marlin_cli.reports.common_tables import PERCENTILES, machine_table, percentiles, range_of, weights_table
from marlin_cli.reports.forms import (
    Measurement,
    Table,
    csv_of,
    markdown_of,
    measurement_of_spread,
    measurements_of_percentiles,
    to_json,
    to_jsonl,
)

ALL_PAIRS = "all"


def to_csv(report: AnsweringReport) -> str:
    """A row for each measurement, under the fields of `Measurement`."""
    return csv_of(measurements(report))


def to_markdown(report: AnsweringReport) -> str:
    """The tables of `to_tables` in Markdown."""
    return markdown_of(to_tables(report))


RENDERINGS = {"json": to_json, "jsonl": to_jsonl, "csv": to_csv, "md": to_markdown}


def measurements(report: AnsweringReport) -> Iterator[Measurement]:
    """Every number of the report that belongs to a model; `part` is a part of the model, a batch size or a group."""
    for model in report.models:
        for part, size in model.stored_weight_bytes.items():
            yield Measurement(model.model, "stored_weight_bytes", part, size)
        for part, size in model.loaded_weight_bytes.items():
            yield Measurement(model.model, "loaded_weight_bytes", part, size)
        for speed in model.speeds or ():
            yield from _of_speed(model.model, speed)
        if model.quality is not None:
            for group, score in _scores(model.quality):
                yield from _of_score(model.model, group, score)


def _of_speed(model: str, speed: AnsweringSpeed) -> Iterator[Measurement]:
    part = f"batch {speed.batch_size}"
    for measure in ("encoder_bytes_per_second", "time_to_first_byte_seconds", "decode_bytes_per_second"):
        if (spread := getattr(speed, measure)) is not None:
            yield measurement_of_spread(model, measure, part, spread)
    yield from measurements_of_percentiles(model, "byte_latency_seconds", part, speed.byte_latency_seconds)
    for measure in ("decoded_bytes", "memory_bytes", "working_memory_bytes"):
        yield Measurement(model, measure, part, getattr(speed, measure))


def _of_score(model: str, group: str, score: PairScore) -> Iterator[Measurement]:
    for measure in ("pairs", "target_bytes", "characters", "total_bits"):
        yield Measurement(model, measure, group, getattr(score, measure))
    names = ("bits_per_target_byte", "character_error_rate", "exact_match")
    estimates = [(name, getattr(score, name)) for name in (*names, "copied_error_rate")]
    if (beside := score.against_reference) is not None:
        estimates += [(f"{name}_difference", getattr(beside, name)) for name in names]
    for measure, estimate in estimates:
        if estimate is not None:
            yield Measurement(model, measure, group, estimate.value, estimate.standard_error)


def _scores(quality: PairQuality) -> list[tuple[str, PairScore]]:
    return [*quality.groups.items(), (ALL_PAIRS, quality.all_pairs)]


def to_tables(report: AnsweringReport) -> list[Table]:
    """The machine, speed by batch and sizes with a column a model, and quality with a table a model."""
    tables = [machine_table(report.machine, report.peak_resident_bytes)]
    names = [model.model for model in report.models]
    if report.throughput_settings is not None:
        by_model = [model.speeds or () for model in report.models]
        tables += [_speed(names, list(speeds), report.throughput_settings) for speeds in zip(*by_model, strict=True)]
    tables.append(
        weights_table(
            names, [each.stored_weight_bytes for each in report.models], [each.loaded_weight_bytes for each in report.models]
        )
    )
    for model in report.models:
        if model.quality is not None and report.quality_settings is not None:
            tables.append(_quality(model.model, model.quality, report.quality_settings))
    return tables


def _speed(names: Sequence[str], speeds: Sequence[AnsweringSpeed], settings: ThroughputSettings) -> Table:
    title = (
        f"Speed: batch {speeds[0].batch_size}, inputs of {settings.prompt_bytes:,} bytes, 1 + {settings.decode_bytes:,}"
        f" bytes of each answer, median of {settings.repeats} (smallest .. largest)"
    )
    rows = [
        ["encoder, bytes/s", *(range_of(speed.encoder_bytes_per_second) for speed in speeds)],
        ["decode, bytes/s", *(range_of(speed.decode_bytes_per_second) for speed in speeds)],
        ["time to first byte, ms", *(range_of(speed.time_to_first_byte_seconds, 1000) for speed in speeds)],
        [f"a byte, ms: {PERCENTILES}", *(percentiles(speed.byte_latency_seconds) for speed in speeds)],
        ["keys and values of inputs, bytes", *(f"{speed.memory_bytes:,}" for speed in speeds)],
        ["working memory, bytes", *(f"{speed.working_memory_bytes:,}" for speed in speeds)],
    ]
    return Table(title, ["", *names], rows)


def _quality(name: str, quality: PairQuality, settings: PairSettings) -> Table:
    title = (
        f"Quality of {name} on {', '.join(settings.pairs)}: bits of the wanted answer and its end over its bytes,"
        " teacher-forced;\nedits of the greedy answer over the wanted one's characters (CER), of the input for comparison"
        " (copied), and answers right to the last byte, in %; standard errors over pairs"
    )
    columns = ["group", "pairs", "characters", "bits/byte", "s.e.", "copied", "CER", "s.e.", "exact", "s.e."]
    if settings.reference is not None:
        title += f"\nagainst {settings.reference}: differences, paired"
        columns += ["bits/byte", "s.e.", "CER", "s.e.", "exact", "s.e."]
    rows = []
    for group, score in _scores(quality):
        row = [group, f"{score.pairs:,}", f"{score.characters:,}", *_cells(score.bits_per_target_byte, ".4f")]
        row += [_cells(score.copied_error_rate, ".2f", 100)[0], *_cells(score.character_error_rate, ".2f", 100)]
        row += _cells(score.exact_match, ".1f", 100)
        if (beside := score.against_reference) is not None:
            row += _cells(beside.bits_per_target_byte, "+.4f") + _cells(beside.character_error_rate, "+.2f", 100)
            row += _cells(beside.exact_match, "+.1f", 100)
        rows.append(row)
    return Table(title, columns, rows)


def _cells(estimate: Estimate | None, form: str, scale: float = 1.0) -> list[str]:
    """The value and its standard error as text; empty where there is none."""
    if estimate is None:
        return ["", ""]
    error = estimate.standard_error
    return [format(scale * estimate.value, form), "" if error is None else format(scale * error, form.removeprefix("+"))]
