"""The texts of `marlin label` and `marlin encode`, and what goes beside each: from options, lines of a pipe, or JSONL."""

import codecs
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from marlin_cli.commands.pipes import blocks_of_pipe, lines_of_pipe
from marlin_cli.commands.prompts import Prompt, one_prompt, prompt_of, utf8_of
from marlin_cli.config import describe
from marlin_cli.documents import parse_json
from marlin_cli.errors import UsageError


@dataclass(frozen=True)
class Beside:
    """What a model reads beside a text; a line of JSONL may have its own under the same names."""

    second: bytes | None = None  # the other text of a pair
    question: bytes | None = None  # that the text shall answer
    choices: tuple[bytes, ...] = ()  # that may go with the text


@dataclass(frozen=True)
class Text:
    """A text, of which all offsets are, and what goes beside it."""

    prompt: Prompt
    beside: Beside = Beside()
    is_blank: bool = False  # is it a line of a pipe with nothing but white space in it?

    @property
    def data(self) -> bytes:
        """The text's bytes."""
        return self.prompt.data

    @property
    def where(self) -> str:
        """Where it comes from, as errors name it."""
        return self.prompt.where


@dataclass(frozen=True)
class Sources:
    """Where texts come from: at most one of these is named, else it is a pipe."""

    text: str | None
    file: str | None
    hexadecimal: str | None
    rows: str | None  # JSONL

    @property
    def is_pipe(self) -> bool:
        """Does nothing name a text, and is there a pipe?"""
        return not self.is_named and not (sys.stdin is None or sys.stdin.isatty())

    @property
    def is_named(self) -> bool:
        """Does an option name a text?"""
        return (self.text, self.file, self.hexadecimal, self.rows) != (None,) * 4

    @property
    def name(self) -> str:
        """What the one text is called in errors."""
        if self.text is not None or self.hexadecimal is not None:
            return "--prompt" if self.text is not None else "--hex"
        return "stdin" if self.file in (None, "-") else str(self.file)

    def check(self) -> None:
        """See that there is something to read, before a model is read for it.

        Raises:
            UsageError: there is not.
        """
        if not self.is_named and not self.is_pipe:
            raise UsageError("there is no text: give -p, --prompt-file or --prompts, or a pipe")
        for file in (self.file, self.rows):
            if file is not None and file != "-" and not os.access(file, os.R_OK):  # not opened: it may be a pipe
                raise UsageError(f"{file}: cannot read: it is not there, or not yours to read")


def texts_of(sources: Sources, beside: Beside, *, tabs: bool = False) -> Iterable[Text]:
    """The texts, as they come: one by an option, those of JSONL, or the lines of a pipe.

    A line ends with a line feed, or with a carriage return before it.

    Args:
        beside: for texts that have nothing beside them of their own.
        tabs: a line of a pipe is a pair, with a tab in between.

    Raises:
        UsageError: two texts, one that cannot be read, or a line that is none.
    """
    if sources.rows is not None:
        return _of_rows(sources.rows, _opened(sources.rows), beside)
    if not sources.is_pipe:
        return [Text(one_prompt(sources.text, sources.file, sources.hexadecimal), beside)]
    lines = lines_of_pipe(sys.stdin.fileno(), "stdin")
    if tabs:
        return (_of_columns(line, where) for where, line in lines)
    texts = ((where, line.removesuffix(b"\r")) for where, line in lines)
    return (Text(Prompt(line, where=where), beside, is_blank=not line.strip()) for where, line in texts)


def stream_of(sources: Sources) -> Iterator[bytes]:
    """One text piece by piece, of any length; an empty piece before what has to be waited for.

    Raises:
        UsageError: two texts, or one that cannot be read.
    """
    if sources.is_pipe or (sources.file is not None and sources.text is None and sources.hexadecimal is None):
        return blocks_of_pipe(_opened(sources.file or "-"), sources.name)
    return iter([one_prompt(sources.text, sources.file, sources.hexadecimal).data])


def _of_rows(file: str, descriptor: int, beside: Beside) -> Iterator[Text]:
    empty = True
    for where, line in lines_of_pipe(descriptor, "stdin" if file == "-" else file):
        if line.removeprefix(codecs.BOM_UTF8).strip():
            empty = False
            yield _of_row(parse_json(line, where, UsageError), where, beside)
    if empty:
        raise UsageError(f"{file}: no prompts; write one JSON object a line")


def _of_row(document: Any, where: str, beside: Beside) -> Text:
    """The text of a line of JSONL, and what the line has beside it."""
    prompt = prompt_of(document, where)
    own: dict[str, Any] = {}
    table = document if isinstance(document, dict) else {}
    for name in ("second", "question"):
        if table.get(name) is not None:
            own[name] = _string(table[name], f"{where}: {name}")
    if table.get("choices") is not None:
        if not isinstance(table["choices"], list) or not table["choices"]:
            raise UsageError(f"{where}: choices should be a list of texts, found {describe(table['choices'])}")
        own["choices"] = tuple(_string(each, f"{where}: choices") for each in table["choices"])
    return Text(prompt, replace(beside, **own))


def _string(value: Any, where: str) -> bytes:
    if not isinstance(value, str):
        raise UsageError(f"{where} should be a text, found {describe(value)}")
    return utf8_of(value, where)


def _of_columns(line: bytes, where: str) -> Text:
    if not line.strip():
        return Text(Prompt(line, where=where), Beside(second=b""), is_blank=True)
    columns = line.removesuffix(b"\r").split(b"\t")
    if len(columns) != 2:
        raise UsageError(f"{where}: has {len(columns) - 1} tabs, a pair has one; take --prompts for texts with tabs in them")
    return Text(Prompt(columns[0], where=where), Beside(second=columns[1]))


def _opened(file: str) -> int:
    """The descriptor of a file, a pipe, or of stdin for `-`."""
    if file == "-":
        return sys.stdin.fileno()
    try:
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: cannot read: {getattr(error, 'strerror', None) or error}") from None
