"""What became of an input: one class, the worst that applies. Runs nothing."""

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from .case import Case

GOOD = ("ok", "refused")
# From the worst on.
BAD = {
    "CRASH": "ended by a signal, or with a code that is none of ours",
    "HANG": "more than 5 seconds",
    "MEMORY": "more than 1 GiB, or memory asked for that is not there",
    "TRACEBACK": "an error that is not of the family",
    "RAW": "control characters in what a terminal shows",
    "SILENT": "ended well on an input that must be refused",
    "NAN": "a result with NaN or infinity in it",
    "LEFT": "files or processes left behind",
    "LINES": "refused in more or less than one line",
    "VAGUE": "refused without naming the file or option",
}
# How lines begin that may stand before that of an error: warnings, and notes of what a command does.
NOTES = (
    "marlin: ", "building the CPU kernels", "CPU kernels are not there", "--", "Hessians of", "wrote ", "added to ",
    "KL divergence",
    "the results are of", "interrupted; ", *map(str, range(10)),
)  # fmt: skip
NOT_A_NUMBER = re.compile(r"(?<![\w.-])-?(nan|inf|NaN|Infinity)(?![\w.-])")


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    answer: dict[str, Any]  # of the server
    stdout: bytes
    stderr: bytes
    left: tuple[str, ...]  # new files, in the folder of the input and in those of the system

    @property
    def last_line(self) -> str:
        lines = self.stderr.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""


def verdict(case: Case, outcome: Outcome) -> tuple[str, str]:
    """The class, and a reason that begins alike for alike faults."""
    answer, code, error = outcome.answer, outcome.answer["code"], outcome.stderr.decode(errors="replace")
    last = outcome.last_line
    if answer["killed_for"] == "time":
        return "HANG", f"{answer['seconds']:.1f} s of processor time in {answer['wall_seconds']:.1f} s"
    if answer["killed_for"] == "memory" or answer["peak_bytes"] > 1 << 30 or "marlin: out of memory" in error:
        return "MEMORY", last or f"{answer['peak_bytes'] >> 20} MiB"
    if "Traceback (most recent call last)" in error or "Exception ignored" in error:
        return "TRACEBACK", f"{_place(error)}: {last[:160]!r}"
    if code not in (0, 1, 2):
        return "CRASH", f"code {code}: {last[:160]!r}"
    raw = _control_characters(outcome.stderr) or ("" if case.raw else _control_characters(outcome.stdout))
    if raw:
        return "RAW", raw
    if code == 0 and case.refuse:
        return "SILENT", "ends well"
    if code == 0 and not case.raw and NOT_A_NUMBER.search(outcome.stdout.decode(errors="replace")):
        return "NAN", NOT_A_NUMBER.search(outcome.stdout.decode(errors="replace"))[0]  # type: ignore[index]
    wanted = case.outputs if code == 0 else ()
    left = [name for name in outcome.left if name not in wanted]
    if left or answer["children_left"]:
        return "LEFT", ", ".join(left) or "a process"
    if code == 0:
        return "ok", ""
    lines = error.splitlines()
    if not last.startswith("marlin: ") or not all(line.startswith(NOTES) for line in lines) or not error.endswith("\n"):
        strange = next((line for line in lines if not line.startswith(NOTES)), "nothing on stderr")
        return "LINES", f"{len(lines)} lines: {strange[:160]!r}"
    if not _names(case, last):
        return "VAGUE", last[:160]
    return "refused", last[:160]


def _place(error: str) -> str:
    """The last place in marlin that a traceback names."""
    places = re.findall(r'marlin_cli/([\w/]+\.py)", line (\d+)', error)
    return f"{places[-1][0]}:{places[-1][1]}" if places else "elsewhere"


def _control_characters(data: bytes) -> str:
    for character in data.decode(errors="surrogateescape"):
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t\r" or character in "\u202e\u2066\u2028":
            return f"{character!r}"
    return ""


def _names(case: Case, line: str) -> bool:
    """Does an error name an option, a variable, or a file of the command line (or a part of its path)?"""
    if re.search(r"--[a-z]|MARLIN_|CXX", line) or any(line.startswith(f"marlin: {word}: ") for word in case.argv):
        return True
    words = {part for word in case.argv[1:] for part in (word, *re.split(r"[/=:,]", word)) if len(part) > 1}
    return any(word[:40] in line or repr(word)[1:41].rstrip("'") in line for word in words)
