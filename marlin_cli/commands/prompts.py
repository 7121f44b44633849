"""Prompts from options, files, pipes and JSONL, as bytes."""

import base64
import binascii
import contextlib
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import IO, TYPE_CHECKING, Any

from marlin_cli.commands.options import bytes_of_argument, bytes_of_hex
from marlin_cli.config import describe
from marlin_cli.corpus.lines import lines_of
from marlin_cli.documents import parse_json
from marlin_cli.errors import UsageError

if TYPE_CHECKING:
    from marlin_cli.models import Network

# What is read of a prompt, and of a file of prompts, before it is refused: a device or a pipe may have no end.
MOST_PROMPT_BYTES = 16 << 20
MOST_PROMPTS_BYTES = 64 << 20
MOST_PROMPTS = 1_000_000

PLAIN = ".txt"  # the name of a file of prompts that are lines, not JSON


@dataclass(frozen=True)
class Prompt:
    """The bytes to continue, the caller's name for them, and where they come from, as errors name it."""

    data: bytes
    name: Any = None
    where: str = field(default="the prompt", compare=False)

    def in_chat(self, network: "Network") -> "Prompt":
        """The same as what a user says in a chat, whose marks stand in it as names.

        Raises:
            UsageError: the model was tuned for no form of chats.
        """
        from marlin_cli.models import architecture_of, continuing_of

        form = continuing_of(network).chat
        if form is None:
            raise UsageError(f"--chat: a {architecture_of(network).title} has no form of chats; leave it out")
        return replace(self, data=form(self.data))

    def check_fits(self, most_bytes: int) -> None:
        """Raise `UsageError` for more bytes than the model reads."""
        if len(self.data) > most_bytes:
            raise UsageError(f"{self.where}: {len(self.data):,} bytes, but the model reads {most_bytes:,}; give the last ones")


def one_prompt(text: str | None, file: str | None, hexadecimal: str | None) -> Prompt:
    """The prompt of a single run; stdin when it is a pipe and no option names another, else no bytes.

    Raises:
        UsageError: two prompts, a file that cannot be read or has no end, or text that is not hexadecimal.
    """
    given = [name for name, value in (("-p", text), ("--prompt-file", file), ("--hex", hexadecimal)) if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} both give a prompt; choose one")
    if text is not None:
        return Prompt(bytes_of_argument(text), where="--prompt")
    if hexadecimal is not None:
        return Prompt(bytes_of_hex(hexadecimal, "--hex"), where="--hex")
    if file is not None and file != "-":
        with _opened(file) as opened:
            return Prompt(_whole(opened, file), where=file)
    if file == "-" or not (sys.stdin is None or sys.stdin.isatty()):
        return Prompt(_whole(sys.stdin.buffer, "stdin"), where="stdin")
    return Prompt(b"")


def bytes_of_file(file: str) -> bytes:
    """The bytes of a file, as many as a prompt may have.

    Raises:
        UsageError: it cannot be read, or has more.
    """
    with _opened(file) as opened:
        return _whole(opened, file)


def read_prompts(file: str) -> list[Prompt]:
    """Prompts of a JSONL file (or `-`): a string, or an object with prompt, prompt_base64 or prompt_hex, and id;
    of a file that is named .txt each line that is not blank, as it stands.

    Raises:
        UsageError: the file cannot be read, is too large, holds no prompt, or a line is none of these.
    """
    with _opened(file) as opened:
        lines = lines_of(opened, "stdin" if file == "-" else file, UsageError, most_bytes=MOST_PROMPTS_BYTES)
        rows = itertools.islice(lines, MOST_PROMPTS + 1)
        if file.endswith(PLAIN):
            prompts = [Prompt(line.removesuffix(b"\r"), where=where) for where, line in rows]
        else:
            prompts = [prompt_of(parse_json(line, where, UsageError), where) for where, line in rows]
    if len(prompts) > MOST_PROMPTS:
        raise UsageError(f"{file}: holds more than {MOST_PROMPTS:,} prompts; cut it into several files")
    if not prompts:
        raise UsageError(f"{file}: no prompts; write {'a text' if file.endswith(PLAIN) else 'one JSON object'} a line")
    return prompts


def prompt_of(document: Any, where: str) -> Prompt:
    """The prompt of a line of JSONL: a string, or an object with prompt, prompt_base64 or prompt_hex, and id.

    Raises:
        UsageError: it is none of these.
    """
    if isinstance(document, str):
        return Prompt(utf8_of(document, where), where=where)
    if not isinstance(document, dict):
        raise UsageError(f"{where}: expected a string or an object, found {describe(document)}")
    keys = [key for key in ("prompt", "prompt_base64", "prompt_hex") if key in document]
    if len(keys) != 1 or not isinstance(document[keys[0]], str):
        raise UsageError(f"{where}: needs one of prompt, prompt_base64 and prompt_hex, as a string")
    value = document[keys[0]]
    if keys[0] == "prompt":
        data = utf8_of(value, where)
    elif keys[0] == "prompt_hex":
        data = bytes_of_hex(value, where)
    else:
        try:
            data = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise UsageError(f"{where}: prompt_base64 is not base64") from None
    return Prompt(data, _written_back(document.get("id"), where), where)


def _written_back(name: Any, where: str) -> Any:
    """The name of a prompt, which stands beside its answer; Python reads as JSON what JSON cannot say."""
    try:
        json.dumps(name, allow_nan=False)
    except ValueError:
        raise UsageError(f"{where}: id holds a number that is not finite, as JSON has none; name it otherwise") from None
    return name


def utf8_of(text: str, where: str) -> bytes:
    """Text of JSON as bytes.

    Raises:
        UsageError: half of a surrogate pair, which has none.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{where}: the prompt holds half of a surrogate pair; use prompt_base64 for raw bytes") from None


def _whole(file: IO[bytes], name: str) -> bytes:
    data = file.read(MOST_PROMPT_BYTES + 1)
    if len(data) > MOST_PROMPT_BYTES:
        raise UsageError(f"{name}: a prompt of more than {MOST_PROMPT_BYTES:,} bytes, which no model reads")
    return data


@contextlib.contextmanager
def _opened(name: str) -> Iterator[IO[bytes]]:
    """A file, a pipe, or stdin for `-`; errors of opening and reading it are ours."""
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if name == "-" else open(name, "rb") as file:
            yield file
    except OSError as error:
        raise UsageError(f"{name}: cannot read: {error.strerror}") from None
