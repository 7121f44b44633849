"""What `marlin bench` does once its options are read: one run over models of one kind, one delivery."""

import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

from marlin_cli import console
from marlin_cli.api import capability_of
from marlin_cli.bench import answering_run, encoding_run
from marlin_cli.bench import run as continuing_run
from marlin_cli.bench.answering_result import AnsweringReport, PairSettings
from marlin_cli.bench.encoding_result import EncodingReport, TextSettings
from marlin_cli.bench.result import Report
from marlin_cli.bench.run import Request
from marlin_cli.commands.bench_format import Format
from marlin_cli.commands.bench_output import Output
from marlin_cli.errors import UsageError
from marlin_cli.models import Capability
from marlin_cli.ranks import is_follower
from marlin_cli.reports import answering_report, encoding_report, report
from marlin_cli.reports.forms import Table


def check_kinds(models: Sequence[str]) -> None:
    """Raise `UsageError` where some models answer inputs and some continue bytes, or encode: each is measured otherwise."""
    kinds = {capability_of(name): name for name in reversed(models)}
    if len(kinds) > 1:
        found = " and ".join(f"{name} {kind.value}" for kind, name in kinds.items())
        raise UsageError(f"{found}; measure models of one kind together")


def run(request: Request, output: Output, against: str | None, *, details: bool = False) -> None:
    """Measure models of one kind, and deliver the result.

    Args:
        against: the first model, where the others are paired with it.
        details: long tables on stdout too; other forms have all numbers.

    Raises:
        MarlinError: what cannot be read, measured or written.
    """
    found = _measured(request)
    if is_follower():
        return
    output.write(found, request.models, lambda form: _rendered(found, form), request.imports)
    if against is not None and isinstance(found, Report):
        from marlin_cli.reports.changes import table_of_pairs

        pairs = table_of_pairs(dataclasses.asdict(found), against)
        console.table(pairs.title, pairs.columns, pairs.rows, to_stdout=output.form is Format.table)
    output.deliver(_tables_of(found, details), lambda form: _rendered(found, form))


AnyReport: TypeAlias = Report | AnsweringReport | EncodingReport


def _measured(request: Request) -> AnyReport:
    capability = capability_of(request.models[0])
    if capability is Capability.CONTINUES:
        return continuing_run.run(request)
    if capability is Capability.ENCODES:
        return encoding_run.run(_of_texts(request))
    return answering_run.run(_of_pairs(request))


def _of_pairs(request: Request) -> answering_run.AnsweringRequest:
    timing = request.throughput
    swept = {} if timing is None else {"--prompt-bytes": timing.sweep_contexts, "--decode-bytes": timing.sweep_decodes}
    for option, lengths in swept.items():
        if lengths:
            raise UsageError(f"{option}: several lengths have no meaning for a model that answers; give one")
    asked = request.quality
    quality = None if asked is None else PairSettings(asked.corpora, asked.windowing.max_bytes, asked.reference)
    assert not isinstance(request.kv_bits, tuple)  # --k-bits and --v-bits are refused for models that answer
    return answering_run.AnsweringRequest(
        request.models, request.throughput, quality, request.device, request.kv_bits, request.activation_bits, request.split
    )


def _of_texts(request: Request) -> encoding_run.EncodingRequest:
    asked = request.quality
    quality = None
    if asked is not None:
        if asked.reference is None:
            raise UsageError("--quality compares models that encode texts with another, such as the original: give --reference")
        quality = TextSettings(asked.corpora, asked.windowing.window_bytes, asked.windowing.max_bytes, asked.reference)
    return encoding_run.EncodingRequest(
        request.models, request.throughput, quality, request.device, request.activation_bits, request.imports
    )


def _tables_of(found: AnyReport, details: bool) -> list[Table]:
    if isinstance(found, EncodingReport):
        return encoding_report.to_tables(found)
    return answering_report.to_tables(found) if isinstance(found, AnsweringReport) else report.to_tables(found, details=details)


def _rendered(found: AnyReport, form: str) -> str:
    if isinstance(found, EncodingReport):
        return encoding_report.RENDERINGS[form](found)
    if isinstance(found, AnsweringReport):
        return answering_report.RENDERINGS[form](found)
    return report.RENDERINGS[form](found)
