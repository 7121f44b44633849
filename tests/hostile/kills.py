"""`python -m tests.hostile.kills`: runs killed at every moment, two at once, and a full disk. Prints what went wrong."""

import argparse
import contextlib
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .materials import ROOT
from .published import publish
from .server import ENVIRONMENT

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# A small model of real weights.
FIRST_DEMO = ROOT / "tests/data/megabyte-demo"
MARLIN = (sys.executable, "-m", "marlin_cli")
# Where no small disk can be mounted.
LIMIT_BYTES = 16 << 10
# A MegaByte that reads 16 KiB at a time and takes little work: `calibrate` saves every 256 KiB, seven times a run.
LONG = {
    "patch_size": 8, "max_bytes": 16384, "global_layers": 1, "global_dim": 32, "global_heads": 2, "global_ffn_dim": 32,
    "local_layers": 1, "local_dim": 16, "local_heads": 2, "local_ffn_dim": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A command that writes one thing."""

    name: str
    argv: tuple[str, ...]
    output: str
    again: tuple[str, ...] = ()  # added when it is run once more
    unfinished: str = ""  # what a killed run may leave for that
    adds: bool = False  # to what is there, with the time, so that no two runs write the same bytes


JOBS = (
    Job("quantize", ("quantize", str(FIRST_DEMO), "-o", "out"), "out"),
    Job(
        "calibrate",
        ("calibrate", "../long", "--corpus", "../corpus.bin", "-o", "s.safetensors"),
        "s.safetensors",
        ("--resume",),
        "s.safetensors.partial",
    ),
    Job(
        "bench --save",
        ("bench", str(FIRST_DEMO), "--prompt-bytes", "64", "--decode-bytes", "16", "--repeats", "1", "--save", "r.jsonl"),
        "r.jsonl",
        adds=True,
    ),
    Job("export", ("quantize", "byt5-demo", "--wo-bits", "4", "--export", "compressed-tensors", "-o", "out"), "out"),
)


class Place:
    """A folder with what the jobs read, their results undisturbed and how long they take."""

    def __init__(self, root: Path, jobs: tuple[Job, ...] = JOBS, corpus_bytes: int = 2 << 20) -> None:
        self.root = root
        self.environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT), "TMPDIR": str(root / "tmp")}
        _prepare(root, corpus_bytes)
        self.digests: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        for job in jobs:
            with self.folder() as folder:
                for _ in range(2):  # the first also reads all files from disk
                    began = time.monotonic()
                    _expect(self.finish(job, folder), 0)
                    self.seconds[job.name] = time.monotonic() - began
                    self.digests[job.name] = digest(folder / job.output)
                    for path in folder.iterdir():
                        _remove(path)

    @contextlib.contextmanager
    def folder(self) -> Iterator[Path]:
        """An empty folder for a run."""
        with tempfile.TemporaryDirectory(dir=self.root) as name:
            yield Path(name)

    def start(self, job: Job, folder: Path, *more: str) -> subprocess.Popen[bytes]:
        """Begin a run, in a process group of its own."""
        return subprocess.Popen(
            [*MARLIN, *job.argv, *more], cwd=folder, env=self.environment, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    def finish(self, job: Job, folder: Path, *more: str) -> tuple[int, str]:
        """Run to the end: exit code and stderr."""
        process = self.start(job, folder, *more)
        _, error = process.communicate()
        return process.returncode, error.decode(errors="replace")


def kill_one(place: Place, job: Job, number: signal.Signals, part: float) -> tuple[str, bool]:
    """Kill a run after `part` of its time and run it again: what is wrong, and whether it had saved something."""
    with place.folder() as folder:
        process = place.start(job, folder)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(part * place.seconds[job.name])
        saved = (folder / job.unfinished).is_file() if job.unfinished else False
        ended_before = process.poll() is not None
        process.send_signal(number)
        _, error_bytes = process.communicate()
        problem = _after_the_kill(job, folder, process.returncode, error_bytes.decode(errors="replace"), number, ended_before)
        if not problem:
            problem = _after_another_run(place, job, folder)
        return problem, saved


def _after_the_kill(job: Job, folder: Path, code: int, error: str, number: signal.Signals, ended_before: bool) -> str:
    codes = {0, -number, 128 + number}
    if code not in codes:
        return f"ends with {code}, expected one of {sorted(codes)}: {error[-300:]!r}"
    if "Traceback" in error and "in main" in error:  # before `main` the interpreter is not ours
        return f"a traceback: {error[-300:]!r}"
    left = {path.name for path in folder.iterdir()} - {job.output, job.unfinished}
    if number != signal.SIGKILL and left:
        return f"leaves {', '.join(sorted(left))}"
    if job.output == "r.jsonl":
        return _broken_lines(folder / job.output)
    return ""


def _after_another_run(place: Place, job: Job, folder: Path) -> str:
    if not job.adds and (folder / job.output).exists() and digest(folder / job.output) != place.digests[job.name]:
        return "the result of a killed run is not whole"
    if job.again or not (folder / job.output).exists() or job.adds:
        code, error = place.finish(job, folder, *job.again)
        if code != 0:
            return f"the next run ends with {code}: {error[-300:]!r}"
    if not job.adds and digest(folder / job.output) != place.digests[job.name]:
        return "the result of the next run is not that of an undisturbed one"
    left = {path.name for path in folder.iterdir()} - {job.output}
    if left:
        return f"the next run leaves {', '.join(sorted(left))}"
    return _broken_lines(folder / job.output) if job.adds else ""


def two_at_once(place: Place, job: Job) -> str:
    """One wins and the other fails in one line, or both results are kept."""
    with place.folder() as folder:
        processes = [place.start(job, folder) for _ in range(2)]
        errors = [process.communicate()[1].decode(errors="replace") for process in processes]
        codes = sorted(process.returncode for process in processes)
        left = {path.name for path in folder.iterdir()} - {job.output}
        if left:
            return f"leaves {', '.join(sorted(left))}"
        if not job.adds and digest(folder / job.output) != place.digests[job.name]:
            return "the result is not whole"
        if job.adds:
            lines = (folder / job.output).read_text().splitlines()
            return _broken_lines(folder / job.output) or (
                "" if codes == [0, 0] and len(lines) == 2 else f"{codes}, {len(lines)} lines"
            )
        if codes != [0, 1]:
            return f"the runs end with {codes}, and one result is lost without a word"
        (error,) = (error for error, process in zip(errors, processes, strict=True) if process.returncode)
        return "" if _is_one_line(error) else f"the loser says {error[-300:]!r}"


def full_disk(place: Place, job: Job) -> str:
    """A disk, or a limit on the size of files, that has room for a part of the result."""
    with place.folder() as folder, _small_disk(folder) as mounted:
        if mounted:
            _fill(folder / "filling", room_bytes=0 if job.adds else 8192)
        elif job.adds:
            (folder / job.output).write_bytes(b'{"a": 1}\n' * ((LIMIT_BYTES - 100) // 9))
        before = digest(folder)
        limit = "" if mounted else f"ulimit -f {LIMIT_BYTES >> 10}; trap '' XFSZ;"
        words = [str(place.root / word[3:]) if word.startswith("../") else word for word in (*MARLIN, *job.argv)]
        result = subprocess.run(
            ["bash", "-c", f"{limit} exec {shlex.join(words)}"], cwd=folder, env=place.environment, capture_output=True
        )
        error = result.stderr.decode(errors="replace")
        if result.returncode != 1:
            return f"ends with {result.returncode}"
        if not _is_one_line(error):
            return f"says {error[-300:]!r}"
        return "" if digest(folder) == before else f"leaves {', '.join(sorted(os.listdir(folder)))}"


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[bool]:
    """Whether a file system of 64 KiB could be mounted on the folder; only root can."""
    mounted = sys.platform == "linux" and os.getuid() == 0
    if mounted:
        command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def _fill(path: Path, room_bytes: int) -> None:
    """Take all room on a disk but so much."""
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    os.truncate(path, path.stat().st_size - room_bytes)


def _is_one_line(error: str) -> bool:
    return error.startswith("marlin: ") and error.count("\n") == 1


def _broken_lines(path: Path) -> str:
    if not path.exists():
        return ""
    text = path.read_text()
    try:
        documents = [json.loads(line) for line in text.splitlines()]
    except ValueError:
        return "a line of the results is no JSON"
    return "" if documents and text.endswith("\n") else "the file of results is empty or ends in half a line"


def digest(path: Path) -> str:
    """SHA-256 over the names and bytes of a file or folder."""
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        found.update(f"{file.relative_to(path)}\0".encode())
        found.update(file.read_bytes())
    return found.hexdigest()


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _expect(ended: tuple[int, str], code: int) -> None:
    if ended[0] != code:
        raise RuntimeError(f"an undisturbed run ends with {ended[0]}: {ended[1]}")


def _prepare(root: Path, corpus_bytes: int) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from marlin_cli.checkpoints.writer import write_model
    from marlin_cli.config import from_mapping
    from marlin_cli.models import config_as_mapping
    from marlin_cli.models.megabyte import MegaByte
    from marlin_cli.models.megabyte_config import MegaByteConfig

    (root / "tmp").mkdir()
    mx.random.seed(0)
    config = from_mapping(MegaByteConfig, LONG, "the model of the kills")
    write_model(root / "long", config_as_mapping(config), dict(tree_flatten(MegaByte(config).parameters())), None, None)
    text = b"".join(
        path.read_bytes() for path in sorted((ROOT / "calibration" / "sample" / "code").rglob("*")) if path.is_file()
    )
    (root / "corpus.bin").write_bytes((text * 40)[:corpus_bytes])


def plan(kills: int, jobs: tuple[Job, ...] = JOBS) -> list[tuple[Job, signal.Signals, float]]:
    """Which job is killed how and when: most are of calibrate, and each job's lie evenly over its time."""
    shares = {job.name: 5 if job.again else 1 for job in jobs}
    planned = []
    for job in jobs:
        count = round(kills * shares[job.name] / sum(shares.values()))
        planned += [(job, SIGNALS[index % 3], (index + 0.5) / count) for index in range(count)]
    return planned


def main() -> int:
    """Kill, and tell; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.hostile.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--table", type=Path, help="put the table into this page too, or into a new file")
    options = parser.parse_args()
    wrong = 0
    lines = ["| job | seconds | kills | after a save | wrong | two at once | full disk |", "|---|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory(prefix="marlin-kills-") as root:
        place = Place(Path(root).resolve())
        planned = plan(options.kills)
        for job in JOBS:
            problems, after_a_save, done = 0, 0, 0
            for _, number, part in (each for each in planned if each[0] is job):
                problem, saved = kill_one(place, job, number, part)
                done, after_a_save, problems = done + 1, after_a_save + saved, problems + bool(problem)
                if problem:
                    print(
                        f"{job.name}: {number.name} after {part:.1%} of {place.seconds[job.name]:.1f} s: {problem}", flush=True
                    )
            others = [two_at_once(place, job), full_disk(place, job)]
            for name, problem in zip(("two at once", "full disk"), others, strict=True):
                if problem:
                    print(f"{job.name}: {name}: {problem}", flush=True)
            wrong += problems + sum(map(bool, others))
            cells = [f"{place.seconds[job.name]:.1f}", done, after_a_save if job.unfinished else "", problems]
            cells += ["wrong" if each else "right" for each in others]
            lines.append(f"| {job.name} | {' | '.join(map(str, cells))} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.table is not None:
        publish(options.table, "kills", text)
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main())
