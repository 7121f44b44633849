"""What `marlin bench` does with ByT5 models once its options are read: one library call, one rendering."""

from collections.abc import Sequence

from marlin_cli.bench.answering_report import RENDERINGS, PairSettings, to_tables
from marlin_cli.bench.answering_run import AnsweringRequest, run
from marlin_cli.bench.report import Table
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
    form: str,
    *,
    foreign_options: Sequence[str],
) -> tuple[list[Table], str]:
    """The tables of a run, and its text in another form than `table` (empty in that one).

    Raises:
        UsageError: options that were given and that ByT5 does not have.
    """
    if foreign_options:
        raise UsageError(f"{foreign_options[0]} has no meaning for ByT5")
    quality = None if pairs is None else PairSettings(pairs, max_bytes, reference)
    report = run(AnsweringRequest(models, throughput, quality, device, kv_bits))
    return to_tables(report), RENDERINGS[form](report) if form in RENDERINGS else ""
