"""The program `marlin`: four subcommands, and one place that turns errors into a line and an exit code."""

import os
import signal
import sys
from typing import Annotated, NoReturn

import typer

from marlin_cli import __version__
from marlin_cli.commands.bench import bench
from marlin_cli.commands.calibrate import calibrate
from marlin_cli.commands.generate import generate
from marlin_cli.commands.quantize import quantize
from marlin_cli.errors import MarlinError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (calibrate, quantize, generate, bench):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"marlin {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Calibrate, quantise and run byte-level language models on MLX."""


def main() -> NoReturn:
    """Run the program: 0 done, 1 an error with a one-line reason, 2 wrong usage, 130 interrupted."""
    from typer.main import get_command

    code = 0
    try:
        result = get_command(app)(standalone_mode=False)
        code = result if isinstance(result, int) else 0
        sys.stdout.flush()
    except MarlinError as error:
        code = _fail(str(error), error.exit_code)
    except BrokenPipeError:
        # The reader has what it wanted. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (KeyboardInterrupt, typer.Abort):
        code = 128 + signal.SIGINT
    except Exception as error:
        # Usage errors of the option parser; anything else is a bug and shows its traceback.
        if not hasattr(error, "format_message"):
            raise
        code = _fail(error.format_message(), 2)
    sys.exit(code)


def _fail(message: str, code: int) -> int:
    from marlin_cli.console import failure

    failure(" ".join(message.split()))
    return code


