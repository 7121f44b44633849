"""What `marlin bench` does differently with ByT5 models, once its options are read: another run, another report."""

from collections.abc import Sequence

from marlin_cli.bench import answering_report, report
from marlin_cli.bench.answering_report import AnsweringReport, PairSettings
from marlin_cli.bench.answering_run import AnsweringRequest, run
from marlin_cli.bench.report import Report, Table
from marlin_cli.bench.throughput import ThroughputSettings
from marlin_cli.checkpoints import architecture_of
from marlin_cli.checkpoints.location import locate_model
from marlin_cli.errors import UsageError


def are_byt5(models: Sequence[str]) -> bool:
    """Are they ByT5 models? They are measured in another way than the others.

    Raises:
        UsageError: some are, and some are not.
    """
    kinds = {architecture_of(locate_model(name)) == "byt5": name for name in reversed(models)}
    if len(kinds) == 2:
        raise UsageError(f"{kinds[True]} is a ByT5 and {kinds[False]} is none; measure models of one kind together")
    return True in kinds


def measured(
    models: tuple[str, ...],
    throughput: ThroughputSettings | None,
    pairs: str | None,
    max_bytes: int | None,
    reference: str | None,
    device: str,
    kv_bits: int | None,
    activation_bits: int,
    *,
    foreign_options: Sequence[str],
) -> AnsweringReport:
    """One run over ByT5 models.

    Args:
        foreign_options: names of options that were given and that ByT5 does not have.

    Raises:
        UsageError: there are such options.
    """
    if foreign_options:
        raise UsageError(f"{foreign_options[0]} has no meaning for ByT5")
    quality = None if pairs is None else PairSettings(pairs, max_bytes, reference)
    return run(AnsweringRequest(models, throughput, quality, device, kv_bits, activation_bits))


def tables_of(found: Report | AnsweringReport) -> list[Table]:
    """The tables of either report."""
    return answering_report.to_tables(found) if isinstance(found, AnsweringReport) else report.to_tables(found)


def rendered(found: Report | AnsweringReport, form: str) -> str:
    """Either report as json, jsonl, csv or md."""
    if isinstance(found, AnsweringReport):
        return answering_report.RENDERINGS[form](found)
    return report.RENDERINGS[form](found)
