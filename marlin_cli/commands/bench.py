"""`marlin bench`: how fast models run, what they weigh, and how well they predict held-out bytes."""

import dataclasses
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from marlin_cli.commands.options import DEFAULT_MODEL

if TYPE_CHECKING:
    from marlin_cli.bench.report import Table


# Ratios of two models settle within a few percent in this time, even where others use the machine (LOG.md, 2026-11-28).
SECONDS_OF_A_PAIR = 15.0


class Format(str, Enum):
    """How the result is written."""

    table = "table"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"
    md = "md"


def bench(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="Paths, shipped names or hub repositories; the demo if none."),
    ] = None,
    prompt_bytes: Annotated[
        str, typer.Option(help="Bytes of the prompt, for example 512 or 4k; 512,2k: both, as --context has them.")
    ] = "512",
    decode_bytes: Annotated[
        str, typer.Option(help="Bytes decoded after the first one; 64,256: both, after each --context.")
    ] = "128",
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs a model at least, after one that is not.")] = 5,
    seconds: Annotated[
        float | None,
        typer.Option(min=0, help="Repeat until each model was timed so long. Default 0; with --against 15."),
    ] = None,
    roofline: Annotated[
        bool, typer.Option("--roofline", help="Measure memory bandwidth too, and the share of it that decoding reaches.")
    ] = False,
    no_throughput: Annotated[bool, typer.Option("--no-throughput", help="Leave speed and memory out.")] = False,
    quality: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|RECIPE",
            help="Score these bytes: a file, a folder of domains or a recipe. ByT5: pairs, as calibrate --pairs.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Compare the scores with this model's: KL divergence, agreement; ByT5: differences."
        ),
    ] = None,
    window_bytes: Annotated[
        str | None, typer.Option(help="Bytes scored together, from an empty context. Default 2048.")
    ] = None,
    stride_bytes: Annotated[
        str | None,
        typer.Option(help="Slide: a window every so many bytes, the rest of it being context. Default: disjoint windows."),
    ] = None,
    max_bytes_per_file: Annotated[str | None, typer.Option(help="Score only the first bytes of each file.")] = None,
    max_quality_bytes: Annotated[
        str | None, typer.Option(help="Score at most this many bytes, an equal share for each domain.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted --quality run of the same models, bytes and settings.")
    ] = False,
    reference_cache: Annotated[
        str,
        typer.Option(help="Size of what is kept between runs of the reference's predictions, 1k a byte scored; 0: nothing."),
    ] = "2G",
    kv_bits: Annotated[int | None, typer.Option(help="Bits of the global cache: 4, 8 or 16.")] = None,
    k_bits: Annotated[int | None, typer.Option(help="Bits of its keys alone.")] = None,
    v_bits: Annotated[int | None, typer.Option(help="Bits of its values alone.")] = None,
    activation_bits: Annotated[
        int, typer.Option(help="8 rounds what packed layers multiply: faster on a CPU, a little less accurate.")
    ] = 16,
    show_kernels: Annotated[
        bool, typer.Option("--kernels", help="List each operation, the kernel that runs on the device and why, and end.")
    ] = False,
    output_format: Annotated[
        Format | None, typer.Option("--format", help="Default: as the name of --output ends, else table.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Write to this file, not to stdout.")] = None,
    report_page: Annotated[
        str | None, typer.Option("--report", metavar="FILE.html", help="Write a page of charts and tables too.")
    ] = None,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE.svg|png", help="Draw the charts into a file too; needs the extra `plot`.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, metal, cuda or cpu.")] = "auto",
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Time this model in turn with the others: paired ratios.")
    ] = None,
    save: Annotated[
        str | None, typer.Option(metavar="FILE", help="Append the result to this file, a line of JSON, with fingerprints.")
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="OLD NEW", help="Measure nothing: what changed between two saved results beyond the noise."),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Time nothing: attention, cache and bytes read a byte generated, from the shape.")
    ] = False,
    context: Annotated[
        str | None,
        typer.Option(help="Prompts of so many bytes too, for example 1k,8k,32k. With --plan: contexts; default the longest."),
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Streams decoded together, for example 1,2,8, after each --context. ByT5: default 1,8.")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="With --plan: bits of the weights, 4, 8, 16 or 32; else as stored.")] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="With --plan: GB/s at which memory is read; measured unless given.")
    ] = None,
) -> None:
    """Measure models side by side: bytes per second, memory, and with --quality bits per byte by domain.

    Prompts come from the shipped sample. Several models are timed in turn (A B A B) on the same bytes.
    """
    import json

    from marlin_cli.backend import require_mlx
    from marlin_cli.commands.options import parse_cache_bits, parse_size, parse_sizes
    from marlin_cli.errors import UsageError
    from marlin_cli.ranks import is_follower
    from marlin_cli.writing import check_output_file

    require_mlx()
    from marlin_cli import console
    from marlin_cli.bench.answering_report import AnsweringReport
    from marlin_cli.bench.held_out import Windowing
    from marlin_cli.bench.report import QualitySettings, Report
    from marlin_cli.bench.run import Request, run
    from marlin_cli.bench.throughput import ThroughputSettings
    from marlin_cli.commands import answering_bench
    from marlin_cli.commands.bench_pictures import Pictures

    if show_kernels:
        return _show_kernels(device)
    if compare is not None:
        return _compare(*compare, output_format, None if output is None else Path(output))
    if plan:
        from marlin_cli.commands.bench_plan import show_plan

        cache = parse_cache_bits(kv_bits, k_bits, v_bits)
        return show_plan(models or [DEFAULT_MODEL], context, bits, cache, bandwidth, device)
    for option, number in (("--bits", bits), ("--bandwidth", bandwidth)):
        if number is not None:
            raise UsageError(f"{option} needs --plan")
    for option, swept in (("--context", context), ("--batch", batch)):
        if swept is not None and no_throughput:
            raise UsageError(f"{option} is of speed; leave --no-throughput out")
    if against is not None:
        if no_throughput:
            raise UsageError("--against compares speeds; leave --no-throughput out")
        models = [against, *(models or [DEFAULT_MODEL])]
    if save is not None:
        check_output_file(Path(save))
    target = None if output is None else Path(output)
    form = _format_of(output_format, target)
    if target is not None:
        check_output_file(target)
    pictures = Pictures.checked(report_page, plot)
    sizes = {
        "window_bytes": ("--window-bytes", window_bytes),
        "stride_bytes": ("--stride-bytes", stride_bytes),
        "max_bytes_per_file": ("--max-bytes-per-file", max_bytes_per_file),
        "max_bytes": ("--max-quality-bytes", max_quality_bytes),
    }
    for option, value in (*sizes.values(), ("--reference", reference), ("--resume", resume or None)):
        if quality is None and value is not None:
            raise UsageError(f"{option} needs --quality")
    windowing = Windowing(**{name: parse_size(text, option) for name, (option, text) in sizes.items() if text is not None})
    prompts, decodes = parse_sizes(prompt_bytes, "--prompt-bytes"), parse_sizes(decode_bytes, "--decode-bytes")
    if context is not None and len(prompts) > 1:
        raise UsageError("--prompt-bytes and --context sweep the same; give one of them several lengths")
    timing = ThroughputSettings(
        prompts[0],
        decodes[0],
        repeats,
        seconds if seconds is not None else 0.0 if against is None else SECONDS_OF_A_PAIR,
        sweep_contexts=prompts if len(prompts) > 1 else parse_sizes(context, "--context"),
        sweep_decodes=decodes if len(decodes) > 1 else (),
        sweep_batches=parse_sizes(batch, "--batch"),
    )
    names = tuple(models or [DEFAULT_MODEL])
    if answering_bench.are_byt5(names):
        given = {
            "--window-bytes": window_bytes,
            "--stride-bytes": stride_bytes,
            "--max-bytes-per-file": max_bytes_per_file,
            "--k-bits": k_bits,
            "--v-bits": v_bits,
            "--against": against,
            "--context": context,
            "--roofline": roofline or None,
            "--seconds": seconds,
            "several --prompt-bytes": timing.sweep_contexts or None,
            "several --decode-bytes": timing.sweep_decodes or None,
        }
        report: Report | AnsweringReport = answering_bench.measured(
            names, None if no_throughput else timing, quality, windowing.max_bytes, reference, device, kv_bits,
            activation_bits, foreign_options=[option for option, value in given.items() if value is not None],
        )  # fmt: skip
    else:
        report = run(
            Request(
                models=names,
                throughput=None if no_throughput else timing,
                quality=None if quality is None else QualitySettings(quality, windowing, reference),
                device=device,
                kv_bits=parse_cache_bits(kv_bits, k_bits, v_bits),
                activation_bits=activation_bits,
                roofline=roofline,
                resume=resume,
                reference_cache_bytes=parse_size(reference_cache, "--reference-cache"),
            )
        )
    if is_follower():
        return
    pictures.write(json.loads(answering_bench.rendered(report, "json")))
    if save is not None:
        from marlin_cli.bench.results import append_result

        append_result(Path(save), report, models or [DEFAULT_MODEL])
        console.note(f"added to {save}")
    if against is not None and isinstance(report, Report):
        from marlin_cli.bench.changes import table_of_pairs

        pairs = table_of_pairs(dataclasses.asdict(report), against)
        console.table(pairs.title, pairs.columns, pairs.rows, to_stdout=form is Format.table)
    _deliver(form, target, answering_bench.tables_of(report), lambda: answering_bench.rendered(report, form.value))


def _compare(old: str, new: str, given: Format | None, target: Path | None) -> None:
    from marlin_cli import console
    from marlin_cli.bench.changes import changes, read_result, rendered_changes, table_of_changes
    from marlin_cli.writing import check_output_file

    form = _format_of(given, target)
    if target is not None:
        check_output_file(target)
    before, after = read_result(Path(old)), read_result(Path(new))
    if before.get("machine") != after.get("machine"):
        console.note("the results are of different machines, devices or versions")
    found = list(changes(before, after))
    _deliver(form, target, [table_of_changes(found)], lambda: rendered_changes(found, form.value))


def _deliver(form: Format, target: Path | None, tables: "Sequence[Table]", render: Callable[[], str]) -> None:
    """Tables to stdout, or the rendering in another form to stdout or a file."""
    from marlin_cli import console
    from marlin_cli.writing import writing

    if form is Format.table:
        for table in tables:
            console.table(table.title, table.columns, table.rows, to_stdout=True)
        return
    text = render()
    if target is None:
        print(text)
        return
    with writing(target) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    console.note(f"wrote {target}")


def _show_kernels(device: str) -> None:
    from marlin_cli import console
    from marlin_cli.ops.device import choose_device
    from marlin_cli.ops.dispatch import choices

    chosen = choose_device(device)
    rows = [[choice.op, choice.twin, choice.reason] for choice in choices()]
    console.table(f"kernels on {chosen.name} ({chosen.reason})", ["operation", "kernel", "why"], rows, to_stdout=True)


def _format_of(given: Format | None, target: Path | None) -> Format:
    """The format asked for, by name or by the suffix of the output file."""
    from marlin_cli.errors import UsageError

    if target is None:
        return given or Format.table
    suffix = target.suffix.removeprefix(".")
    form = given or (Format(suffix) if suffix in Format.__members__ else Format.table)
    if form is Format.table:
        raise UsageError(f"--output {target}: a table is for the terminal; add --format json, jsonl, csv or md")
    return form
