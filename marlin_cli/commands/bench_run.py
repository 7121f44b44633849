"""What `marlin bench` does once its options are read."""

from collections.abc import Sequence

from marlin_cli import console
from marlin_cli.api import load
from marlin_cli.bench.quality import QualitySettings, read_passages, score, summarise
from marlin_cli.bench.report import Report, as_csv, as_json, as_jsonl, as_markdown, tables
from marlin_cli.bench.throughput import ThroughputSettings, machine, measure


def bench(
    names: Sequence[str],
    throughput: ThroughputSettings | None,
    quality_corpus: str | None,
    quality: QualitySettings,
    reference: str | None,
    *,
    kv_bits: int | None,
    format: str,
    device: str,
) -> None:
    """Measure the models and print the report on stdout."""
    passages = [] if quality_corpus is None else read_passages(quality_corpus, quality)
    models = [(name, load(name, device=device, kv_bits=kv_bits)) for name in names]
    standard = None if reference is None else load(reference, device=device).network
    timed = [] if throughput is None else measure(models, throughput)
    figures = []
    total = sum(len(passage.data) for passage in passages) * len(models)
    with console.byte_progress("scoring", total) as progress:
        for name, model in models if passages else []:
            figures += summarise(name, score(model.network, passages, standard, on_bytes=progress.advance))
    report = Report(machine(models[0][1]), timed, figures, quality_corpus, reference)
    if format == "table":
        for title, columns, rows in tables(report):
            console.table(title, columns, rows, to_stdout=True)
    else:
        render = {"json": as_json, "jsonl": as_jsonl, "csv": as_csv, "md": as_markdown}[format]
        print(render(report))
