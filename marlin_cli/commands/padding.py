"""Texts that are too short for their model, in a command: padded so far that it reads them, beside others that are not."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from marlin_cli.encoding_model import EncodingModel

AnyText = TypeVar("AnyText")
Found = TypeVar("Found")


def padding_of(model: Any, data: bytes | tuple[bytes, bytes], pad_to: int | None, where: str) -> int | None:
    """The positions to pad a text or pair to: those asked for, else what a model of characters needs to read it at all.

    Raises:
        InputError: the text is no UTF-8.
    """
    return pad_to if pad_to is not None or not isinstance(model, EncodingModel) else model.padding_needed(data, where=where)


def found_by_padding(
    batch: Sequence[AnyText], paddings: Sequence[int | None], find: Callable[[Sequence[AnyText], int | None], Iterable[Found]]
) -> list[Found]:
    """What `find` makes of texts, in their order; those of one padding go to it together."""
    found: dict[int, Found] = {}
    for padding in dict.fromkeys(paddings):
        members = [index for index, each in enumerate(paddings) if each == padding]
        found.update(zip(members, find([batch[index] for index in members], padding), strict=True))
    return [found[index] for index in range(len(batch))]


def said_of(padding: int | None, pad_to: int | None) -> dict[str, int]:
    """What an object says of a padding that nobody asked for."""
    return {} if padding is None or pad_to is not None else {"padded_to": padding}
