"""Prompts from options, files, pipes and JSONL, as bytes."""

import base64
import binascii
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlin_cli.commands.options import bytes_of_argument, bytes_of_hex
from marlin_cli.config import describe
from marlin_cli.documents import parse_json
from marlin_cli.errors import UsageError


@dataclass(frozen=True)
class Prompt:
    """The bytes to continue, and the caller's name for them."""

    data: bytes
    name: Any = None


def one_prompt(text: str | None, file: str | None, hexadecimal: str | None) -> Prompt:
    """The prompt of a single run; stdin when it is a pipe and no option names another, else no bytes.

    Raises:
        UsageError: two prompts, a file that cannot be read, or text that is not hexadecimal.
    """
    given = [name for name, value in (("-p", text), ("--prompt-file", file), ("--hex", hexadecimal)) if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} both give a prompt; choose one")
    if text is not None:
        return Prompt(bytes_of_argument(text))
    if hexadecimal is not None:
        return Prompt(bytes_of_hex(hexadecimal, "--hex"))
    if file is not None and file != "-":
        return Prompt(_read(Path(file)))
    if file == "-" or not (sys.stdin is None or sys.stdin.isatty()):
        return Prompt(sys.stdin.buffer.read())
    return Prompt(b"")


def read_prompts(file: str) -> list[Prompt]:
    """Prompts of a JSONL file (or `-`): a string, or an object with prompt, prompt_base64 or prompt_hex, and id.

    Raises:
        UsageError: the file cannot be read, holds no prompt, or a line is none of these.
    """
    data = sys.stdin.buffer.read() if file == "-" else _read(Path(file))
    lines = [(number, line) for number, line in enumerate(data.splitlines(), start=1) if line.strip()]
    if not lines:
        raise UsageError(f"{file}: no prompts; write one JSON object a line")
    return [_from_line(line, f"{file}: line {number}") for number, line in lines]


def _from_line(line: bytes, where: str) -> Prompt:
    document = parse_json(line, where, UsageError)
    if isinstance(document, str):
        return Prompt(_utf8(document, where))
    if not isinstance(document, dict):
        raise UsageError(f"{where}: expected a string or an object, found {describe(document)}")
    keys = [key for key in ("prompt", "prompt_base64", "prompt_hex") if key in document]
    if len(keys) != 1 or not isinstance(document[keys[0]], str):
        raise UsageError(f"{where}: needs one of prompt, prompt_base64 and prompt_hex, as a string")
    value = document[keys[0]]
    if keys[0] == "prompt":
        data = _utf8(value, where)
    elif keys[0] == "prompt_hex":
        data = bytes_of_hex(value, where)
    else:
        try:
            data = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise UsageError(f"{where}: prompt_base64 is not base64") from None
    return Prompt(data, document.get("id"))


def _utf8(text: str, where: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise UsageError(f"{where}: the prompt holds half of a surrogate pair; use prompt_base64 for raw bytes") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot read the prompt: {error.strerror}") from None
