"""`marlin bench`: how fast models run, what they weigh, and how well they predict held-out bytes."""

import dataclasses
from typing import Annotated

import typer

from marlin_cli.commands.bench_format import Format
from marlin_cli.commands.options import DEFAULT_MODEL, IMPORT_HELP, SINKS_HELP, SPARSE_HELP
from marlin_cli.commands.speculation_options import keep_rows_apart

# Ratios of two models settle within a few percent in this time, even where others use the machine (LOG.md, 2026-11-28).
SECONDS_OF_A_PAIR = 15.0


def bench(
    command_line: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="Paths, shipped names or hub repositories; the demo if none."),
    ] = None,
    prompt_bytes: Annotated[
        str, typer.Option(help="Bytes of the prompt (CANINE: characters), for example 512 or 4k; 512,2k: both, as --context.")
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
    formats: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,..",
            help="Pack one model in memory in each, and show one table, a row a format: nvfp4, mxfp4, mxfp8, int4, int8, or two"
            " for the parts that take 4 and 8 bits unless told, as 4/8. Scores 64k of `default` unless --quality says more.",
        ),
    ] = None,
    quality: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH|RECIPE",
            help="Score these bytes: [name=]file, a folder of domains or a recipe; repeatable. Files of rows (.jsonl,"
            " .parquet) are refused, and compressed ones outside the domain binary. ByT5: pairs, as calibrate --pairs.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Compare the scores with this model's: KL divergence, agreement; ByT5: differences; CANINE: states.",
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
        bool,
        typer.Option(
            "--resume", help="Go on with an interrupted --quality or --surprise run of the same models, bytes and settings."
        ),
    ] = False,
    surprise: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|-",
            help="What each line of a stream of any length costs, and the costliest; nothing else is measured. --output"
            " x.jsonl: a line of JSON a line; x.npy: a float32 a byte, in bits. --format jsonl: lines to stdout as they come.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=0, max=10000, help="With --surprise: how many of the costliest lines are told.")] = 20,
    window: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES|restart",
            help="Score each file of --quality, or the stream of --surprise (default 2k), as one stream with so many bytes in"
            " view. restart: the context is read again from its last half on whenever it is full.",
        ),
    ] = None,
    sinks: Annotated[int | None, typer.Option(min=0, help=SINKS_HELP)] = None,
    sparse: Annotated[float | None, typer.Option(metavar="EPS", help=SPARSE_HELP)] = None,
    reference_cache: Annotated[
        str,
        typer.Option(help="Size of what is kept between runs of the reference's predictions, 1k a byte scored; 0: nothing."),
    ] = "2G",
    language: Annotated[str | None, typer.Option(help="LA-CANINE: the language, for example cs.")] = None,
    kv_bits: Annotated[int | None, typer.Option(help="Bits of the global cache: 4, 8 or 16.")] = None,
    k_bits: Annotated[int | None, typer.Option(help="Bits of its keys alone.")] = None,
    v_bits: Annotated[int | None, typer.Option(help="Bits of its values alone.")] = None,
    activation_bits: Annotated[
        int, typer.Option(help="8 rounds what packed layers multiply: faster on a CPU, a little less accurate.")
    ] = 16,
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels", help="List each operation, its kernel on the device and why; how layers of MODELS are multiplied."
        ),
    ] = False,
    details: Annotated[
        bool, typer.Option("--details", help="With --quality: tables by kind of byte and by position in the patch too.")
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
    chart: Annotated[
        list[str] | None, typer.Option(metavar="WORDS", help="Draw only charts with these words in their titles. Repeatable.")
    ] = None,
    import_options: Annotated[
        list[str] | None,
        typer.Option(
            "--import", metavar="NAME=VALUE", help=f"{IMPORT_HELP} Of several models those take it that leave it open."
        ),
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
        typer.Option(
            metavar="OLD NEW",
            help="Measure nothing: what changed beyond the noise between the last results in two files, for models in both.",
        ),
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Time nothing: attention, cache and bytes read a byte generated, from the shape.")
    ] = False,
    speculate: Annotated[
        str | None,
        typer.Option(
            metavar="auto|N", help="Decode --decode-bytes with drafts and without, in turns: speed, drafts, passes a byte."
        ),
    ] = None,
    prompt_file: Annotated[
        str | None, typer.Option(help="With --speculate: file whose bytes are the prompt, not the shipped sample's.")
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(help="Prompts of so many bytes too, for example 1k,8k,32k. With --plan: contexts; default the longest."),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(help="Streams decoded together, for example 1,2,8, after each --context. ByT5, CANINE: default 1,8."),
    ] = None,
    bits: Annotated[int | None, typer.Option(help="With --plan: bits of the weights, 4, 8, 16 or 32; else as stored.")] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="With --plan: GB/s at which memory is read; measured unless given.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="PART",
            help="Ranks (mlx.launch -n N marlin ..) share this part of the models: global or encoder. With --quality; without"
            " it each rank has the models, and scores some of the bytes.",
        ),
    ] = None,
    plan_ranks: Annotated[
        int | None,
        typer.Option("--ranks", min=2, max=4096, help="With --plan: so many ranks too, by streams and by --split global."),
    ] = None,
    link: Annotated[
        str | None,
        typer.Option(
            metavar="US,GB/S[,tree]",
            help="With --ranks: microseconds and GB/s of a sum over two ranks, for example 300,1; tree: over more it grows by"
            " the logarithm, not by as much for each.",
        ),
    ] = None,
) -> None:
    """Measure speed, memory and quality of models side by side.

    Bytes per second, bytes of memory, and with --quality bits per byte by domain.

    Prompts come from the shipped sample. Several models are timed in turn (A B A B) on the same bytes.
    """
    keep_rows_apart(speculate or "off")
    from marlin_cli.backend import require_mlx
    from marlin_cli.commands.given import check_models
    from marlin_cli.commands.options import parse_cache_bits, parse_import_options, parse_size, parse_sizes, parse_window
    from marlin_cli.errors import UsageError

    require_mlx()
    from marlin_cli.bench.result import QualitySettings
    from marlin_cli.bench.run import Request
    from marlin_cli.bench.throughput import ThroughputSettings
    from marlin_cli.commands import bench_run
    from marlin_cli.commands.bench_output import Output, compare_results, show_kernels
    from marlin_cli.commands.imports import imports_of
    from marlin_cli.quality.held_out import Windowing

    said = parse_import_options(import_options)
    if language is not None:
        said = dataclasses.replace(said, language=language)
    if kernels:
        if models:
            check_models(command_line, models)
        cache_bits = parse_cache_bits(kv_bits, k_bits, v_bits)
        return show_kernels(device, models or (), activation_bits, imports_of(models or (), said), cache_bits)
    if surprise is not None:
        from marlin_cli.commands import surprise_run

        asked = surprise_run.SurpriseRequest(
            models=tuple(models or [DEFAULT_MODEL]),
            options=said,
            input=surprise,
            window=parse_window(window, sinks),
            share_left=sparse,
            kv_bits=parse_cache_bits(kv_bits, k_bits, v_bits),
            activation_bits=activation_bits,
            device=device,
            top=top,
            output=output,
            form=output_format,
            resume=resume,
        )
        check_models(command_line, asked.models)
        return surprise_run.run(asked)
    destination = Output.checked(output_format, output, report_page, plot, save, chart or ())
    if compare is not None:
        return compare_results(*compare, destination)
    names = tuple(models or [DEFAULT_MODEL])
    cache = parse_cache_bits(kv_bits, k_bits, v_bits)
    if plan:
        from marlin_cli.commands.bench_plan import show_plan

        check_models(command_line, names)
        return show_plan(names, context, bits, cache, bandwidth, device, imports_of(names, said), plan_ranks, link)
    if speculate is not None:
        from marlin_cli.bench.throughput import sample_prompt
        from marlin_cli.commands.bench_speculation import show_speculation
        from marlin_cli.commands.prompts import bytes_of_file
        from marlin_cli.commands.speculation_options import speculation_given

        check_models(command_line, names)
        prompt = None if prompt_file is None else bytes_of_file(prompt_file)
        size, count = parse_size(prompt_bytes, "--prompt-bytes"), parse_size(decode_bytes, "--decode-bytes")
        return show_speculation(
            names, speculation_given(speculate, None), sample_prompt(size, 0) if prompt is None else prompt, count, repeats,
            imports_of(names, said), device=device, kv_bits=cache, activation_bits=activation_bits,
        )  # fmt: skip
    if against is not None:
        names = (against, *names)
    sizes = {
        "window_bytes": ("--window-bytes", window_bytes),
        "stride_bytes": ("--stride-bytes", stride_bytes),
        "max_bytes_per_file": ("--max-bytes-per-file", max_bytes_per_file),
        "max_bytes": ("--max-quality-bytes", max_quality_bytes),
    }
    windowing = Windowing(**{name: parse_size(text, option) for name, (option, text) in sizes.items() if text is not None})
    view = parse_window(window, sinks)
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
    if formats is not None:
        from marlin_cli.commands.bench_formats import show_formats

        check_models(command_line, names)
        return show_formats(
            names, formats, quality or (), windowing, None if no_throughput else timing, destination,
            device=device, activation_bits=activation_bits, options=said,
        )  # fmt: skip
    request = Request(
        models=names,
        throughput=None if no_throughput else timing,
        quality=None if quality is None else QualitySettings(tuple(quality), windowing, reference, view),
        device=device,
        kv_bits=cache,
        activation_bits=activation_bits,
        roofline=roofline,
        split=split,
        resume=resume,
        share_left=sparse,
        reference_cache_bytes=parse_size(reference_cache, "--reference-cache"),
    )
    bench_run.check_kinds(names)
    check_models(command_line, names)
    request = dataclasses.replace(request, imports=imports_of((*names, reference), said))
    bench_run.run(request, destination, against, details=details)
