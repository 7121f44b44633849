"""The result of a bench run over models that encode texts in each form; see `forms` for what all models share."""

from collections.abc import Iterator, Sequence

from marlin_cli.bench.encoding_result import EncodingReport, TextSettings
from marlin_cli.bench.encoding_speed import EncodingSpeed
from marlin_cli.bench.throughput import ThroughputSettings
from marlin_cli.quality.estimates import Estimate
from marlin_cli.quality.texts import TextQuality, TextScore
from marlin_cli.reports.common_tables import machine_table, range_of, weights_table
from marlin_cli.reports.forms import Measurement, Table, csv_of, markdown_of, measurement_of_spread, to_json, to_jsonl

ALL_TEXTS = "all"

# Fields of a score, how they are called and printed, and by what they are multiplied.
MEASURES = {
    "states_error": ("error of states, %", ".3f", 100.0),
    "states_cosine": ("cosine", ".6f", 1.0),
    "equal_labels": ("equal labels, %", ".2f", 100.0),
    "boundary_error": ("error of ends", ".5f", 1.0),
    "equal_sentences": ("equal sentences, %", ".2f", 100.0),
}


def to_csv(report: EncodingReport) -> str:
    """A row for each measurement, under the fields of `Measurement`."""
    return csv_of(measurements(report))


def to_markdown(report: EncodingReport) -> str:
    """The tables of `to_tables` in Markdown."""
    return markdown_of(to_tables(report))


RENDERINGS = {"json": to_json, "jsonl": to_jsonl, "csv": to_csv, "md": to_markdown}


def measurements(report: EncodingReport) -> Iterator[Measurement]:
    """Every number of the report that belongs to a model; `part` is a part of the model, a shape of texts or a domain."""
    for model in report.models:
        for part, size in model.stored_weight_bytes.items():
            yield Measurement(model.model, "stored_weight_bytes", part, size)
        for part, size in model.loaded_weight_bytes.items():
            yield Measurement(model.model, "loaded_weight_bytes", part, size)
        for speed in model.speeds or ():
            part = f"batch {speed.batch_size}, characters {speed.prompt_characters}"
            yield measurement_of_spread(model.model, "characters_per_second", part, speed.characters_per_second)
            yield Measurement(model.model, "working_memory_bytes", part, speed.working_memory_bytes)
        if model.quality is not None:
            for domain, score in _scores(model.quality):
                yield Measurement(model.model, "texts", domain, score.texts)
                yield Measurement(model.model, "characters", domain, score.characters)
                for measure in MEASURES:
                    estimate: Estimate | None = getattr(score, measure)
                    if estimate is not None:
                        yield Measurement(model.model, measure, domain, estimate.value, estimate.standard_error)


def _scores(quality: TextQuality) -> list[tuple[str, TextScore]]:
    return [*quality.domains.items(), (ALL_TEXTS, quality.all_domains)]


def to_tables(report: EncodingReport) -> list[Table]:
    """The machine, speed by length and batch and sizes with a column a model, and quality with a table a model."""
    tables = [machine_table(report.machine, report.peak_resident_bytes)]
    names = [model.model for model in report.models]
    if report.throughput_settings is not None:
        tables.append(_speed(names, [model.speeds or () for model in report.models], report.throughput_settings))
    tables.append(
        weights_table(
            names, [each.stored_weight_bytes for each in report.models], [each.loaded_weight_bytes for each in report.models]
        )
    )
    for model in report.models:
        if model.quality is not None and report.quality_settings is not None:
            tables.append(_quality(model.model, model.quality, report.quality_settings))
    return tables


def _speed(names: Sequence[str], by_model: Sequence[Sequence[EncodingSpeed]], settings: ThroughputSettings) -> Table:
    title = f"Speed, characters/s of all texts together, marks included: median of {settings.repeats} (smallest .. largest)"
    rows = []
    for speeds in zip(*by_model, strict=True):
        shape = f"{speeds[0].batch_size} x {speeds[0].prompt_characters:,} characters"
        rows.append([shape, *(range_of(speed.characters_per_second) for speed in speeds)])
        rows.append([f"{shape}, working memory, bytes", *(f"{speed.working_memory_bytes:,}" for speed in speeds)])
    return Table(title, ["", *names], rows)


def _quality(name: str, quality: TextQuality, settings: TextSettings) -> Table:
    scores = _scores(quality)
    measured = [measure for measure in MEASURES if any(getattr(score, measure) is not None for _, score in scores)]
    title = (
        f"{name} beside {settings.reference} on {', '.join(settings.corpora)}, texts of {settings.window_bytes:,} bytes;"
        " standard errors over texts"
    )
    columns = ["domain", "texts", "characters"]
    for measure in measured:
        columns += [MEASURES[measure][0], "s.e."]
    rows = []
    for domain, score in scores:
        row = [domain, f"{score.texts:,}", f"{score.characters:,}"]
        for measure in measured:
            row += _cells(getattr(score, measure), *MEASURES[measure][1:])
        rows.append(row)
    return Table(title, columns, rows)


def _cells(estimate: Estimate | None, form: str, scale: float) -> list[str]:
    """The value and its standard error as text; empty where there is none."""
    if estimate is None:
        return ["", ""]
    error = estimate.standard_error
    return [format(scale * estimate.value, form), "" if error is None else format(scale * error, form)]
