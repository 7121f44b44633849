"""Damage that any file can have: of its bytes, and of the values of a document. Knows no format."""

import copy
import json
from random import Random
from typing import Any

# Stands in a document for a number of more digits than Python writes.
HUGE = "@huge@"
ESCAPES = "\x1b]0;title\x07\x1b[2J\x1b[31m\x9b5m\x7f\u202e"

TEXTS = (
    "",
    " ",
    "\x00",
    ESCAPES,
    "\ud800",
    "x" * 20_000,
    "../../etc/passwd",
    "/dev/zero",
    "NaN",
    "1",
    "é",
    "a\nb",
    "%s{}$(id)`id`",
)
NUMBERS = (
    0, 1, -1, 2, 3, 7, 255, 256, 65_537, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**30,
    HUGE,
    0.0, -0.0, 0.5, 1e-45, 1e38, 1e39, 1.8e308, -1e308, float("nan"), float("inf"), float("-inf"),
)  # fmt: skip


def damaged(rng: Random, data: bytes) -> bytes:
    """`data` with one to four faults of a medium: bits, cuts, copies, runs."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = _once(rng, data)
    return data


def _once(rng: Random, data: bytes) -> bytes:
    start = min(rng.randrange(len(data) + 1), rng.randrange(len(data) + 1))
    length = min(len(data) - start, rng.choice((1, 2, 4, 8, 16, 64, 1000)))
    before, part, after = data[:start], data[start : start + length], data[start + length :]
    kind = rng.randrange(8)
    if kind == 0:
        return before
    if kind == 1:
        return before + bytes(byte ^ (1 << rng.randrange(8)) for byte in part[:1]) + part[1:] + after
    if kind == 2:
        return before + rng.randbytes(length) + after
    if kind == 3:
        return before + after
    if kind == 4:
        return before + part * rng.choice((2, 3, 50)) + after
    if kind == 5:
        return before + bytes([rng.choice((0, 0xFF, 0x80, 0x7F))]) * length + after
    if kind == 6:
        other = rng.randrange(len(data) + 1)
        return before + data[other : other + length] + part + after
    return data + rng.choice((b"\0", b"x" * 100, data))


def value(rng: Random, depth: int = 0) -> Any:
    """A value that a reader may not expect."""
    kind = rng.randrange(10)
    if kind < 4:
        return rng.choice(NUMBERS)
    if kind < 6:
        return rng.choice(TEXTS)
    if kind < 8 or depth > 2:
        return rng.choice((None, True, False, [], {}, [[]], [None], {"": None}))
    if kind == 8:
        return [value(rng, depth + 1) for _ in range(rng.choice((1, 2, 5, 300)))]
    return {str(rng.choice(TEXTS)): value(rng, depth + 1) for _ in range(3)}


def changed(rng: Random, document: Any) -> Any:
    """A copy of a document of lists and tables with one to three of its values, keys or items changed."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(document))
        if not places:
            return value(rng)
        holder, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind < 4:
            holder[key] = value(rng)
        elif kind == 4:
            holder[key] = _near(rng, holder[key])
        elif kind == 5:
            del holder[key]
        elif isinstance(holder, dict):
            holder[rng.choice((*TEXTS[:7], str(key) + "s", str(key).upper()))] = holder[key] if kind == 6 else value(rng)
        else:
            holder[:] = holder * rng.choice((2, 40))
    return document


def _places(document: Any) -> Any:
    items = document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    for key, item in items:
        yield document, key
        yield from _places(item)


def _near(rng: Random, found: Any) -> Any:
    """A value of the same type, a little or far off."""
    if isinstance(found, bool):
        return not found
    if isinstance(found, (int, float)):
        return rng.choice(
            (found + 1, found - 1, -found, found * 2, found * 1000, found * 10**9, found / 2, str(found), [found])
        )
    if isinstance(found, str):
        return rng.choice((found.upper(), found[:-1], found + "\x1b[31m", found * 100, [found], found + "\n"))
    return rng.choice((None, [found], {"a": found}))


def json_text(rng: Random, document: Any) -> bytes:
    """A document as JSON, now and then with faults that JSON itself can have."""
    text = json.dumps(document).replace(json.dumps(HUGE), "9" * rng.choice((400, 5_000, 100_000)))
    kind = rng.randrange(24)
    if kind == 0:
        return damaged(rng, text.encode())
    if kind == 1:
        depth = rng.choice((100, 2_000, 100_000))
        return b'{"a":' * depth + text.encode() + b"}" * depth
    if kind == 2:
        return text.encode(rng.choice(("utf-16", "utf-8-sig", "utf-32")))
    if kind == 3:
        return rng.choice((b"", b"\xff\xfe{}", b"null", b"[" * 100_000, text.encode() * 2, text.encode()[:-1]))
    if kind == 4 and text.startswith("{") and len(text) > 2:
        return (text[:-1] + "," + text[1:]).encode()  # every key twice
    return text.encode()
