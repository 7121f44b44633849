"""What `marlin label` does: labels, spans, answers or choices of texts, an object each; or the sentences of a stream."""

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from marlin_cli.answering_model import AnsweringModel
from marlin_cli.api import decode
from marlin_cli.commands.json_lines import characters_in, head_of, name_of, span_as_mapping, write_line
from marlin_cli.commands.padding import found_by_padding, padding_of, said_of
from marlin_cli.commands.pipes import as_they_come
from marlin_cli.commands.texts import Text
from marlin_cli.commands.uses import HEADS
from marlin_cli.commands.writers import TerminalView, is_viewed
from marlin_cli.encoding_model import EncodingModel
from marlin_cli.engine.characters import AnswerSettings
from marlin_cli.engine.sentences import SplitSettings
from marlin_cli.engine.spans import Span
from marlin_cli.errors import AssumptionWarning, InputError, UsageError
from marlin_cli.models.canine_ids import characters_of

AnyLabelling: TypeAlias = AnsweringModel | EncodingModel


@dataclass(frozen=True)
class Request:
    """How texts are labelled, and what of it is written."""

    best: int | None  # labels or choices of a text; all of them if None
    threshold: float | None  # what has a lower score is left out; nothing if None
    outside: tuple[str, ...]  # labels that say nothing
    merge: bool  # are neighbours of one label one span?
    pad_to: int | None
    answers: AnswerSettings
    batch_size: int

    def keeps(self, score: float) -> bool:
        """Is something of this score shown?"""
        return self.threshold is None or score >= self.threshold


def run(model: AnyLabelling, texts: Iterable[Text], request: Request) -> None:
    """Write an object for each text, in their order; a batch is what has come, so that a slow pipe has its answers.

    Raises:
        MarlinError: a text that the model does not read, after what came before it; or a model that labels nothing.
    """
    head = head_of_model(model)
    index = 0
    for batch in as_they_come(_checked(model, head, texts, request), request.batch_size):
        for text, found in zip(batch, _found(model, head, batch, request), strict=True):
            write_line({**head_of(index, text), **found})
            index += 1
        sys.stdout.buffer.flush()


def run_sentences(model: EncodingModel, texts: Iterable[Text], settings: SplitSettings) -> None:
    """Write an object for each sentence of each text.

    Raises:
        MarlinError: see `run`.
    """
    for index, text in enumerate(texts):
        characters_of(text.data, text.where)
        write_sentences(model.sentences([text.data], settings), name_of(index, text))


def write_sentences(sentences: Iterable[tuple[Span, bytes]], head: Mapping[str, Any]) -> None:
    """Write an object for each sentence, as soon as it is sure."""
    for number, (span, data) in enumerate(sentences):
        write_line({**head, "sentence": number, **span_as_mapping(span, data)})
        sys.stdout.buffer.flush()


def write_lines(sentences: Iterable[tuple[Span, bytes]], *, raw: bool) -> None:
    """Write a line for each sentence, as soon as it is sure, without the white space around it; breaks in it are spaces.

    Args:
        raw: control codes as they are, on a terminal too.
    """
    viewed = is_viewed(raw=raw)
    for _, data in sentences:
        line = " ".join(data.decode("utf-8").strip().splitlines())
        if line:
            encoded = line.encode("utf-8")
            sys.stdout.buffer.write((TerminalView.whole(encoded) if viewed else encoded) + b"\n")
            sys.stdout.buffer.flush()


def head_of_model(model: AnyLabelling) -> str:
    """What the model finds of texts, by the name of its head.

    Raises:
        UsageError: it labels nothing; the line says which command serves it.
    """
    if isinstance(model, AnsweringModel) and model.config.labels:
        return "token"
    if isinstance(model, AnsweringModel) or model.config.head not in _FINDERS:
        raise UsageError("the model has no head that labels; it encodes, and marlin encode gives its states")
    return str(model.config.head)


def _found(model: AnyLabelling, head: str, batch: Sequence[Text], request: Request) -> Iterator[dict[str, Any]]:
    """What is found of each text of a batch: of a blank line nothing, of one that is too short what it says padded."""
    read = [text for text in batch if not text.is_blank]
    paddings = [
        padding_of(model, _read_at_once(text, head), request.pad_to, text.where) if head in _BY_ITSELF else request.pad_to
        for text in read
    ]

    def find(some: Sequence[Text], padding: int | None) -> Iterator[dict[str, Any]]:
        said = said_of(padding, request.pad_to)
        return ({**said, **each} for each in _FINDERS[head](model, some, replace(request, pad_to=padding)))

    found = iter(found_by_padding(read, paddings, find))
    return ({_FOUND[head]: []} if text.is_blank else next(found) for text in batch)


def _checked(model: AnyLabelling, head: str, texts: Iterable[Text], request: Request) -> Iterator[Text]:
    """Texts that the model reads, with what it needs beside them.

    Raises:
        MarlinError: for one that it does not, with the place that it comes from.
    """
    for text in texts:
        _check(model, head, text, request)
        yield text


# What may stand beside a text in JSONL, and which of it a head reads.
COLUMNS = ("second", "question", "choices")
READ_BY_HEAD = {"sequence": "second", "answer": "question", "choice": "choices"}


def _check(model: AnyLabelling, head: str, text: Text, request: Request) -> None:
    beside, where = text.beside, text.where
    if text.is_blank:
        return
    for name in COLUMNS:
        if name != READ_BY_HEAD.get(head) and getattr(beside, name) and (file := where.partition(": line ")[0]) != where:
            reads = f"a model that {HEADS[head]} reads none"
            warnings.warn(f"{file}: what stands under {name!r} is not read: {reads}", AssumptionWarning, stacklevel=2)
    if isinstance(model, AnsweringModel):
        text.prompt.check_fits(model.config.max_bytes)
    elif head == "answer":
        if beside.question is None:
            raise UsageError(f"{where}: has no question; give --question, or question beside the text in --prompts")
        characters_of(beside.question, f"{where}: the question")
        if not characters_of(text.data, where).ids.size:
            raise InputError(f"{where}: is empty; there is nothing to answer from")
    elif head == "choice":
        if not beside.choices:
            raise UsageError(f"{where}: has no choices; give --choice for each, or choices beside the text in --prompts")
        for choice in beside.choices:
            if not choice:
                raise UsageError(f"{where}: a choice is empty; leave it out, or write what may go on from the text")
            model.check((text.data, choice), pad_to=request.pad_to, where=where)
    else:
        data = _read_at_once(text, head)
        model.check(data, pad_to=padding_of(model, data, request.pad_to, where), where=where)


def _read_at_once(text: Text, head: str) -> bytes | tuple[bytes, bytes]:
    """What a head that reads a text, or pair, by itself takes: only one that classifies texts reads another beside it."""
    return _with_second(text) if head == "sequence" else text.data


def _with_second(text: Text) -> bytes | tuple[bytes, bytes]:
    return text.data if text.beside.second is None else (text.data, text.beside.second)


# What is found of a batch of texts: an object each.
Finder = Callable[[Any, Sequence[Text], Request], Iterator[dict[str, Any]]]


def _classified(model: EncodingModel, batch: Sequence[Text], request: Request) -> Iterator[dict[str, Any]]:
    for labels in model.classify_many([_with_second(text) for text in batch], pad_to=request.pad_to):
        kept = [each._asdict() for each in labels if request.keeps(each.score)]
        yield {"labels": kept[: request.best]}


def _tagged(model: AnyLabelling, batch: Sequence[Text], request: Request) -> Iterator[dict[str, Any]]:
    data = [text.data for text in batch]
    if isinstance(model, AnsweringModel):
        found = model.tag_many(data, outside=request.outside, merge=request.merge)
    else:
        found = model.tag_many(data, pad_to=request.pad_to, outside=request.outside, merge=request.merge)
    for text, spans in zip(batch, found, strict=True):
        yield _spans(text, spans, request)


def _answered(model: EncodingModel, batch: Sequence[Text], request: Request) -> Iterator[dict[str, Any]]:
    for text in batch:
        assert text.beside.question is not None
        try:
            spans = model.answer(text.beside.question, text.data, request.answers, pad_to=request.pad_to)
        except (InputError, UsageError) as error:
            raise type(error)(f"{text.where}: {error}") from None
        yield _spans(text, spans, request)


def _chosen(model: EncodingModel, batch: Sequence[Text], request: Request) -> Iterator[dict[str, Any]]:
    for text in batch:
        choices = text.beside.choices
        scores = model.choose(text.data, choices, pad_to=request.pad_to)
        order = sorted(range(len(choices)), key=lambda choice: -scores[choice])
        kept = [
            {"choice": choice, "score": float(scores[choice]), "text": decode(choices[choice])}
            for choice in order
            if request.keeps(float(scores[choice]))
        ]
        yield {"choices": kept[: request.best]}


# Under which name an object has what is found, by head; and heads that read a text, or pair, by itself.
_FOUND = {"sequence": "labels", "token": "spans", "answer": "spans", "choice": "choices"}
_BY_ITSELF = ("sequence", "token")

_FINDERS: Mapping[str, Finder] = {"sequence": _classified, "token": _tagged, "answer": _answered, "choice": _chosen}


def _spans(text: Text, spans: Sequence[Span], request: Request) -> dict[str, Any]:
    counted = characters_in(text.data) is not None
    kept = [span for span in spans if request.keeps(span.score)]
    return {"spans": [span_as_mapping(span, text.data[span.first_byte : span.end_byte], counted=counted) for span in kept]}
