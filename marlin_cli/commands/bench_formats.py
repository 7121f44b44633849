"""`marlin bench MODEL --formats ..`: one model packed in memory in several formats, and one table."""

import dataclasses
from collections.abc import Sequence

from marlin_cli.bench.formats import SCORED_BYTES, FormatsRequest, run
from marlin_cli.bench.throughput import ThroughputSettings
from marlin_cli.commands.bench_output import Output
from marlin_cli.errors import ConfigError, UsageError
from marlin_cli.quality.held_out import Windowing
from marlin_cli.quantization.plan import settings_named
from marlin_cli.reports.formats_report import RENDERINGS, to_table
from marlin_cli.text import quoted


def show_formats(
    models: Sequence[str],
    formats: str,
    corpora: Sequence[str],
    windowing: Windowing,
    timing: ThroughputSettings | None,
    output: Output,
    **how: object,
) -> None:
    """Measure and deliver.

    Args:
        formats: names with commas between them.
        how: further fields of `FormatsRequest`.

    Raises:
        UsageError: several models, or a format that is not known.
        MarlinError: what cannot be read, packed or written.
    """
    if len(models) > 1:
        raise UsageError(f"--formats is of one model, found {len(models)}; name one")
    names = tuple(dict.fromkeys(name.strip() for name in formats.split(",")))
    for name in names:
        try:
            settings_named(name)
        except ConfigError as error:
            raise UsageError(f"--formats {quoted(formats)}: {error}") from None
    if windowing.max_bytes is None:
        windowing = dataclasses.replace(windowing, max_bytes=SCORED_BYTES)
    if timing is not None:
        timing = dataclasses.replace(timing, sweep_batches=(), sweep_contexts=(), sweep_decodes=())
    found = run(FormatsRequest(models[0], names, timing, tuple(corpora), windowing, **how))  # type: ignore[arg-type]
    output.deliver([to_table(found)], lambda form: RENDERINGS[form](found))
