"""The forms that reports of all models share: JSON, JSON lines, a CSV of measurements, and tables in Markdown."""

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from marlin_cli.bench.spreads import Percentiles, Spread
from marlin_cli.text import markdown, printable

FORMAT_VERSION = 2  # of the JSON document


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
    numbers: bool = True  # in all columns but the first


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


def _document(report: Any) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, **dataclasses.asdict(report)}


def _line(document: dict[str, Any]) -> str:
    return json.dumps(document, allow_nan=False)


def _markdown(table: Table) -> str:
    lines = [_markdown_row(table.columns), _markdown_row(["---", *["---:"] * (len(table.columns) - 1)])]
    title = "  \n".join(map(markdown, table.title.split("\n")))
    return "\n".join([title, "", *lines, *(_markdown_row(row) for row in table.rows)])


def _markdown_row(cells: Sequence[str]) -> str:
    # A line feed would end the row: names out of files may hold any character.
    return "| " + " | ".join(map(markdown, cells)) + " |"
