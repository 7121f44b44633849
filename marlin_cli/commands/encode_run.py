"""What `marlin encode` does: states or vectors of texts in batches, as JSON lines or into a file of arrays."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import mlx.core as mx
import numpy as np

from marlin_cli import console
from marlin_cli.answering_model import AnsweringModel
from marlin_cli.commands.json_lines import characters_in, head_of, name_of, write_line
from marlin_cli.commands.padding import found_by_padding, padding_of, said_of
from marlin_cli.commands.pipes import as_they_come
from marlin_cli.commands.texts import Text
from marlin_cli.commands.vector_files import Floats, writing_vectors
from marlin_cli.encoding_model import EncodingModel
from marlin_cli.engine.finite import not_finite
from marlin_cli.engine.spans import Place
from marlin_cli.errors import UsageError

Pool = Literal["none", "mean", "pooler"]
AnyEncoder: TypeAlias = AnsweringModel | EncodingModel


@dataclass(frozen=True)
class Request:
    """How texts are encoded, and where to."""

    pool: Pool
    pad_to: int | None
    batch_size: int
    output: Path | None


def run(model: AnyEncoder, texts: Iterable[Text], request: Request) -> None:
    """Encode texts in their order; lines of a batch are written before the next, so that a slow pipe has its answers.

    Raises:
        MarlinError: a text that the model does not read, after what came before it; or an output that cannot be written.
    """
    if request.output is None:
        _write_lines(model, texts, request)
        return
    with writing_vectors(request.output, stacked=request.pool != "none") as file:
        count = 0
        for batch in as_they_come(_checked(model, texts, request.pad_to), request.batch_size):
            for array in _encoded(model, batch, request):
                file.add(array)
            count += len(batch)
        file.finish({"pool": request.pool})
    console.note_to_terminal(f"{request.output}: {count:,} text(s), on {model.device.name}")


def _checked(model: AnyEncoder, texts: Iterable[Text], pad_to: int | None) -> Iterator[Text]:
    """Texts that the model reads.

    Raises:
        MarlinError: for one that it does not, with the place that it comes from.
    """
    for text in texts:
        if isinstance(model, AnsweringModel):
            text.prompt.check_fits(model.config.max_bytes)
        else:
            model.check(text.data, pad_to=padding_of(model, text.data, pad_to, text.where), where=text.where)
        yield text


def _write_lines(model: AnyEncoder, texts: Iterable[Text], request: Request) -> None:
    index = 0
    for batch in as_they_come(_checked(model, texts, request.pad_to), request.batch_size):
        paddings = _paddings(model, batch, request)
        for text, padding, array in zip(batch, paddings, _encoded(model, batch, request), strict=True):
            said = said_of(padding, request.pad_to)
            if request.pool != "none":
                write_line({**head_of(index, text), **said}, vector=array)
            else:
                head, counted = {**name_of(index, text), **said}, characters_in(text.data) is not None
                for position, (place, row) in enumerate(zip(model.places(text.data), array, strict=True)):
                    write_line({**head, "position": position, **_shown(place, counted)}, state=row)
            index += 1
        sys.stdout.buffer.flush()


def _shown(place: Place, counted: bool) -> dict[str, object]:
    if place.mark is not None:
        return {"mark": place.mark}
    known = place._asdict()
    del known["mark"]
    return known if counted else {**known, "first_character": None, "end_character": None}


def _paddings(model: AnyEncoder, batch: Sequence[Text], request: Request) -> list[int | None]:
    return [padding_of(model, text.data, request.pad_to, text.where) for text in batch]


def _encoded(model: AnyEncoder, batch: Sequence[Text], request: Request) -> Iterator[Floats]:
    """The states [positions, d_model] of each text, or its vector [d_model].

    Raises:
        CheckpointError: numbers that are not finite.
        UsageError: a pooler that the model has not.
    """
    data = [text.data for text in batch]
    found: Iterable[mx.array]
    if isinstance(model, EncodingModel):
        many = model.pooled_many if request.pool == "pooler" else model.encode_many
        found = found_by_padding(data, _paddings(model, batch, request), lambda some, padding: iter(many(some, pad_to=padding)))
    elif request.pool == "pooler":
        raise UsageError("--pool pooler: the model has none; its vectors are means of its states: --pool mean")
    else:
        found = model.encode_many(data, marks=True)
    for text, array in zip(batch, found, strict=True):
        # An empty text of a model without marks has no state, and a vector all the same: a row for every text.
        numbers = np.array(array.sum(axis=0) / max(1, len(array)) if request.pool == "mean" else array)
        if not np.isfinite(numbers).all():
            raise not_finite(text.where, "the states that the model gives")
        yield numbers
