"""Workers that make inputs, hand them to a fork server and judge what came of them. Prints nothing."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from . import server
from .case import Case
from .judge import Outcome, verdict
from .kinds import KINDS
from .materials import ROOT

# Where MLX keeps what it compiled, for the next process.
COMPILED = "mlx"


@dataclass(frozen=True)
class Result:
    """What became of one input."""

    kind: str
    seed: int
    number: int
    verdict: str
    reason: str
    argv: list[str]
    environment: dict[str, str]
    seconds: float
    peak_bytes: int


class Worker:
    """A fork server with folders of its own, for one input after another. A context manager."""

    def __init__(self, folder: Path, materials: Path, kernels: Path | None) -> None:
        """`kernels`: the cache of built kernels that the worker takes a copy of."""
        self.folder, self.materials = folder, materials
        self._places = {name: folder / name for name in ("cache", "home", "tmp", "streams")}
        for place in self._places.values():
            place.mkdir(parents=True, mode=0o700)
        if kernels is not None:
            shutil.copytree(kernels, self._places["cache"], dirs_exist_ok=True)
            self._places["cache"].chmod(0o700)
        environment = {**os.environ, **server.ENVIRONMENT, "MARLIN_CACHE": str(self._places["cache"])}
        environment |= {"HOME": str(self._places["home"]), "TMPDIR": str(self._places["tmp"])}
        environment["PYTHONPATH"] = str(ROOT)
        command = [sys.executable, str(Path(server.__file__))]
        self._server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def run(self, kind: str, seed: int, number: int, keep: Path | None = None) -> Result:
        """Make input `number` of a kind, run it and judge it; `keep` is a folder to leave it in."""
        folder = Path(tempfile.mkdtemp(dir=self.folder, prefix="input-")) if keep is None else keep.resolve()
        work = folder / "work"
        work.mkdir(parents=True)
        try:
            case = KINDS[kind](Random(f"{kind} {seed} {number}"), work, self.materials)
            outcome = self.outcome(case, work)
            name, reason = verdict(case, outcome)
            if keep is not None:
                (folder / "stdout").write_bytes(outcome.stdout)
                (folder / "stderr").write_bytes(outcome.stderr)
            answer = outcome.answer
            return Result(
                kind, seed, number, name, reason, case.argv, case.environment, answer["seconds"], answer["peak_bytes"]
            )
        finally:
            if keep is None:
                shutil.rmtree(folder, ignore_errors=True)

    def outcome(self, case: Case, work: Path) -> Outcome:
        """Run a command in the folder `work`."""
        streams = self._places["streams"]
        for name, data in {"in": case.stdin, "out": b"", "err": b""}.items():
            (streams / name).write_bytes(data)
        before = self._listing(work)
        request = {"argv": case.argv, "folder": str(work), "streams": str(streams), "environment": case.environment}
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = json.loads(self._server.stdout.readline())
        left = tuple(sorted(self._listing(work) - before))
        for name in {*os.listdir(self._places["tmp"])} - {COMPILED}:
            path = self._places["tmp"] / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
        return Outcome(answer, (streams / "out").read_bytes(), (streams / "err").read_bytes(), left)

    def _listing(self, work: Path) -> set[str]:
        """What lies in the folder of the input and in the temporary one, and what is half done in the cache."""
        cache = self._places["cache"]
        half_done = {f"cache/{path.relative_to(cache)}" for path in cache.rglob("*unfinished*")}
        temporary = {f"TMPDIR/{name}" for name in os.listdir(self._places["tmp"]) if name != COMPILED}
        return {*os.listdir(work), *temporary, *half_done}


@contextlib.contextmanager
def worker(materials: Path) -> Iterator[Worker]:
    """A worker in a temporary folder."""
    from marlin_cli.ops.cpu_build import cache_folder

    kernels = cache_folder()
    with (
        tempfile.TemporaryDirectory(prefix="marlin-hostile-") as folder,
        Worker(Path(folder) / "worker", materials, kernels if kernels.is_dir() else None) as made,
    ):
        yield made


def share(count: int) -> dict[str, int]:
    """How many inputs of each kind make `count` together."""
    each, rest = divmod(count, len(KINDS))
    return {kind: each + (index < rest) for index, kind in enumerate(KINDS)}


def run_all(
    made: Worker, seed: int, count: int, minutes: float | None = None, part: tuple[int, int] = (0, 1)
) -> Iterator[Result]:
    """The inputs of all kinds for a seed, kind by kind in turn.

    Args:
        minutes: end early.
        part: (index, count): every count-th of them, from index on.
    """
    began = time.monotonic()
    wanted = share(count)
    inputs = [(kind, number) for number in range(max(wanted.values())) for kind in KINDS if number < wanted[kind]]
    for kind, number in inputs[part[0] :: part[1]]:
        yield made.run(kind, seed, number)
        if minutes is not None and time.monotonic() - began > minutes * 60:
            return
