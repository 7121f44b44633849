"""Outputs of the commands in README and docs: runs them, and writes what they say below them.

    python -m tools.outputs [--check] [PAGE ..]

A block to run is a fenced one of the language `console` after a line `<!-- run -->`. In it `$ ` begins a command (a line that
ends with a backslash, or within quotes, goes on in the next); all else is output. Blocks of a page run one after the other in a
folder of their own; a line of `...` in an output stands for lines that are left out there, and as many as stood before and
after it are kept. Commands have no terminal; what goes on in the background ends with the page.

Numbers differ between machines, so --check compares all but digits, and how many of them and of spaces stand in a row.
"""

import contextlib
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tools.marked import pages

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(?P<head><!-- run -->\n```console\n)(?P<body>.*?)(?P<end>^```$)", re.DOTALL | re.MULTILINE)
CUT = "..."
PROGRESS = re.compile(r"[a-z]+: [\d,]+ bytes(, \d+%)?")  # of long work, every ten seconds


@dataclass(frozen=True)
class Step:
    """A command of a block, and what stands below it."""

    command: str  # as written, lines joined by their backslashes
    output: str


def steps_of(body: str) -> list[Step]:
    """The commands of a block.

    Raises:
        ValueError: the block begins with something else.
    """
    steps: list[tuple[list[str], list[str]]] = []
    for line in body.splitlines():
        if line.startswith("$ "):
            steps.append(([line[2:]], []))
        elif not steps:
            raise ValueError(f"a block to run begins with a command, found {line!r}")
        elif not steps[-1][1] and _goes_on("\n".join(steps[-1][0])):
            steps[-1][0].append(line)
        else:
            steps[-1][1].append(line)
    return [Step("\n".join(command), "\n".join(output)) for command, output in steps]


def _goes_on(command: str) -> bool:
    """Does a shell wait for another line: after a backslash, or inside quotes?"""
    try:
        shlex.split(command)
    except ValueError:
        return True
    return command.endswith("\\")


def run_page(text: str, folder: Path) -> str:
    """The text with the outputs of its blocks, run in a folder.

    Raises:
        RuntimeError: a command fails.
    """

    sessions: list[int] = []

    def replaced(found: "re.Match[str]") -> str:
        lines = []
        for step in steps_of(found["body"]):
            lines.append(f"$ {step.command}")
            said = _run(step.command, folder, sessions)
            lines += _cut(said, step.output)
        return found["head"] + "\n".join(lines) + "\n" + found["end"]

    try:
        return BLOCK.sub(replaced, text)
    finally:
        for each in sessions:  # what was sent to the background, such as a server
            with contextlib.suppress(ProcessLookupError):
                os.killpg(each, signal.SIGTERM)


def same_but_numbers(one: str, other: str) -> bool:
    """Do two texts differ in digits and fingerprints alone, and in how many of them and of spaces stand in a row?"""
    return _masked(one) == _masked(other)


def _masked(text: str) -> str:
    text = re.sub(r"\b(?=[a-f]*\d)[0-9a-f]{12}\b", "0", text)  # of weights, which processors draw differently
    return re.sub(r"[ ─━]+", " ", re.sub(r"[+-]?\d[\d,.]*(e[+-]\d+)?", "0", text))


# A command in the background or in a pipe is marlin itself, so that a signal reaches it.
MARLIN = 'marlin() { if ((BASHPID != $$)); then exec python -m marlin_cli "$@"; else python -m marlin_cli "$@"; fi; }; '


def _run(command: str, folder: Path, sessions: list[int]) -> list[str]:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "LC_ALL": "C.UTF-8",
        "COLUMNS": "120",
    }
    shell = ["bash", "-euo", "pipefail", "-c", MARLIN + command]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(shell, cwd=folder, env=environment, start_new_session=True, **streams) as process:
        sessions.append(process.pid)
        output, _ = process.communicate()
    said = output.decode("utf-8", errors="replace")
    for here, anywhere in ((folder, "/tmp/work"), (ROOT, "marlin"), (Path.home(), "~")):
        said = said.replace(str(here), anywhere)
    said = _without_release(said, platform.release())
    if process.returncode not in (0, 141):  # 141: `head` had what it wanted
        raise RuntimeError(f"{command}\n{said}\nexit code {process.returncode}")
    return [line.rstrip() for line in said.splitlines() if not PROGRESS.fullmatch(line)]


def _without_release(said: str, release: str) -> str:
    """Without the kernel's name; a cell of a table that had it is as far to the right as before."""
    cell = rf"(?<=  )(\S(?:(?!  )[^\n])*?) {re.escape(release)}"
    moved = re.sub(cell, lambda found: " " * (len(release) + 1) + found[1], said)
    return moved.replace(f" {release}", "")


def _cut(said: list[str], before: str) -> list[str]:
    """The output, without the lines that were left out of the one before."""
    shown = before.splitlines()
    if CUT not in shown:
        return said
    first = shown.index(CUT)
    last = len(shown) - first - 1
    return [*said[:first], CUT, *said[len(said) - last :]] if len(said) > first + last else said


def main() -> int:
    """Run the pages; 1 where one with --check says something else than it did."""
    given = [each for each in sys.argv[1:] if each != "--check"]
    check, differ = "--check" in sys.argv[1:], 0
    for page in [Path(each).resolve() for each in given] or pages(ROOT):
        before = page.read_text(encoding="utf-8")
        if not BLOCK.search(before):
            continue
        with tempfile.TemporaryDirectory() as folder:
            after = run_page(before, Path(folder))
        if check:
            if not same_but_numbers(before, after):
                differ = 1
                print(f"{page.relative_to(ROOT)}: says something else now; run make docs-output and read what changed")
        elif after != before:
            page.write_text(after, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: written")
    return differ


if __name__ == "__main__":
    sys.exit(main())
