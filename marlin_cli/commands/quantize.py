"""`marlin quantize`: a model in, a folder with packed weights out, and a table of what it cost."""

from typing import Annotated

import typer

from marlin_cli.commands.options import IMPORT_HELP


def quantize(
    command_line: typer.Context,
    model: Annotated[str, typer.Argument(help="Path, shipped name or hub repository of a model.")],
    output: Annotated[str | None, typer.Option("--output", "-o", help="Folder to write.")] = None,
    bits: Annotated[
        int | None,
        typer.Option(
            help="Bits of all but --wo-bits, --patcher-bits and --hash-bits: 4, 8 or 16; options of a part go before it."
        ),
    ] = None,
    global_bits: Annotated[
        int | None, typer.Option(help="Bits of the global part, of CANINE the deep layers: 4, 8 or 16. Default 4.")
    ] = None,
    local_bits: Annotated[
        int | None, typer.Option(help="Bits of the local part, of CANINE what runs over characters: 4, 8 or 16. Default 8.")
    ] = None,
    encoder_bits: Annotated[int | None, typer.Option(help="ByT5, BLT: bits of the encoder. Default 4, of a BLT 8.")] = None,
    decoder_bits: Annotated[
        int | None, typer.Option(help="ByT5, ByGPT5, BLT: bits of the decoder. Default 4, of a BLT 8.")
    ] = None,
    patcher_bits: Annotated[int | None, typer.Option(help="BLT: bits of what tells where patches end. Default 8.")] = None,
    hash_bits: Annotated[int | None, typer.Option(help="BLT: bits of the hash tables, 8 (int8) or 16. Default 8.")] = None,
    cross_bits: Annotated[int | None, typer.Option(help="ByT5: bits of the attention between them. Default 4.")] = None,
    wo_bits: Annotated[int | None, typer.Option(help="ByT5, ByGPT5: least bits of the feed-forward's wo. Default 8.")] = None,
    kv_bits: Annotated[
        int | None, typer.Option(help="Bits of the cache when the model runs: MegaByte's global one, ByT5's cross cache.")
    ] = None,
    balance_keys: Annotated[
        bool,
        typer.Option(
            "--balance-keys",
            help="Scale keys against queries by --stats, so that --kv-bits 4 costs less where some key channels are large.",
        ),
    ] = False,
    global_format: Annotated[str | None, typer.Option(help="nvfp4, mxfp4, int4, mxfp8, int8 or 16bit.")] = None,
    local_format: Annotated[str | None, typer.Option(help="nvfp4, mxfp4, int4, mxfp8, int8 or 16bit.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale in int4 and int8.")] = None,
    stats: Annotated[str | None, typer.Option(help="Statistics of `marlin calibrate`; errors are weighted.")] = None,
    method: Annotated[
        str,
        typer.Option(
            help="rtn, mse, awq (--stats), gptq (--stats with Hessians, or --sequential), gptq+hadamard (--sequential; mxfp4)."
        ),
    ] = "mse",
    domain_weight: Annotated[
        list[str] | None, typer.Option(help="DOMAIN=SHARE of the statistics; others count nothing; repeatable.")
    ] = None,
    sequential: Annotated[
        bool,
        typer.Option("--sequential", help="Pack layer after layer on calibration bytes, instead of --stats; slow."),
    ] = False,
    sequential_bytes: Annotated[str, typer.Option(help="How many bytes for --sequential.", metavar="SIZE")] = "512k",
    target_bpw: Annotated[
        float | None,
        typer.Option(help="Choose each layer's format by measuring; at most so many bits a weight on average."),
    ] = None,
    save_recipe: Annotated[
        str | None, typer.Option(help="Where --target-bpw writes what it chose. Default: OUTPUT.recipe.yaml.")
    ] = None,
    calibration_corpus: Annotated[
        list[str] | None,
        typer.Option(help="Bytes for --sequential and --target-bpw, as calibrate's --corpus. Default: `default`."),
    ] = None,
    calibration_pairs: Annotated[
        list[str] | None,
        typer.Option(help="ByT5: pairs instead, as calibrate's --pairs. Without them the corpora lose spans, as there."),
    ] = None,
    distill_steps: Annotated[
        int,
        typer.Option(min=0, help="Then tune it (of a MegaByte the local part) by so many steps of 8 KiB; slow."),
    ] = 0,
    distill_corpus: Annotated[
        list[str] | None, typer.Option(help="Bytes to tune on, as calibrate's --corpus. Default: `default`.")
    ] = None,
    distill_pairs: Annotated[
        list[str] | None, typer.Option(help="ByT5: pairs to tune on instead, again and again in other orders.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Shipped recipe or YAML file; options go before it.")] = None,
    override: Annotated[
        list[str] | None, typer.Option(help="REGEX=FORMAT for the layers whose path matches; repeatable.")
    ] = None,
    report: Annotated[
        str | None, typer.Option(metavar="FILE.html", help="Write a page: size, errors, ranges, KL divergence.")
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Then score the packed model beside the original, as bench --formats does, and say it in the folder's card.",
        ),
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME", help="Send the folder to the Hugging Face hub too; needs the extra `hub` and a token."
        ),
    ] = None,
    export: Annotated[
        str | None,
        typer.Option(metavar="compressed-tensors", help="Write it as llm-compressor does; every layer nvfp4 or as it is."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and its sizes; write nothing.")] = False,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Read no weights and write nothing: sizes in 16, 8, 4/8 and 4 bits, of MODEL, a config.json or a preset"
            " such as byt5-xxl.",
        ),
    ] = False,
    bandwidth: Annotated[
        float | None, typer.Option(help="With --plan: GB/s at which memory is read, for the bytes a second that it allows.")
    ] = None,
    dequantize: Annotated[bool, typer.Option("--dequantize", help="Unpack a packed model.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output folder.")] = False,
    import_options: Annotated[list[str] | None, typer.Option("--import", help=IMPORT_HELP, metavar="NAME=VALUE")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="The report as one JSON document.")] = False,
) -> None:
    """Pack the linear layers of a model, with bit widths by part.

    Byte embeddings, norms and the output head stay as they are. The result loads in plain MLX too.
    """
    import dataclasses
    from pathlib import Path

    from marlin_cli.backend import require_mlx
    from marlin_cli.errors import UsageError
    from marlin_cli.writing import check_output_file, check_output_folder

    require_mlx()
    from marlin_cli.checkpoints.location import locate_model
    from marlin_cli.commands import quantization_run as run
    from marlin_cli.commands.calibration_bytes import CalibrationBytes
    from marlin_cli.commands.given import check_models
    from marlin_cli.commands.options import parse_import_options, parse_size
    from marlin_cli.commands.quantization_settings import (
        check_export,
        check_keeps_keys,
        domain_weights_of,
        naming,
        settings_of,
    )
    from marlin_cli.engine.heads import with_heads

    if plan:
        from marlin_cli.commands.quantize_plan import show_plan

        return show_plan(model, parse_import_options(import_options), kv_bits, bandwidth, json_output=json_output)
    if output is None and not dry_run:
        raise UsageError("--output is missing; name the folder to write, or pass --dry-run")
    if output is not None:
        check_output_folder(Path(output), overwrite=overwrite)
    target = None if dry_run or output is None else Path(output)
    page = None if report is None else Path(report)
    if page is not None:
        check_output_file(page)
    check_export(export)
    if push is not None:
        from marlin_cli.commands.hub import check_push

        check_push(push)
    shares = domain_weights_of(domain_weight or [])
    check_models(command_line, [model])
    options = with_heads(locate_model(model), parse_import_options(import_options))
    if dequantize:
        run.unpack(model, options, target, overwrite=overwrite, json_output=json_output)
        return
    check_keeps_keys(model, options, kv_bits)
    by_part = {
        "global": global_bits, "local": local_bits, "encoder": encoder_bits, "decoder": decoder_bits, "cross": cross_bits,
        "patcher": patcher_bits, "hash": hash_bits, "wo": wo_bits,
    }  # fmt: skip
    settings = settings_of(
        recipe, bits, by_part, {"global": global_format, "local": local_format}, kv_bits, group_size, override or []
    )
    if balance_keys:
        settings = dataclasses.replace(settings, balance_keys=True)
    calibration = CalibrationBytes("calibration", tuple(calibration_corpus or ()), tuple(calibration_pairs or ()))
    if target_bpw is not None:
        from marlin_cli.commands.automatic_run import automatic_settings

        if save_recipe is None and output is None:
            raise UsageError("--target-bpw writes a recipe; name it with --save-recipe")
        chosen = Path(save_recipe or f"{output}.recipe.yaml")
        check_output_file(chosen)
        with naming(stats):
            settings = automatic_settings(
                model, options, settings, target_bpw, calibration, chosen,
                statistics_file=stats, method="mse" if sequential else method, domain_weights=shares if stats else None,
            )  # fmt: skip
    steps = run.ByteSteps(
        parse_size(sequential_bytes, "--sequential-bytes") if sequential else 0,
        calibration,
        distill_steps,
        CalibrationBytes("distill", tuple(distill_corpus or ()), tuple(distill_pairs or ())),
    )
    with naming(stats):
        run.pack(
            model, options, target, settings, stats, method, shares, steps,
            page=page, export=export, overwrite=overwrite, json_output=json_output, measure=measure,
        )  # fmt: skip
    if push is not None and target is not None:
        from marlin_cli.commands.hub import push as send

        send(target, push)
