"""How near a model that encodes texts comes to another, such as itself in 16 bits: states, labels, ends of sentences."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from marlin_cli.documents import parse_json
from marlin_cli.encoding_model import EncodingModel
from marlin_cli.engine.sentences import boundary_scores, ids_of_pieces, sentences_of
from marlin_cli.engine.spans import Span
from marlin_cli.errors import DistributedError, InputError, UsageError
from marlin_cli.quality.estimates import Estimate, Floats, ratio
from marlin_cli.ranks import ALONE, Ranks

# Texts that are read side by side.
TEXTS_AT_ONCE = 16


@dataclass(frozen=True)
class TextScore:
    """Texts of one domain, or all, beside what the reference makes of them. Standard errors are over texts."""

    texts: int
    characters: int
    states_error: Estimate  # root of the squared error of all states of a text over their squares
    states_cosine: Estimate  # of a position's state and the reference's
    equal_labels: Estimate | None  # share of characters, or of texts, whose likeliest label is the reference's
    boundary_error: Estimate | None  # of the probability that a character ends a sentence, on average
    equal_sentences: Estimate | None  # share of the reference's sentences that are found with both ends


@dataclass(frozen=True)
class TextQuality:
    """Scores of one model, by domain and of all texts."""

    domains: dict[str, TextScore]
    all_domains: TextScore


@dataclass(frozen=True)
class _Seen:
    """What a model makes of a text. What its head does not give is empty."""

    states: npt.NDArray[np.float32]  # [positions, d_model]
    labels: npt.NDArray[np.int64]  # [characters], or [1] of a whole text
    boundaries: npt.NDArray[np.float32]  # [characters]
    sentences: frozenset[tuple[int, int]]  # first characters and ends


# Sums of one text: what was counted, and out of how much, by the name of the field of `TextScore`.
_Sums = dict[str, tuple[float, float]]


def measure_texts(
    models: Mapping[str, EncodingModel],
    texts: Mapping[str, Sequence[bytes]],
    reference: EncodingModel,
    on_bytes: Callable[[int], None] = lambda count: None,
    *,
    ranks: Ranks = ALONE,
) -> list[TextQuality]:
    """Compare models (by their names) with a reference on the same texts (by their domains).

    Ranks share the batches out, each to be done by one of them whole: any number gives the same numbers, and every rank gets
    them.

    Args:
        reference: when it is one of the models, it is run once.
        on_bytes: told after each batch of a model how many bytes it read.

    Raises:
        UsageError: see `check_comparable`.
        CheckpointError: numbers that are not finite.
    """
    check_comparable(models, texts, reference)
    batches = [
        (domain, found[start : start + TEXTS_AT_ONCE])
        for domain, found in texts.items()
        for start in range(0, len(found), TEXTS_AT_ONCE)
    ]
    done: dict[int, list[list[_Sums]]] = {}  # by batch, and then by model
    for number in range(ranks.rank, len(batches), ranks.size):
        batch = batches[number][1]
        expected = _seen(reference, batch)
        done[number] = []
        for model in models.values():
            seen = expected if model is reference else _seen(model, batch)
            done[number].append([_compared(*pair) for pair in zip(seen, expected, strict=True)])
            on_bytes(sum(map(len, batch)))
    done = _gathered(done, ranks)
    sums: dict[str, dict[str, list[_Sums]]] = {name: {domain: [] for domain in texts} for name in models}
    for number, (domain, _) in enumerate(batches):
        for name, of_model in zip(models, done[number], strict=True):
            sums[name][domain] += of_model
    characters = {domain: [len(text.decode("utf-8")) for text in found] for domain, found in texts.items()}
    return [_quality(sums[name], characters) for name in models]


def _gathered(own: dict[int, list[list[_Sums]]], ranks: Ranks) -> dict[int, list[list[_Sums]]]:
    """The sums of all batches, from the ranks that did them."""
    if ranks.size == 1:
        return own
    payloads = ranks.gather(json.dumps(list(own.items())).encode())
    everyone = [parse_json(part, "the sums of a rank", DistributedError) for part in payloads]
    return {number: sums for part in everyone for number, sums in part}


def check_comparable(
    models: Mapping[str, EncodingModel], texts: Mapping[str, Sequence[bytes]], reference: EncodingModel
) -> None:
    """Raise `UsageError` if there are no texts, or a model is another than the reference but for its numbers."""
    if not any(texts.values()):
        raise UsageError("--quality: no text to compare models on")
    for name, model in models.items():
        for field in ("model_type", "head", "d_model", "marks"):
            ours, theirs = getattr(model.config, field), getattr(reference.config, field)
            if ours != theirs:
                raise UsageError(f"--reference: {field} is {theirs} there and {ours} in {name}; compare models of one kind")


def readable(models: Sequence[EncodingModel], texts: Sequence[bytes]) -> list[bytes]:
    """The texts that all models read; of windows of files, the last of a file may be too short."""
    return [text for text in texts if all(_reads(model, text) for model in models)]


def _reads(model: EncodingModel, text: bytes) -> bool:
    try:
        model.check(text)
    except InputError:
        return False
    return True


def _seen(model: EncodingModel, texts: Sequence[bytes]) -> list[_Seen]:
    states = [np.array(rows) for rows in model.encode_many(texts)]
    nothing = np.zeros(0, dtype=np.int64)
    labels = [nothing] * len(texts)
    if model.config.head in ("sequence", "token") and getattr(model.config, "problem", "") != "regression":
        labels = [np.atleast_1d(rows.argmax(axis=-1)) for rows in model.scores_many(texts)]
    if model.config.head == "token":
        labels = [rows[1:-1] for rows in labels]  # those of the marks mean nothing
    split = [_split(model, text) if model.splits else (np.zeros(0, dtype=np.float32), []) for text in texts]
    return [
        _Seen(rows, own, scores, frozenset((span.first_character, span.end_character) for span in spans))
        for rows, own, (scores, spans) in zip(states, labels, split, strict=True)
    ]


def _split(model: EncodingModel, text: bytes) -> tuple[npt.NDArray[np.float32], list[Span]]:
    settings = model.split_settings
    scored = list(boundary_scores(model.network, ids_of_pieces([text]), settings))
    spans = [span for span, _ in sentences_of(scored, settings)]
    return np.concatenate([scores for _, scores in scored]), spans


def _compared(seen: _Seen, expected: _Seen) -> _Sums:
    ours, theirs = seen.states.astype(np.float64), expected.states.astype(np.float64)
    lengths = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
    cosines = np.einsum("pd,pd->p", ours, theirs) / np.maximum(lengths, np.finfo(np.float64).tiny)
    squares = float((theirs**2).sum())
    return {
        "states_error": (float(np.sqrt(((ours - theirs) ** 2).sum() / squares)) if squares else 0.0, 1.0),
        "states_cosine": (float(cosines.sum()), float(len(cosines))),
        "equal_labels": (float((seen.labels == expected.labels).sum()), float(len(expected.labels))),
        "boundary_error": (
            float(np.abs(seen.boundaries - expected.boundaries).sum(dtype=np.float64)),
            float(len(expected.boundaries)),
        ),
        "equal_sentences": (float(len(seen.sentences & expected.sentences)), float(len(expected.sentences))),
    }


def _quality(sums: Mapping[str, list[_Sums]], characters: Mapping[str, list[int]]) -> TextQuality:
    domains = {domain: _score(found, characters[domain]) for domain, found in sums.items() if found}
    everything = _score(
        [each for found in sums.values() for each in found], [n for found in characters.values() for n in found]
    )
    return TextQuality(domains, everything)


def _score(sums: Sequence[_Sums], characters: Sequence[int]) -> TextScore:
    def estimate(name: str) -> Estimate | None:
        totals, sizes = (np.array([each[name][part] for each in sums]) for part in (0, 1))
        return _ratio(totals, sizes)

    error, cosine = estimate("states_error"), estimate("states_cosine")
    assert error is not None and cosine is not None
    others = {name: estimate(name) for name in ("equal_labels", "boundary_error", "equal_sentences")}
    return TextScore(len(sums), sum(characters), error, cosine, **others)


def _ratio(totals: Floats, sizes: Floats) -> Estimate | None:
    return ratio(totals, sizes) if sizes.any() else None
