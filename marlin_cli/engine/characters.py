"""What CANINE makes of texts: states, vectors, labels, spans and answers. A text gives the same alone and in a batch.

Its states depend on how far an input is padded, as those of the reference do. So nothing is padded unless `pad_to` says
so, to the length that a checkpoint was used with, and texts share a batch only where they are equally long then. Of an
LA-CANINE, which cuts texts and does it in `sentences`, there are states alone.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.engine.finite import finite
from marlin_cli.engine.fused_canine import CanineRunner, runner_of
from marlin_cli.engine.spans import OUTSIDE, Place, Span, labelled_runs, sigmoid, softmax, span_at
from marlin_cli.errors import InputError, UsageError
from marlin_cli.models import architecture_of
from marlin_cli.models.canine import Canine
from marlin_cli.models.canine_ids import Characters, Ids, characters_of, checked_ids, padded_to
from marlin_cli.models.canine_steps import CharacterNetwork

# Positions in one pass: bounds the memory of activations.
POSITIONS_AT_ONCE = 1 << 14

Floats = npt.NDArray[np.float32]

# UTF-8, or its code points; and one such text, or a pair.
One: TypeAlias = "bytes | list[int]"
Text: TypeAlias = "One | tuple[One, One]"

ANSWER = "answer"  # the label of its spans


class Label(NamedTuple):
    """What a whole text is, and how sure that is: a probability, or the value itself of a regression."""

    label: str
    score: float


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are looked for.

    Raises:
        UsageError: a value out of its range.
    """

    best: int = 1  # answers to return
    longest: int = 128  # characters of an answer
    window_positions: int = 2048  # question, context and marks that are read at once
    stride_characters: int = 128  # from the beginning of a window of a longer context to that of the next; a window at most

    def __post_init__(self) -> None:
        for name in ("best", "longest", "window", "stride"):
            size = getattr(self, {"window": "window_positions", "stride": "stride_characters"}.get(name, name))
            if size < 1:
                raise UsageError(f"{name} must be at least 1, found {size}")


class _Input(NamedTuple):
    """A text as the network reads it."""

    ids: Ids
    types: Ids


def encode(network: CharacterNetwork, texts: Sequence[Text], pad_to: int | None = None) -> list[mx.array]:
    """The states of each text's positions, marks included and padding not: [positions, d_model] float32.

    An LA-CANINE has no marks, and fills the last molecule by itself.

    Args:
        pad_to: positions to which each text is padded; see this file's first lines.

    Raises:
        InputError: a text that is no UTF-8 or has an id that is no code point, too long, or too short without padding.
        UsageError: padding to a length that the network cannot have, or a pair where it reads one text at a time.
    """
    inputs = [_input(network, text) for text in texts]

    def states(runner: CanineRunner, ids: mx.array, lengths: mx.array | None, types: mx.array) -> mx.array:
        return runner.encode(ids, lengths, types).astype(mx.float32)

    return [row[: len(each.ids)] for row, each in zip(_run(network, inputs, pad_to, states), inputs, strict=True)]


def check(network: CharacterNetwork, text: Text, pad_to: int | None = None, where: str = "") -> None:
    """See that the network reads a text; `where` begins what is said of one that it does not.

    Raises:
        InputError, UsageError: see `encode`.
    """
    _length(network, len(_input(network, text, where).ids), pad_to, f"{where}: the text" if where else "the text")


def padding_needed(network: CharacterNetwork, text: Text, where: str = "") -> int | None:
    """The positions that a text must be padded to, to be read at all; None where it has as many. For `where` see `check`.

    Raises:
        InputError: see `encode`.
    """
    least: int = network.config.downsample_factor
    return least if network.config.length_of(len(_input(network, text, where).ids)) < least else None


def places(network: CharacterNetwork, text: bytes) -> list[Place]:
    """What each position of a text's states stands for: its characters, and the marks around them where there are any.

    Raises:
        InputError: the text is no UTF-8.
    """
    starts = characters_of(text).starts.tolist()
    found = [Place(None, first, end, index, index + 1) for index, (first, end) in enumerate(pairwise(starts))]
    return [Place("[CLS]"), *found, Place("[SEP]")] if network.config.marks else found


def pooled(network: Canine, texts: Sequence[Text], pad_to: int | None = None) -> mx.array:
    """One vector a text: [texts, d_model] float32; see `encode`.

    Raises:
        UsageError: the checkpoint has no pooler.
    """
    if not network.config.pooler:
        raise UsageError(f"{_this(network)} has no pooler, the layer that makes one vector of a text; take its states")
    inputs = [_input(network, text) for text in texts]

    def vectors(runner: CanineRunner, ids: mx.array, lengths: mx.array | None, types: mx.array) -> mx.array:
        return network.pooled(runner.deep(ids, lengths, types)).astype(mx.float32)

    rows = _run(network, inputs, pad_to, vectors)
    return mx.stack(rows) if rows else mx.zeros((0, network.config.d_model))


def classify(network: Canine, texts: Sequence[Text], pad_to: int | None = None) -> list[list[Label]]:
    """Every label with its score, the best first, of each text or pair; see `encode`.

    Raises:
        UsageError: the network does not classify texts.
    """
    _check_head(network, "sequence")
    logits = _logits(network, [_input(network, text) for text in texts], pad_to)
    found = []
    meanings: dict[str, Callable[[Floats], Floats]] = {"one_label": softmax, "several_labels": sigmoid}
    meaning = meanings.get(network.config.problem, np.asarray)
    for row in logits:
        scores = meaning(row)
        order = np.argsort(-scores, kind="stable")
        found.append([Label(network.config.labels[index], float(scores[index])) for index in order])
    return found


def label(network: Canine, texts: Sequence[bytes], pad_to: int | None = None) -> list[list[Span]]:
    """The labelled spans of each text: all of it where the network classifies texts, else what `tag` finds.

    Raises:
        UsageError: the network has no labels.
    """
    if network.config.head != "sequence":
        return tag(network, texts, pad_to)
    best = [labels[0] for labels in classify(network, texts, pad_to)]
    return [
        [Span(name, score, 0, len(text), 0, len(characters_of(text).ids))]
        for text, (name, score) in zip(texts, best, strict=True)
    ]


def tag(
    network: Canine,
    texts: Sequence[bytes],
    pad_to: int | None = None,
    *,
    outside: Sequence[str] = OUTSIDE,
    merge: bool = True,
    marks: bool = True,
) -> list[list[Span]]:
    """The labelled spans of each text; see `encode`.

    Args:
        outside: labels that say nothing.
        merge: neighbours of one label are one span with the mean of their scores; `B-` begins another, `I-` goes on.
        marks: does the text stand between CANINE's marks, as the checkpoint was tuned?

    Raises:
        UsageError: the network does not label characters.
    """
    _check_head(network, "token")
    characters = [characters_of(text) for text in texts]
    plain = [_Input(each.ids, np.zeros_like(each.ids)) for each in characters]
    inputs = [_Input(*network.config.input_of(each.ids)) for each in characters] if marks else plain
    found = []
    for each, logits in zip(characters, _logits(network, inputs, pad_to), strict=True):
        own = logits[1 : len(each.ids) + 1] if marks else logits[: len(each.ids)]
        found.append(_spans(network.config.labels, softmax(own), each, outside, merge))
    return found


def answers(
    network: Canine, question: bytes, context: bytes, settings: AnswerSettings | None = None, pad_to: int | None = None
) -> list[Span]:
    """Spans of the context that answer the question, the best first; see `encode`.

    The score is the probability of the first character times that of the last, each over the characters of the context
    that stand in one window; a long context is read in windows that overlap.

    Raises:
        UsageError: the network does not answer, or the question leaves no room for the context.
        InputError: an empty context.
    """
    _check_head(network, "answer")
    settings = settings or AnswerSettings()
    asked, given = characters_of(question, "the question"), characters_of(context, "the context")
    if not len(given.ids):
        raise InputError("the context is empty; there is nothing to answer from")
    room = min(settings.window_positions, network.config.longest, pad_to or network.config.longest) - len(asked.ids) - 3
    if room < 1:
        raise UsageError(f"the question has {len(asked.ids):,} characters, which leaves no room for the context")
    starts, stride = [0], min(settings.stride_characters, room)  # a longer stride would leave characters unread
    while starts[-1] + room < len(given.ids):
        starts.append(starts[-1] + stride)
    inputs = [_Input(*network.config.input_of(asked.ids, given.ids[start : start + room])) for start in starts]
    best: dict[tuple[int, int], float] = {}
    for start, logits in zip(starts, _logits(network, inputs, pad_to), strict=True):
        offset = len(asked.ids) + 2
        own = logits[offset : offset + min(room, len(given.ids) - start)]
        for (first, end), score in _best_pairs(softmax(own[:, 0]), softmax(own[:, 1]), settings):
            place = (start + first, start + end)
            best[place] = max(best.get(place, 0.0), score)
    ordered = sorted(best.items(), key=lambda item: -item[1])[: settings.best]
    return [span_at(ANSWER, score, first, end, given.starts) for (first, end), score in ordered]


def choose(network: Canine, text: bytes, choices: Sequence[bytes], pad_to: int | None = None) -> Floats:
    """The probability of each choice to go with the text: [choices]; see `encode`.

    The choices are one batch in the reference, so without `pad_to` they are padded to the longest.

    Raises:
        UsageError: the network does not choose.
    """
    _check_head(network, "choice")
    inputs = [_input(network, (text, choice)) for choice in choices]
    if not inputs:
        return np.zeros(0, dtype=np.float32)
    longest = max(len(each.ids) for each in inputs)
    return softmax(np.concatenate(_logits(network, inputs, longest if pad_to is None else pad_to)))


def scores(network: CharacterNetwork, texts: Sequence[Text], pad_to: int | None = None) -> list[Floats]:
    """What the head gives each text [rows], or its positions [positions, rows], before it becomes probabilities; see `encode`.

    Raises:
        UsageError: the network has no head.
    """
    if network.config.head == "none":
        raise UsageError(f"{_this(network)} has no head, and so no scores; take its states")
    inputs = [_input(network, text) for text in texts]
    rows = _logits(network, inputs, pad_to)
    return [row[: len(each.ids)] if row.ndim > 1 else row for row, each in zip(rows, inputs, strict=True)]


def _check_head(network: CharacterNetwork, head: str) -> None:
    does = {
        "none": "has no head and encodes", "sequence": "classifies texts", "token": "labels characters",
        "answer": "answers questions", "choice": "chooses between texts", "sentence": "finds the ends of sentences",
    }  # fmt: skip
    if network.config.head != head:
        raise UsageError(f"{_this(network)} {does[network.config.head]}; what was asked for needs one that {does[head]}")


def _this(network: CharacterNetwork) -> str:
    return f"this {architecture_of(network).title}"


def _input(network: CharacterNetwork, text: Text, where: str = "") -> _Input:
    if not isinstance(text, tuple):
        return _Input(*network.config.input_of(_ids(text, where or "the input")))
    named = (f"{where}: {one}" if where else one for one in ("the first text", "the second text"))
    first, second = (_ids(one, name) for one, name in zip(text, named, strict=True))
    return _Input(*network.config.input_of(first, second))


def _ids(text: One, where: str) -> Ids:
    # Bytes in another container are no code points.
    if isinstance(text, (bytes, bytearray, memoryview)):
        return characters_of(bytes(text), where).ids
    return checked_ids(text, where)


def _logits(network: CharacterNetwork, inputs: Sequence[_Input], pad_to: int | None) -> list[Floats]:
    def run(runner: CanineRunner, ids: mx.array, lengths: mx.array | None, types: mx.array) -> mx.array:
        return runner(ids, lengths, types)

    return [finite(np.array(row)) for row in _run(network, inputs, pad_to, run)]


def _run(
    network: CharacterNetwork,
    inputs: Sequence[_Input],
    pad_to: int | None,
    function: Callable[[CanineRunner, mx.array, mx.array | None, mx.array], mx.array],
) -> list[mx.array]:
    """The rows of `function(runner, ids, lengths, types)` for each input, in batches of equal length with padding."""
    runner = runner_of(network)
    groups: dict[int, list[int]] = defaultdict(list)
    for index, each in enumerate(inputs):
        groups[_length(network, len(each.ids), pad_to)].append(index)
    rows: dict[int, mx.array] = {}
    for length, members in groups.items():
        step = max(1, POSITIONS_AT_ONCE // length)
        for start in range(0, len(members), step):
            some = members[start : start + step]
            counts = [len(inputs[index].ids) for index in some]
            lengths = None if min(counts) == length else mx.array(counts)
            ids = padded_to([inputs[index].ids for index in some], length, network.config.padding)
            types = padded_to([inputs[index].types for index in some], length, 0)
            result = function(runner, ids, lengths, types)
            mx.eval(result)
            rows |= {index: result[place] for place, index in enumerate(some)}
    return [rows[index] for index in range(len(inputs))]


def _length(network: CharacterNetwork, positions: int, pad_to: int | None, where: str = "the text") -> int:
    config = network.config
    least, most = config.downsample_factor, config.longest
    if pad_to is not None and not least <= pad_to <= most:
        raise UsageError(f"pad_to (--pad-to) must be from {least} to {most:,}, found {pad_to}")
    if pad_to is not None and config.length_of(pad_to) != pad_to:
        raise UsageError(f"pad_to (--pad-to) must be a multiple of {least} for {_this(network)}, found {pad_to}")
    marks = " with its marks" if config.marks else ""
    if positions > (pad_to or most):
        padded = pad_to is not None and positions <= most
        mend = f"pad_to (--pad-to) is {pad_to:,}; raise it" if padded else f"the model reads {most:,}; shorten it"
        raise InputError(f"{where} takes {positions:,} positions{marks}, and {mend}")
    length = pad_to or config.length_of(positions)
    if length < least:
        title = architecture_of(network).title
        raise InputError(
            f"{where} takes {positions} positions{marks}, {title} needs {least}; pad it (pad_to, --pad-to: {least} or more)"
        )
    return length


def _spans(labels: Sequence[str], scores: Floats, text: Characters, outside: Sequence[str], merge: bool) -> list[Span]:
    """Spans from the labels' probabilities [characters, labels]."""
    return [span_at(*run, text.starts) for run in labelled_runs(labels, scores, outside, merge)]


def _best_pairs(begins: Floats, ends: Floats, settings: AnswerSettings) -> list[tuple[tuple[int, int], float]]:
    """The likeliest (first, end) of spans that are not too long, and their probabilities."""
    found: list[tuple[tuple[int, int], float]] = []
    for more in range(min(settings.longest, len(begins))):
        products = begins[: len(begins) - more] * ends[more:]
        for first in np.argsort(-products, kind="stable")[: settings.best]:
            found.append(((int(first), int(first) + more + 1), float(products[first])))
    return sorted(found, key=lambda item: -item[1])[: settings.best]
