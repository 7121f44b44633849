"""Small readers of option values that more than one command takes."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, get_type_hints

from marlin_cli.errors import ConfigError, MarlinError, UsageError
from marlin_cli.text import quoted

if TYPE_CHECKING:
    import mlx.core as mx

    from marlin_cli.checkpoints import ImportOptions
    from marlin_cli.engine.endless import Window

WINDOW_HELP = (
    "Go on beyond the model's context: this many of the last bytes stay in view. restart: the last half of the context is read"
    " again whenever it is full."
)
SINKS_HELP = (
    "With --window BYTES: rows from the beginning that stay in view too, the leading one and the first patches. Default 1."
)
SPARSE_HELP = (
    "Leave out pages of the cache that cannot hold more than this share of a softmax, by bounds on their keys; 0 reads all."
    " MegaByte on a CPU."
)

# The shipped model that commands use when none is named.
DEFAULT_MODEL = "megabyte-demo"

IMPORT_HELP = (
    "What a foreign checkpoint does not reveal: heads (a number, or auto: a trial on sample bytes), head_dim, max_bytes,"
    " activation, norm, rope, attention_scale, attention_window, bos_byte, block_bytes (block_recurrent), patch_rule"
    " (spacebyte), or weights (ema or"
    " model); of an LA-CANINE the language. Repeatable."
)


class Precision(str, Enum):
    """Types that weights and activations may have; auto is what suits the device."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_LARGEST_SIZE = (1 << 63) - 1
_MOST_DIGITS = 20


@contextlib.contextmanager
def about(option: str) -> Iterator[None]:
    """What is wrong inside begins with the option that was typed."""
    try:
        yield
    except MarlinError as error:
        raise type(error)(f"{option} {error}") from None


def parse_size(text: str, option: str) -> int:
    """A number of bytes: 4096, 64k, 2M, 1.5G; k, M, G and T are binary.

    Raises:
        UsageError: the text is none of these, or more than 64 bits count.
    """
    match = re.fullmatch(r"0*(\d+)(?:\.(\d+))?\s*([kmgt]?)(?:i?b)?", text.strip(), re.IGNORECASE | re.ASCII)
    if match is None:
        raise UsageError(f"{option}: {quoted(text)} is not a size; write for example 4096, 64k, 2M or 1G")
    whole, part, unit = match[1], (match[2] or "0")[:_MOST_DIGITS], _UNITS[match[3].lower()]
    size = None if len(whole) > _MOST_DIGITS else int(whole) * unit + int(part) * unit // 10 ** len(part)
    if size is None or size > _LARGEST_SIZE:
        raise UsageError(f"{option}: {quoted(text)} is more than {_LARGEST_SIZE:,} bytes")
    return size


def parse_sizes(text: str | None, option: str) -> tuple[int, ...]:
    """Sizes with commas between them, see `parse_size`; none of None."""
    return () if text is None else tuple(parse_size(part, option) for part in text.split(","))


def parse_window(text: str | None, sinks: int | None) -> "Window | None":
    """--window BYTES or restart, and --sinks; None of None.

    Raises:
        UsageError: neither a size nor restart, or what `Window` does not take.
    """
    from marlin_cli.engine.endless import Window

    if text is None:
        return None
    return Window(None if text.strip().lower() == "restart" else parse_size(text, "--window"), sinks)


def parse_cache_bits(kv_bits: int | None, k_bits: int | None, v_bits: int | None) -> int | tuple[int, int] | None:
    """Bits of keys and values from --kv-bits, or --k-bits and --v-bits over it; None leaves it to the checkpoint.

    Raises:
        UsageError: all three are given.
    """
    if k_bits is None and v_bits is None:
        return kv_bits
    if kv_bits is not None and k_bits is not None and v_bits is not None:
        raise UsageError("--kv-bits has no meaning beside --k-bits and --v-bits; leave it out")
    both = 16 if kv_bits is None else kv_bits
    return (both if k_bits is None else k_bits, both if v_bits is None else v_bits)


# GB/s between a slow disk and what no memory reaches: beyond them a plan's numbers are none.
BANDWIDTHS = (0.001, 1e6)

CACHE_BITS = (4, 8, 16)


def check_bandwidth(gigabytes_per_second: float | None) -> None:
    """Raise `UsageError` for what no memory has."""
    least, most = BANDWIDTHS
    if gigabytes_per_second is not None and not least <= gigabytes_per_second <= most:
        raise UsageError(f"--bandwidth must be {least:g} to {most:,.0f} GB/s, found {gigabytes_per_second:g}")


def check_width(option: str, bits: int | None, known: Sequence[int]) -> None:
    """Raise `UsageError` for a number of bits that is none of those known."""
    if bits is not None and bits not in known:
        raise UsageError(f"{option} must be {', '.join(map(str, known[:-1]))} or {known[-1]}, found {bits}")


def dtype_of(precision: Precision) -> "mx.Dtype | None":
    """MLX's type of this name; None for the one that suits the device."""
    import mlx.core as mx

    types = {Precision.float32: mx.float32, Precision.bfloat16: mx.bfloat16, Precision.float16: mx.float16}
    return types.get(precision)


def bytes_of_argument(text: str) -> bytes:
    """The bytes that a shell passed as an argument, also where they are not UTF-8."""
    return os.fsencode(text)


def bytes_of_hex(text: str, option: str) -> bytes:
    """Bytes written in hexadecimal, spaces allowed.

    Raises:
        UsageError: not hexadecimal.
    """
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise UsageError(f"{option}: {quoted(text)} is not hexadecimal; write for example 48 65 6c") from None


def parse_shard(text: str) -> tuple[int, int]:
    """INDEX/COUNT as two numbers.

    Raises:
        UsageError: not that, or an index outside the count.
    """
    match = re.fullmatch(r"(\d{1,18})/(\d{1,18})", text, re.ASCII)
    if match is None or int(match[1]) >= int(match[2]):
        raise UsageError(f"--shard {quoted(text)} is not INDEX/COUNT with INDEX from 0 to COUNT - 1")
    return int(match[1]), int(match[2])


def parse_import_options(texts: Sequence[str] | None) -> "ImportOptions":
    """`--import NAME=VALUE` options.

    Raises:
        UsageError: an unknown name, or a value of the wrong kind.
    """
    from marlin_cli.checkpoints import ImportOptions
    from marlin_cli.config import from_mapping
    from marlin_cli.documents import parse_yaml

    texts_alone = [name for name, hint in get_type_hints(ImportOptions).items() if hint == str | None]
    values: dict[str, Any] = {}
    for text in texts or []:
        name, separator, value = text.partition("=")
        if not separator:
            raise UsageError(f"--import {quoted(text)} is not NAME=VALUE, for example heads=8")
        if name in values:
            raise UsageError(f"--import {quoted(text)}: {name} has two values; give one")
        # YAML takes the code of Norwegian, no, for false.
        values[name] = value if name in texts_alone else parse_yaml(value, f"--import {quoted(text)}", UsageError)
    try:
        return from_mapping(ImportOptions, values, "--import")
    except ConfigError as error:
        raise UsageError(str(error)) from None
