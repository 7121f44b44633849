"""The program `marlin`: its subcommands, and one place that turns errors into a line and an exit code."""

import contextlib
import errno
import functools
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from marlin_cli.commands.bench import bench
from marlin_cli.commands.calibrate import calibrate
from marlin_cli.commands.encode import encode
from marlin_cli.commands.generate import generate
from marlin_cli.commands.given import Command
from marlin_cli.commands.info import info
from marlin_cli.commands.label import label
from marlin_cli.commands.quantize import quantize
from marlin_cli.commands.serve import serve
from marlin_cli.errors import AssumptionWarning, MarlinError, Terminated
from marlin_cli.text import one_line
from marlin_cli.version import described

app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # brackets in help texts are meant: [name=]path
    context_settings={"help_option_names": ["-h", "--help"]},
)


# What a write says that found no room. Streams alone raise it here: files are written where it is made an `OutputError`.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


# Characters of an error; its end says what to do. Names may be thousands long.
LONGEST_LINE = 1200


class _ReaderGone(Exception):
    """The reader of our output has what it wanted. Not an error, but typer would make it exit code 1."""


def _until_reader_goes(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
            sys.stdout.flush()
        except BrokenPipeError:
            raise _ReaderGone from None
        except Terminated as ending:  # typer would take it for Ctrl-C
            raise typer.Exit(ending.exit_code) from None

    return run


for _command in (calibrate, quantize, generate, label, encode, serve, bench, info):
    app.command(cls=Command)(_until_reader_goes(_command))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(described())
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print version, commit and kernels."),
    ] = False,
) -> None:
    """Calibrate, quantise and run byte-level language models on MLX."""


def main() -> NoReturn:
    """Run the program: 0 done, 1 an error with a one-line reason, 2 wrong usage, 130 or 143 interrupted."""
    ended_by: list[int] = []
    try:
        _listen_to_signals(ended_by)
        _open_closed_streams()
        _show_warnings()
        code = _run()
    except BaseException:
        # The exception of a signal comes back as another one where Python or a library was in the middle of something.
        if not ended_by:
            raise
        code = 1
    sys.exit(128 + ended_by[0] if ended_by and code else code)


def _run() -> int:
    """The exit code of the command line; what is no bug is said in a line."""
    from typer.main import get_command

    code = 0
    try:
        result = get_command(app)(sys.argv[1:] or ["--help"], standalone_mode=False)
        code = result if isinstance(result, int) else 0
        sys.stdout.flush()  # of --help and --version
    except MarlinError as error:
        code = _fail(str(error), error.exit_code)
    except (_ReaderGone, BrokenPipeError):
        _forget_output()
    except OSError as error:
        if error.errno in NO_ROOM and error.filename is None:
            _forget_output()
            code = _fail(f"cannot write the output: {error.strerror}", 1)
        else:
            code = _fail(one_line(error if error.filename is None else f"{error.filename}: {error.strerror}"), 1)
    except MemoryError:
        code = _fail("out of memory; take a smaller model, shorter inputs or fewer at a time", 1)
    except Terminated as ending:
        code = ending.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = 128 + signal.SIGINT
    except Exception as error:
        # Usage errors of the option parser; anything else is a bug and shows its traceback.
        if not hasattr(error, "format_message"):
            raise
        code = _fail(error.format_message(), 2)
    return code


def _listen_to_signals(ended_by: list[int]) -> None:
    """Let the signals that ask a process to end be exceptions, so that nothing half done is left, and be remembered.

    Those that nobody types come once: the process is ending then.
    """

    def end(number: int, _: object) -> None:
        ended_by.append(number)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        signal.signal(number, signal.SIG_IGN)
        raise Terminated(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):  # shells and nohup have some ignored
            signal.signal(number, end)


def _show_warnings() -> None:
    """Our own warnings are a line each, once; those of libraries are for developers, who ask for them by -W."""

    shown = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        from marlin_cli.console import note

        if (line := one_line(message)) not in shown:
            shown.add(line)
            note(f"marlin: {line}")

    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.simplefilter("once", AssumptionWarning)  # a command may read a model several times
        warnings.showwarning = show


def _open_closed_streams() -> None:
    """Give streams that the caller closed (`>&-`) to the null device, else the first files opened would be in their place."""
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115 (for the whole run, as the next two)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _forget_output() -> None:
    """Drop what stdout still holds: Python would complain once more when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, code: int) -> int:
    from marlin_cli.console import failure

    with contextlib.suppress(OSError):  # nowhere to say it
        line = " ".join(message.split())
        failure(line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 300]} ... {line[-300:]}")
    return code
