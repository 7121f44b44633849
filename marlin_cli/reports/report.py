"""The result of a bench run over models that continue bytes in each form: JSON, JSON lines, CSV, and tables. Pure functions."""

from marlin_cli.bench.result import Report
from marlin_cli.reports.common_tables import machine_table, weights_table
from marlin_cli.reports.forms import Table, csv_of, markdown_of, to_json, to_jsonl
from marlin_cli.reports.measurements import measurements
from marlin_cli.reports.quality_tables import quality_tables
from marlin_cli.reports.speed_tables import roofline_table, speed_table, sweep_table


def to_csv(report: Report) -> str:
    """See `csv_of`."""
    return csv_of(measurements(report))


def to_markdown(report: Report) -> str:
    """The tables of `to_tables` in Markdown."""
    return markdown_of(to_tables(report))


RENDERINGS = {"json": to_json, "jsonl": to_jsonl, "csv": to_csv, "md": to_markdown}


def to_tables(report: Report, *, details: bool = True) -> list[Table]:
    """The machine, speed and memory with a column a model, and quality with a table a model.

    Args:
        details: by kind of byte and by position in the patch too.
    """
    tables = [machine_table(report.machine, report.peak_resident_bytes)]
    if report.throughput_settings is not None:
        tables.append(speed_table(report, report.throughput_settings))
        for model in report.models:
            if model.throughput is not None and model.throughput.roofline is not None:
                tables.append(roofline_table(model.model, model.throughput, model.throughput.roofline))
        if report.throughput_settings.sweep:
            tables.append(sweep_table(report, report.throughput_settings))
    tables.append(
        weights_table(
            [model.model for model in report.models],
            [model.stored_weight_bytes for model in report.models],
            [model.loaded_weight_bytes for model in report.models],
        )
    )
    for model in report.models:
        if model.quality is not None and report.quality_settings is not None:
            tables += quality_tables(model.model, model.quality, report.quality_settings, details=details)
    return tables
