"""A process that has marlin imported and runs each command in a fork of itself, with limits of time and memory.

It starts no thread before it forks: MLX's and OpenMP's threads do not survive a fork. It reads requests, a JSON object a
line, and answers with what became of each. It judges nothing.
"""

import contextlib
import gc
import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

# A command may use so much processor time, or wait so long without using any. Other programs on the machine change neither.
MOST_SECONDS = 5.0
MOST_WALL_SECONDS = 60.0
MOST_BYTES = 1 << 30
# Asked for, touched or not: twice as much as libraries reserve, so that no input brings the machine down.
MOST_ADDRESS_SPACE = 16 << 30
MOST_FILE_BYTES = 1 << 30

WATCH_SECONDS = 0.02

# One thread each, and no torch: `datasets` imports it where it is installed, for nothing.
ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1", "MARLIN_THREADS": "1", "OMP_NUM_THREADS": "1", "USE_TORCH": "0", "USE_TF": "0", "USE_JAX": "0",
    "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "", "TERM": "dumb",
}  # fmt: skip


def serve() -> None:
    """Answer requests until stdin ends."""
    _import_all()
    gc.freeze()  # what is imported stays in pages that the forks share
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        answers.write(json.dumps(_answer(json.loads(line))) + "\n")
        answers.flush()


def _import_all() -> None:
    """All that a command may import and that starts no thread."""
    import importlib
    import pkgutil

    import datasets
    import huggingface_hub  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import typer.main
    import zstandard  # noqa: F401
    from datasets import iterable_dataset  # noqa: F401

    import marlin_cli
    from marlin_cli.cli import app
    from marlin_cli.errors import MarlinError

    datasets.disable_progress_bars()
    for module in pkgutil.walk_packages(marlin_cli.__path__, "marlin_cli."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    # The parser of options imports more when it reads some: a command that fails at once, and starts no thread.
    with contextlib.suppress(MarlinError):
        typer.main.get_command(app)(["bench", "--compare", "/nothing/old", "/nothing/new"], standalone_mode=False)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run `argv` in `folder` with stdin, stdout and stderr in files of `streams`."""
    process = os.fork()
    if process == 0:
        _run(request)
    watched = _Watched(process)
    killed_for = ""
    while True:
        found, status, usage = os.wait4(process, os.WNOHANG)
        if found:
            break
        killed_for = killed_for or watched.over_its_limits()
        if killed_for:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
        time.sleep(WATCH_SECONDS if watched.age() > 0.5 else 0.002)
    alive = False
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)
        alive = True
    scale = 1 if sys.platform == "darwin" else 1024
    return {
        "code": os.waitstatus_to_exitcode(status),
        "killed_for": killed_for,
        "children_left": alive,
        "peak_bytes": usage.ru_maxrss * scale,
        "seconds": usage.ru_utime + usage.ru_stime,
        "wall_seconds": watched.age(),
    }


class _Watched:
    """A running process: how old it is, and whether it is over a limit."""

    def __init__(self, process: int) -> None:
        self._process = process
        self._began = self._moved = time.monotonic()
        self._used = 0.0

    def age(self) -> float:
        return time.monotonic() - self._began

    def over_its_limits(self) -> str:
        """`time`, `memory` or nothing."""
        now = time.monotonic()
        with contextlib.suppress(OSError, IndexError, ValueError):
            used, resident_bytes = _usage(self._process)
            if used > self._used or self._has_children():
                self._used, self._moved = used, now
            if resident_bytes > MOST_BYTES:
                return "memory"
        waits = now - self._moved > MOST_SECONDS
        return "time" if waits or self._used > MOST_SECONDS or self.age() > MOST_WALL_SECONDS else ""

    def _has_children(self) -> bool:
        """Does it wait for a compiler, say? MLX runs one for some operations."""
        return any(path.read_text() for path in Path(f"/proc/{self._process}/task").glob("*/children"))


def _usage(process: int) -> tuple[float, int]:
    """Seconds of processor time, and bytes in memory."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK"), int(fields[21]) * os.sysconf("SC_PAGE_SIZE")


def _run(request: dict[str, Any]) -> None:
    code = 70
    try:
        os.setpgid(0, 0)
        for limit, value in (
            (resource.RLIMIT_AS, MOST_ADDRESS_SPACE),
            (resource.RLIMIT_FSIZE, MOST_FILE_BYTES),
            (resource.RLIMIT_CORE, 0),
        ):
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(limit, (value, value))
        streams = Path(request["streams"])
        for number, (name, flags) in enumerate((("in", os.O_RDONLY), ("out", os.O_WRONLY), ("err", os.O_WRONLY))):
            os.dup2(os.open(streams / name, flags), number)
        sys.stdin, sys.stdout = open(0, encoding="utf-8"), open(1, "w", encoding="utf-8")  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1)  # noqa: SIM115
        os.chdir(request["folder"])
        os.environ.update(request["environment"])
        sys.argv = ["marlin", *request["argv"]]
        code = _ended()
    finally:
        os._exit(code)


def _ended() -> int:
    """The exit code of the command, as the interpreter would have it."""
    from marlin_cli.cli import main

    try:
        main()
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1 if ending.code else 0
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return code


if __name__ == "__main__":
    serve()
