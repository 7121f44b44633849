"""What `marlin serve` does beside serving: its extra, its key, how rows are computed, how the model is loaded."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from marlin_cli.errors import BackendError, UsageError
from marlin_cli.text import quoted

if TYPE_CHECKING:
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


def run(model: str, name: str | None, settings: "ServerSettings", **options: Any) -> None:
    """Load the model in the thread that will own it, and serve it; see `serving.server.serve`."""
    from marlin_cli.api import load
    from marlin_cli.serving.loading import served_model
    from marlin_cli.serving.server import serve

    def loaded() -> tuple[Any, Callable[[], Any]]:
        return served_model(load(model, **options), model, name, settings.limits)

    serve(settings, loaded)


def _checked(key: str, where: str) -> str:
    if not 1 <= len(key) <= MOST_KEY_BYTES or any(not 33 <= ord(each) <= 126 for each in key):
        raise UsageError(f"{where}: a key is 1 to {MOST_KEY_BYTES:,} printable ASCII characters without spaces")
    return key
