"""What each format would cost a model, in each form: one table, a row a format."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from marlin_cli.bench.formats import FormatRow, FormatsReport
from marlin_cli.quality.estimates import Estimate
from marlin_cli.reports.forms import Table, csv_rows, markdown_of, to_json

# How measures are called and printed, and by what they are multiplied; beside those with True stands their standard error.
MEASURES = {
    "bits_per_byte": ("bits/byte", ".4f", 1.0, False),
    "bits_per_byte_difference": ("more", "+.4f", 1.0, True),
    "kl_bits_per_byte": ("KL", ".4f", 1.0, True),
    "top1_agreement": ("same guess, %", ".2f", 100.0, False),
    "exact_match": ("exact, %", ".1f", 100.0, False),
    "exact_match_difference": ("more", "+.1f", 100.0, True),
    "states_error": ("error of states, %", ".3f", 100.0, True),
    "equal_labels": ("equal labels, %", ".2f", 100.0, True),
    "equal_sentences": ("equal sentences, %", ".2f", 100.0, True),
}


def to_table(report: FormatsReport) -> Table:
    """A row a format; measures that no row has are left out."""
    measured = [name for name in MEASURES if any(row.measures.get(name) is not None for row in report.rows)]
    timed = any(row.bytes_per_second is not None for row in report.rows)
    columns = ["format", "bits/weight", "bytes"]
    for name in measured:
        columns += [MEASURES[name][0], *(["s.e."] if MEASURES[name][3] else [])]
    columns += ["bytes/s"] if timed else []
    rows = []
    for row in report.rows:
        cells = [row.format, f"{row.bits_per_weight:.2f}", f"{row.bytes:,}"]
        for name in measured:
            cells += _cells(row.measures.get(name), *MEASURES[name][1:])
        rows.append([*cells, *([_speed(row)] if timed else [])])
    return Table(f"{report.model} in formats, on {report.scored}", columns, rows)


def to_jsonl(report: FormatsReport) -> str:
    """A JSON document a format, one a line."""
    rows = report.rows
    return "\n".join(to_json(dataclasses.replace(report, rows=(row,))) for row in rows)


def to_csv(report: FormatsReport) -> str:
    """A row a format."""
    columns = ["model", "format", "bits_per_weight", "bytes", "bytes_per_second"]
    for name in MEASURES:
        columns += [name, f"{name}_standard_error"]
    return csv_rows(columns, _flat(report))


def _flat(report: FormatsReport) -> Iterator[dict[str, Any]]:
    for row in report.rows:
        values = {name: getattr(row, name) for name in ("format", "bits_per_weight", "bytes", "bytes_per_second")}
        for name, estimate in row.measures.items():
            if estimate is not None:
                values |= {name: estimate.value, f"{name}_standard_error": estimate.standard_error}
        yield {"model": report.model, **values}


def to_markdown(report: FormatsReport) -> str:
    """The table in Markdown."""
    return markdown_of([to_table(report)])


RENDERINGS = {"json": to_json, "jsonl": to_jsonl, "csv": to_csv, "md": to_markdown}


def _cells(estimate: Estimate | None, form: str, scale: float, with_error: bool) -> list[str]:
    if estimate is None:
        return ["", ""] if with_error else [""]
    value, error = format(scale * estimate.value, form), estimate.standard_error
    return [value, *(["" if error is None else format(scale * error, form.removeprefix("+"))] if with_error else [])]


def _speed(row: FormatRow) -> str:
    return "" if row.bytes_per_second is None else f"{row.bytes_per_second:,.0f}"
