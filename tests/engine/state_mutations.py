"""Ways in which a state's file may not be what was written: seeded, each as (name, bytes)."""

import json
import random
from collections.abc import Iterator

from marlin_cli.tensor_files import DTYPE_BYTES


def mutated(whole: bytes, foreign: list[bytes], count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """So many files that are none of this state.

    Args:
        foreign: whole files of other models, bits and formats.
    """
    draws = random.Random(seed)
    kinds = [_flip, _flip_in_header, _cut, _grown, _swapped_tensors, _other_fact, _other_header, _zeroed, _foreign, _noise]
    for number in range(count):
        kind = kinds[number % len(kinds)]
        data = kind(whole, foreign, draws)
        if data != whole:
            yield f"{number} {kind.__name__.lstrip('_')}", data


def header_of(data: bytes) -> tuple[dict, bytes]:
    """The header of a file, and what follows it."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(header: dict, body: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def _flip(whole, foreign, draws):
    at = draws.randrange(len(whole))
    return whole[:at] + bytes([whole[at] ^ 1 << draws.randrange(8)]) + whole[at + 1 :]


def _flip_in_header(whole, foreign, draws):
    size = 8 + int.from_bytes(whole[:8], "little")
    return _flip(whole[:size], foreign, draws) + whole[size:]


def _cut(whole, foreign, draws):
    return whole[: draws.randrange(len(whole))]


def _grown(whole, foreign, draws):
    return whole + draws.randbytes(draws.randrange(1, 100))


def _swapped_tensors(whole, foreign, draws):
    """Two tensors of one shape under each other's names."""
    header, body = header_of(whole)
    pairs = [(one, other) for one in header for other in header if one < other and "." in one
             and header[one].get("shape") == header[other].get("shape")]  # fmt: skip
    one, other = draws.choice(pairs)
    header[one], header[other] = header[other], header[one]
    return with_header(header, body)


def _other_fact(whole, foreign, draws):
    header, body = header_of(whole)
    name = draws.choice(sorted(header["__metadata__"]))
    header["__metadata__"][name] = draws.choice(["", "2", "0", "x" * 64, "-1", "9" * 11])
    return with_header(header, body)


def _other_header(whole, foreign, draws):
    """The header of one file before the tensors of another."""
    header, _ = header_of(draws.choice(foreign))
    return with_header(header, header_of(whole)[1])


def _zeroed(whole, foreign, draws):
    """A hole, as a file system leaves one after a crash."""
    header, _ = header_of(whole)
    start = draws.randrange(len(whole))
    return whole[:start] + bytes(min(4096, len(whole) - start)) + whole[start + 4096 :]


def _foreign(whole, foreign, draws):
    return draws.choice(foreign)


def _noise(whole, foreign, draws):
    """A header that describes nothing but noise, of the right format."""
    header, body = header_of(whole)
    for name, entry in header.items():
        if name != "__metadata__" and draws.random() < 0.5:
            entry["shape"] = [entry["data_offsets"][1] // DTYPE_BYTES[entry["dtype"]] + draws.randrange(3)]
    return with_header(header, draws.randbytes(len(body)))
