"""`marlin serve`: a model over HTTP, many streams side by side."""

from typing import Annotated

import typer

from marlin_cli.commands.options import IMPORT_HELP, SINKS_HELP, WINDOW_HELP
from marlin_cli.commands.speculation_options import SPECULATE_HELP


def serve(
    command_line: typer.Context,
    model: Annotated[str, typer.Argument(help="Path, shipped name or hub repository of a model.")],
    host: Annotated[str, typer.Option(help="Address to listen at; the default is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one.")] = 8080,
    name: Annotated[str | None, typer.Option(help="What clients call the model; by default the last part of its path.")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="Key that clients must send; other users of this machine can see it here. Also MARLIN_API_KEY."),
    ] = None,
    api_key_file: Annotated[str | None, typer.Option(help="File whose first line is the key.")] = None,
    max_streams: Annotated[int, typer.Option(min=1, max=4096, help="Streams that run side by side.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=0, help="Streams that may wait for a place; more are refused (429).")] = 64,
    cache_memory: Annotated[
        str | None, typer.Option(help="What the caches of all streams may grow to, for example 4G; others wait.")
    ] = None,
    state_memory: Annotated[
        str | None,
        typer.Option(help="Memory for prompts that were read: what begins alike is not read again. 0: none. Default 256M."),
    ] = None,
    state_folder: Annotated[
        str | None, typer.Option(help="Folder that keeps them too, over restarts; it holds what clients wrote.")
    ] = None,
    drain_seconds: Annotated[float, typer.Option(min=0, help="How long streams may go on after SIGTERM or Ctrl-C.")] = 3.0,
    rows: Annotated[
        str,
        typer.Option(help="exact: a stream's bytes never depend on its neighbours. fast: as quick as the CPU can."),
    ] = "exact",
    speculate: Annotated[str, typer.Option(metavar="auto|off|N", help=SPECULATE_HELP)] = "off",
    window: Annotated[str | None, typer.Option(metavar="BYTES|restart", help=WINDOW_HELP)] = None,
    sinks: Annotated[int | None, typer.Option(help=SINKS_HELP)] = None,
    kv_bits: Annotated[int | None, typer.Option(help="Bits of the cache (of a MegaByte, the global one): 4, 8 or 16.")] = None,
    k_bits: Annotated[int | None, typer.Option(help="Bits of its keys alone.")] = None,
    v_bits: Annotated[int | None, typer.Option(help="Bits of its values alone.")] = None,
    activation_bits: Annotated[
        int, typer.Option(help="8 rounds what packed layers multiply: faster on a CPU, a little less accurate.")
    ] = 16,
    import_options: Annotated[list[str] | None, typer.Option("--import", help=IMPORT_HELP, metavar="NAME=VALUE")] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="PART",
            help="Ranks (mlx.launch -n N marlin ..) share this part of the model: global, of a MegaByte, or encoder, of a ByT5."
            " Without it each has the model, and streams run on all.",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, metal, cuda or cpu.")] = "auto",
) -> None:
    """Serve a model over HTTP.

    OpenAI's completions and chats, raw bytes, metrics, and a page to try it.

    Each request is a line of JSON on stdout. SIGTERM and Ctrl-C let what runs end, a second one does not.
    """
    from pathlib import Path

    from marlin_cli.commands.serve_run import check_server, key_of, run, use_rows

    check_server()
    key = key_of(api_key, api_key_file)
    use_rows(rows)
    from marlin_cli.backend import require_mlx

    require_mlx()
    from marlin_cli.commands.given import check_models
    from marlin_cli.commands.options import parse_cache_bits, parse_import_options, parse_size, parse_window
    from marlin_cli.engine.scheduling import SchedulerLimits
    from marlin_cli.engine.speculation import speculation_of
    from marlin_cli.serving.loading import KeptPrompts
    from marlin_cli.serving.server import ServerSettings

    cache_bytes = None if cache_memory is None else parse_size(cache_memory, "--cache-memory")
    limits = SchedulerLimits(max_streams=max_streams, cache_bytes=cache_bytes)
    settings = ServerSettings(host, port, key, limits, max_waiting, drain_seconds)
    kept = KeptPrompts(
        parse_size(state_memory or "256M", "--state-memory"),
        None if state_folder is None else Path(state_folder),
        is_asked_for=state_folder is not None or state_memory is not None,
    )
    imports = parse_import_options(import_options)
    bits = parse_cache_bits(kv_bits, k_bits, v_bits)
    check_models(command_line, [model])
    speculation, view = speculation_of(speculate), parse_window(window, sinks)
    run(
        model,
        name,
        settings,
        kept,
        split,
        speculation,
        view,
        device=device,
        kv_bits=bits,
        activation_bits=activation_bits,
        options=imports,
    )
