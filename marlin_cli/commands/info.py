"""`marlin info`: what runs here and why, and what a model, a configuration, statistics or a state is."""

from typing import Annotated

import typer

from marlin_cli.commands.options import IMPORT_HELP


def info(
    command_line: typer.Context,
    named: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="MODEL|FILE",
            help="Models, configurations such as evabyte, statistics, states of prompts.",
        ),
    ] = None,
    with_fingerprint: Annotated[
        bool,
        typer.Option(
            "--fingerprint", help="Of each model too: reads all its bytes, and looks at the weights. Statistics name it."
        ),
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    import_options: Annotated[list[str] | None, typer.Option("--import", help=IMPORT_HELP, metavar="NAME=VALUE")] = None,
    device: Annotated[str, typer.Option(help="auto, metal, cuda or cpu.")] = "auto",
) -> None:
    """Tell what a model or file is, and what runs here.

    Versions, device, kernels and cache; of each model its architecture, layout, parts, bits and bytes.

    Nothing runs and nothing is built; weights are looked at with --fingerprint alone. With --json all of it is one document.
    """
    from marlin_cli.backend import require_mlx

    require_mlx()
    import json

    from marlin_cli import console
    from marlin_cli.commands.given import check_models
    from marlin_cli.commands.options import parse_import_options
    from marlin_cli.ops.device import choose_device
    from marlin_cli.reports import info as facts
    from marlin_cli.reports.described import describe, is_model

    if models := [name for name in named or () if is_model(name)]:
        check_models(command_line, models)
    chosen = choose_device(device)
    here = facts.installation(chosen)
    options = parse_import_options(import_options)
    described = [describe(name, chosen, options, with_fingerprint=with_fingerprint) for name in named or ()]
    if json_output:
        print(json.dumps(facts.document_of(here, described), allow_nan=False))
        return
    tables = [table for each in described for table in facts.tables_of(each)] or [facts.installation_table(here)]
    for table in tables:
        console.table(table.title, table.columns, table.rows, to_stdout=True, numbers=table.numbers)
