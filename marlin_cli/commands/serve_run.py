"""What `marlin serve` does beside serving: its extra, its key, how rows are computed, how the model is loaded."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from marlin_cli.errors import BackendError, UsageError
from marlin_cli.text import quoted

if TYPE_CHECKING:
    from marlin_cli.engine.endless import Window
    from marlin_cli.engine.speculation import Speculation
    from marlin_cli.serving.loading import KeptPrompts
    from marlin_cli.serving.server import ServerSettings

KEY_VARIABLE = "MARLIN_API_KEY"
MOST_KEY_BYTES = 1024


def check_server() -> None:
    """See that the extra `serve` is installed.

    Raises:
        BackendError: it is not.
    """
    try:
        import jinja2
        import starlette
        import uvicorn
    except ImportError as error:
        raise BackendError(f"serving needs {error.name}; pip install 'marlin-cli[serve]'") from None
    del jinja2, starlette, uvicorn


def key_of(option: str | None, file: str | None) -> str | None:
    """The key that clients must send: of the option, a file's first line, or the environment; None: none.

    Raises:
        UsageError: a file that cannot be read, or a key that no header can carry.
    """
    if option is not None:
        return _checked(option, "--api-key")
    if file is not None:
        try:
            with open(os.path.expanduser(file), "rb") as opened:
                line = opened.read(MOST_KEY_BYTES + 2).partition(b"\n")[0]
        except (OSError, ValueError) as error:
            raise UsageError(f"--api-key-file {file}: cannot read: {getattr(error, 'strerror', None) or error}") from None
        return _checked(line.decode("latin-1").strip(), f"--api-key-file {file}")
    given = os.environ.get(KEY_VARIABLE)
    return None if given is None else _checked(given, KEY_VARIABLE)


def use_rows(rows: str) -> None:
    """Say to the CPU kernels, which are not built yet, how they are to compute rows.

    Raises:
        UsageError: neither exact nor fast.
    """
    if rows not in ("exact", "fast"):
        raise UsageError(f"--rows must be exact or fast, found {quoted(rows)}")
    os.environ["MARLIN_ROWS"] = rows


def run(
    model: str,
    name: str | None,
    settings: "ServerSettings",
    kept: "KeptPrompts",
    split: str | None = None,
    speculation: "Speculation | None" = None,
    window: "Window | None" = None,
    **options: Any,
) -> None:
    """Load the model in the thread that will own it, and serve it; see `serving.server.serve`.

    Prompts are kept by a process that is alone. Of several ranks, rank 0 serves, and streams run on all, or with `split`
    all share the model.

    Args:
        window: how streams go on beyond the model's context; nothing is kept of their prompts then.
    """
    from marlin_cli.api import load, ranks_to_split
    from marlin_cli.commands.leading import check_alike
    from marlin_cli.engine.routing import dismiss, follow, over_ranks
    from marlin_cli.ranks import joined
    from marlin_cli.serving.loading import served_model, viewed
    from marlin_cli.serving.server import serve

    stores = []
    with joined() as ranks:
        if kept.is_asked_for and ranks.size > 1:
            raise UsageError(
                f"--state-memory and --state-folder are of one process, and {ranks.size} ranks run; leave them out"
            )
        check_alike(ranks, model, split=split, limits=settings.limits, window=window, **options)
        shared = ranks_to_split(split, model, ranks)
        if ranks.rank > 0:
            with ranks.deaf():
                own = viewed(load(model, split=shared, **options), window)
                _, schedulers = served_model(own, model, name, settings.limits)
                return follow(schedulers(), ranks, own.network)

        def loaded() -> tuple[Any, Callable[[], Any]]:
            own = viewed(load(model, split=shared, **options), window)
            store = None if ranks.size > 1 or window is not None else kept.store_for(own)
            if store is not None:
                stores.append(store)
            served, schedulers = served_model(own, model, name, settings.limits, store, speculation)
            return served, lambda: over_ranks(schedulers(), ranks, own.network, settings.limits.max_streams)

        with ranks.computing():  # nothing is left that should be saved when a rank is lost
            serve(settings, loaded)
        for store in stores:
            store.close()
        dismiss(ranks)


def _checked(key: str, where: str) -> str:
    if not 1 <= len(key) <= MOST_KEY_BYTES or any(not 33 <= ord(each) <= 126 for each in key):
        raise UsageError(f"{where}: a key is 1 to {MOST_KEY_BYTES:,} printable ASCII characters without spaces")
    return key
