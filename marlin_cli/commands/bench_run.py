"""What `marlin bench` does once its options are read: one run over models that continue bytes, or that answer, one delivery."""

import dataclasses
from collections.abc import Sequence

from marlin_cli import console
from marlin_cli.api import capability_of
from marlin_cli.bench import answering_run
from marlin_cli.bench import run as continuing_run
from marlin_cli.bench.answering_result import AnsweringReport, PairSettings
from marlin_cli.bench.result import Report
from marlin_cli.bench.run import Request
from marlin_cli.commands.bench_format import Format
from marlin_cli.commands.bench_output import Output
from marlin_cli.errors import UsageError
from marlin_cli.models import Capability
from marlin_cli.ranks import is_follower
from marlin_cli.reports import answering_report, report
from marlin_cli.reports.forms import Table


def check_kinds(models: Sequence[str]) -> None:
    """Raise `UsageError` where some models answer inputs and some continue bytes: they are measured in different ways."""
    kinds = {capability_of(name): name for name in reversed(models)}
    if len(kinds) > 1:
        found = " and ".join(f"{name} {kind.value}" for kind, name in kinds.items())
        raise UsageError(f"{found}; measure models of one kind together")


def run(request: Request, output: Output, against: str | None) -> None:
    """Measure models of one kind, and deliver the result.

    Args:
        against: the first model, where the others are paired with it.

    Raises:
        MarlinError: what cannot be read, measured or written.
    """
    found = _measured(request)
    if is_follower():
        return
    output.write(found, request.models, lambda form: _rendered(found, form))
    if against is not None and isinstance(found, Report):
        from marlin_cli.reports.changes import table_of_pairs

        pairs = table_of_pairs(dataclasses.asdict(found), against)
        console.table(pairs.title, pairs.columns, pairs.rows, to_stdout=output.form is Format.table)
    output.deliver(_tables_of(found), lambda form: _rendered(found, form))


def _measured(request: Request) -> Report | AnsweringReport:
    if capability_of(request.models[0]) is Capability.CONTINUES:
        return continuing_run.run(request)
    timing = request.throughput
    swept = {} if timing is None else {"--prompt-bytes": timing.sweep_contexts, "--decode-bytes": timing.sweep_decodes}
    for option, lengths in swept.items():
        if lengths:
            raise UsageError(f"{option}: several lengths have no meaning for a model that answers; give one")
    asked = request.quality
    quality = None if asked is None else PairSettings(asked.corpora, asked.windowing.max_bytes, asked.reference)
    assert not isinstance(request.kv_bits, tuple)  # --k-bits and --v-bits are refused for models that answer
    return answering_run.run(
        answering_run.AnsweringRequest(
            request.models, request.throughput, quality, request.device, request.kv_bits, request.activation_bits
        )
    )


def _tables_of(found: Report | AnsweringReport) -> list[Table]:
    return answering_report.to_tables(found) if isinstance(found, AnsweringReport) else report.to_tables(found)


def _rendered(found: Report | AnsweringReport, form: str) -> str:
    if isinstance(found, AnsweringReport):
        return answering_report.RENDERINGS[form](found)
    return report.RENDERINGS[form](found)
