"""The fields of a request: each read once with its type and range; one that is unknown or has no effect here is refused."""

import base64
import binascii
import math
from collections.abc import Mapping
from typing import Any

from marlin_cli.config import describe, did_you_mean
from marlin_cli.serving.refusals import bad
from marlin_cli.text import quoted

# Fields that say nothing about the bytes asked for.
WITHOUT_EFFECT = frozenset(
    ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier")
)

# Fields of OpenAI and of other servers that would change the bytes: why they are refused, and the values that ask for nothing.
REFUSED: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "suffix": ("models of bytes continue a prompt and fill no gaps; put the text into the prompt", ("",)),
    "logit_bias": ("single bytes are not weighted; leave it out", ({},)),
    "presence_penalty": ("repeated bytes are not punished: text in bytes repeats them always", (0,)),
    "frequency_penalty": ("repeated bytes are not punished: text in bytes repeats them always", (0,)),
    "repetition_penalty": ("repeated bytes are not punished: text in bytes repeats them always", (1,)),
    "tools": ("models of bytes call no tools", ([],)),
    "tool_choice": ("models of bytes call no tools", ("none", "auto")),
    "functions": ("models of bytes call no functions", ([],)),
    "function_call": ("models of bytes call no functions", ("none", "auto")),
    "parallel_tool_calls": ("models of bytes call no tools", (True, False)),
    "response_format": ("the form of an answer is not enforced", ({"type": "text"},)),
    "modalities": ("answers are bytes alone", (["text"],)),
    "audio": ("answers are bytes alone", ()),
    "reasoning_effort": ("models of bytes do not reason apart", ("none",)),
    "verbosity": ("ask for it in the prompt", ()),
    "web_search_options": ("nothing is looked up on the web", ()),
}

MOST_STOPS = 16
MOST_STOP_BYTES = 1024


class Fields:
    """The fields of a JSON object. What is null is not there.

    Raises:
        Refusal: 400, from every method: something else than an object, a wrong type, or a value out of its range.
    """

    def __init__(self, document: Any) -> None:
        if not isinstance(document, dict):
            raise bad(f"a request is a JSON object, found {describe(document)}")
        self._left = {name: value for name, value in document.items() if value is not None}
        self._known: list[str] = []

    def take(self, name: str) -> Any:
        """A field as it stands, or None."""
        self._known.append(name)
        return self._left.pop(name, None)

    def whole(self, name: str, default: int, least: int, most: int) -> int:
        """A whole number from least to most."""
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise bad(f"{name}: expected a whole number, found {describe(value)}", name)
        if not least <= value <= most:
            raise bad(f"{name}: expected a number from {least} to {most}, found {quoted(value)}", name)
        return value

    def number(self, name: str, default: float) -> float:
        """A finite number."""
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise bad(f"{name}: expected a number, found {describe(value)}", name)
        try:
            found = float(value)
        except OverflowError:
            found = math.inf
        if not math.isfinite(found):
            raise bad(f"{name}: expected a finite number, found {quoted(value)}", name)
        return found

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise bad(f"{name}: expected true or false, found {describe(value)}", name)
        return default if value is None else value

    def text(self, name: str) -> str | None:
        """A string."""
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise bad(f"{name}: expected a string, found {describe(value)}", name)
        return value

    def stops(self, name: str = "stop") -> tuple[bytes, ...]:
        """Stop sequences: one or a list, each a string or {"base64": ..}."""
        value = self.take(name)
        several = value if isinstance(value, list) else [] if value is None else [value]
        if len(several) > MOST_STOPS:
            raise bad(f"{name}: {len(several):,} sequences, more than {MOST_STOPS}", name)
        return tuple(checked_stop(bytes_of(each, name), name) for each in several)

    def finish(self) -> None:
        """Refuse what is left: see the top of this file."""
        for name, value in self._left.items():
            if name in WITHOUT_EFFECT:
                continue
            if name not in REFUSED:
                raise bad(f"unknown field {quoted(name)}{did_you_mean(name, self._known)}", name[:80])
            reason, harmless = REFUSED[name]
            if not any(value == each for each in harmless):
                raise bad(f"{name}: {reason}", name)


def checked_stop(sequence: bytes, name: str) -> bytes:
    """A stop sequence of a length that can be."""
    if not 1 <= len(sequence) <= MOST_STOP_BYTES:
        raise bad(f"{name}: a sequence has {len(sequence):,} bytes; give 1 to {MOST_STOP_BYTES:,}", name)
    return sequence


def bytes_of(value: Any, name: str) -> bytes:
    """Bytes as a string (its UTF-8), a list of their values, or {"base64": ..}."""
    if isinstance(value, str):
        try:
            return value.encode("utf-8")
        except UnicodeEncodeError:
            raise bad(
                f"{name}: half of a surrogate pair stands in a string, which is no text; give a list of bytes", name
            ) from None
    if isinstance(value, list):
        # A type check of each first: True is 1 to Python.
        if all(type(each) is int and 0 <= each <= 255 for each in value):
            return bytes(value)
        wrong = next(each for each in value if not (type(each) is int and 0 <= each <= 255))
        raise bad(f"{name}: a list of ints holds bytes, 0 to 255, found {describe(wrong)}", name)
    if isinstance(value, dict) and value.keys() == {"base64"} and isinstance(value["base64"], str):
        try:
            return base64.b64decode(value["base64"], validate=True)
        except (binascii.Error, ValueError):
            raise bad(f"{name}: {quoted(value['base64'])} is not base64", name) from None
    raise bad(f'{name}: expected a string, a list of ints or {{"base64": ..}}, found {describe(value)}', name)
