"""`marlin calibrate`: a model and corpora in, a file of activation statistics out; merges and shows such files too."""

from typing import Annotated

import typer

from marlin_cli.commands.options import DEFAULT_MODEL, IMPORT_HELP


def calibrate(
    command_line: typer.Context,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL|FILE",
            help="Path, shipped name or hub repository of a model; with --merge the files to add up."
            f" Default: {DEFAULT_MODEL}.",
        ),
    ] = None,
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            help="Recipe, [name=]path[:weight], hf:name[/config][@split], or - for stdin; repeatable. The name is the"
            " domain: multilingual, code, binary or your own; the weight, against the others', is the chance that a window"
            " comes from there. A folder that has one named multilingual, code or binary is read as those domains, and nothing"
            " else of it. Default: the shipped recipe `default`."
        ),
    ] = None,
    pairs: Annotated[
        list[str] | None,
        typer.Option(
            help="ByT5: [name=]file of inputs and answers, .jsonl or .tsv, or a shipped model that has some; repeatable."
            " Without it --corpus is read, with spans taken out."
        ),
    ] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="File to write (.safetensors).")] = None,
    max_bytes: Annotated[str | None, typer.Option(help="Stop after so many bytes of the corpus, e.g. 2M.")] = None,
    seq_bytes: Annotated[
        str | None,
        typer.Option(
            help="Bytes of a window, or of either side of a pair, at most the model's context. Default: the recipe's, else"
            " 16384; ByT5: 1024; CANINE: 2048."
        ),
    ] = None,
    noise_density: Annotated[float | None, typer.Option(help="ByT5: share of the bytes taken out. Default 0.15.")] = None,
    span_bytes: Annotated[float | None, typer.Option(help="ByT5: mean length of what is taken out. Default 20.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the order of files and of the mixing.")] = 0,
    shard: Annotated[str, typer.Option(help="INDEX/COUNT: measure every COUNT-th window; merge the shards.")] = "0/1",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run of these options.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace statistics that are there.")] = False,
    hessian: Annotated[
        bool, typer.Option("--hessian", help="Also keep x^T x of every layer's input, which gptq and awq read; large.")
    ] = False,
    merge: Annotated[bool, typer.Option("--merge", help="Add up the named statistics files instead.")] = False,
    show: Annotated[str | None, typer.Option(help="Print the statistics in this file instead.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="The statistics as one JSON document on stdout.")] = False,
    import_options: Annotated[list[str] | None, typer.Option("--import", help=IMPORT_HELP, metavar="NAME=VALUE")] = None,
    device: Annotated[str, typer.Option(help="auto, metal, cuda or cpu.")] = "auto",
) -> None:
    """Keep what the layers of a model see of a corpus.

    By channel, domain, byte of the patch and head.

    ByT5 reads pairs teacher-forced, or fills gaps in the corpus as in its pre-training. CANINE reads what of the corpus is
    UTF-8; other windows are left out and counted. An interrupted run goes on with --resume and writes the same file.
    """
    from pathlib import Path

    from marlin_cli.commands.given import check_models
    from marlin_cli.commands.options import parse_import_options, parse_shard, parse_size
    from marlin_cli.errors import UsageError

    named = arguments or []
    if show is not None:
        from marlin_cli.commands.calibration_run import show_file

        show_file(Path(show), json_output=json_output)
        return
    if output is None:
        raise UsageError("--output is missing; name the file to write")
    if not output.endswith(".safetensors"):
        raise UsageError(f"--output {output}: statistics are safetensors; name the file so")
    if merge:
        if len(named) < 2:
            raise UsageError("--merge needs two statistics files or more: marlin calibrate --merge A B -o OUT")
        from marlin_cli.commands.calibration_run import merge_files

        merge_files([Path(name) for name in named], Path(output), overwrite=overwrite, json_output=json_output)
        return
    if len(named) > 1:
        raise UsageError(f"one model at a time, found {' and '.join(named[:2])}; corpora are named with --corpus")
    from marlin_cli.backend import require_mlx

    sequence_bytes = None if seq_bytes is None else parse_size(seq_bytes, "--seq-bytes")
    limit = None if max_bytes is None else parse_size(max_bytes, "--max-bytes")
    share = parse_shard(shard)
    require_mlx()
    from marlin_cli.commands.calibration_run import Input, run
    from marlin_cli.ranks import joined

    model = named[0] if named else DEFAULT_MODEL
    check_models(command_line, [model])
    with joined() as ranks:
        run(
            ranks,
            model,
            Input(tuple(corpus or ()), tuple(pairs or ()), sequence_bytes, limit, seed, noise_density, span_bytes),
            Path(output),
            shard=share,
            resume=resume,
            overwrite=overwrite,
            hessian=hessian,
            options=parse_import_options(import_options),
            device=device,
            json_output=json_output,
        )
