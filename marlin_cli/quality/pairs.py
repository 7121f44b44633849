"""How well ByT5 answers: bits per byte of the wanted answers, and errors of its greedy ones, with standard errors.

Bits are teacher-forced and those of the answer's end are among them; the denominator is the answer's bytes. Errors are
edits in code points (a byte that is no UTF-8 is one) over the code points of the wanted answer. What copying the input
would err is beside it: in tasks that correct text a model must beat that.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from marlin_cli.answering_model import AnsweringModel
from marlin_cli.corpus import Pair
from marlin_cli.engine.answer_requests import AnswerLimits
from marlin_cli.engine.answer_scoring import bits_of_answers
from marlin_cli.engine.wire import Wire
from marlin_cli.errors import UsageError
from marlin_cli.models.byt5_ids import bytes_of_ids, ids_of_bytes
from marlin_cli.quality.edit_distance import edit_distance
from marlin_cli.quality.estimates import Estimate, Floats, ratio
from marlin_cli.ranks import ALONE, Ranks

WIRE = Wire(())

# Bytes of inputs and answers, filler among them, that are scored side by side.
BYTES_PER_PASS = 8192

# An answer that does not end is cut here: so many bytes for each of the longer side, and a few more.
ANSWER_RATIO, ANSWER_EXTRA_BYTES = 2, 32


@dataclass(frozen=True)
class PairComparison:
    """A model's numbers less the reference's, paired by input."""

    bits_per_target_byte: Estimate | None
    character_error_rate: Estimate | None
    exact_match: Estimate


@dataclass(frozen=True)
class PairScore:
    """Pairs of one group, or all. Standard errors are over pairs; None where the wanted answers are all empty."""

    pairs: int
    target_bytes: int
    characters: int  # code points of the wanted answers
    total_bits: float
    bits_per_target_byte: Estimate | None
    character_error_rate: Estimate | None
    exact_match: Estimate  # share of answers that are right to the last byte
    copied_error_rate: Estimate | None  # of the inputs, taken as answers
    against_reference: PairComparison | None


@dataclass(frozen=True)
class PairQuality:
    """Scores of one model, by group where pairs name one, and of all pairs."""

    groups: dict[str, PairScore]
    all_pairs: PairScore


@dataclass(frozen=True)
class Answers:
    """What one model made of every pair, in the order of the pairs.

    Attributes:
        data: greedy answers.
        bits: of the wanted answer and its end.
        errors: edits from the answer to the wanted one.
        exact: is the answer the wanted one?
    """

    data: list[bytes]
    bits: Floats
    errors: Floats
    exact: npt.NDArray[np.bool_]


def measure_pairs(
    models: Mapping[str, AnsweringModel],
    pairs: Sequence[Pair],
    reference: AnsweringModel | None = None,
    on_bytes: Callable[[int], None] = lambda count: None,
    *,
    ranks: Ranks = ALONE,
) -> list[PairQuality]:
    """Score models (by their names) on the same pairs.

    Ranks share the passes out, each to be done by one of them whole: any number gives the same numbers, and every rank gets
    them.

    Args:
        reference: what the models are compared with; when it is one of them, it is run once.
        on_bytes: told after each pass of a model how many bytes of pairs it scored.

    Raises:
        UsageError: see `check_pairs_fit`.
        CheckpointError: predictions that are not finite.
        DistributedError: another rank ended, or has other pairs.
    """
    check_pairs_fit({**models, **({} if reference is None else {"the reference": reference})}, pairs)
    expected = None if reference is None else answers_to(reference, pairs, "the reference", on_bytes, ranks)
    results = []
    for name, model in models.items():
        if model is reference and expected is not None:
            results.append(quality_of(pairs, expected, expected))
        else:
            results.append(quality_of(pairs, answers_to(model, pairs, name, on_bytes, ranks), expected))
    return results


def check_pairs_fit(models: Mapping[str, AnsweringModel], pairs: Sequence[Pair]) -> None:
    """Raise `UsageError` if there are no pairs, an input is too long for a model, or one is an encoder alone."""
    if not pairs:
        raise UsageError("--quality: no pairs to score")
    longest = max(len(pair.source) for pair in pairs)
    for name, model in models.items():
        if not model.config.decoder_layers:
            raise UsageError(f"--quality: {name} is an encoder alone and answers nothing")
        if longest > model.config.max_bytes:
            raise UsageError(f"--quality: an input of {longest:,} bytes does not fit {name} ({model.config.max_bytes:,})")


def answers_to(
    model: AnsweringModel,
    pairs: Sequence[Pair],
    name: str = "the model",
    on_bytes: Callable[[int], None] = lambda count: None,
    ranks: Ranks = ALONE,
) -> Answers:
    """Run a model on every pair. No result depends on which pairs share a pass.

    Raises:
        CheckpointError: predictions that are not finite.
    """
    batches = list(_batches(pairs))
    own = batches[ranks.rank :: ranks.size]
    bits = _bits_of_batches(model, pairs, name, own)
    data = [b""] * len(pairs)
    for batch in own:
        chosen = [pairs[index] for index in batch]
        limits = [ANSWER_RATIO * max(len(pair.source), len(pair.target)) + ANSWER_EXTRA_BYTES for pair in chosen]
        found = model.answers([pair.source for pair in chosen], AnswerLimits(max(limits)))
        for index, limit, (answer,) in zip(batch, limits, found, strict=True):
            data[index] = bytes_of_ids(answer.ids[:limit])
        on_bytes(sum(len(pair.source) + len(pair.target) for pair in chosen))
    if ranks.size > 1:
        mine = [index for batch in own for index in batch]
        for payload in ranks.gather(WIRE.to_bytes([(index, float(bits[index]), data[index]) for index in mine])):
            for index, cost, answer_data in WIRE.from_bytes(payload):
                bits[index], data[index] = cost, answer_data
    errors = np.array([edit_distance(_text(each), _text(pair.target)) for each, pair in zip(data, pairs, strict=True)], float)
    exact = np.array([each == pair.target for each, pair in zip(data, pairs, strict=True)])
    return Answers(data, bits, errors, exact)


def bits_of_pairs(model: AnsweringModel, pairs: Sequence[Pair], name: str = "the model") -> Floats:
    """Bits that the wanted answer of each pair and its end cost: [pairs].

    Raises:
        CheckpointError: predictions that are not finite.
    """
    return _bits_of_batches(model, pairs, name, list(_batches(pairs)))


def _bits_of_batches(model: AnsweringModel, pairs: Sequence[Pair], name: str, batches: Sequence[list[int]]) -> Floats:
    """As `bits_of_pairs`, of the pairs of some passes; what is said of the others means nothing."""
    bits = np.empty(len(pairs))
    for batch in batches:
        sources = [[*ids_of_bytes(pairs[index].source), model.config.end_id] for index in batch]
        targets = [pairs[index].target for index in batch]
        bits[batch] = bits_of_answers(model.network, sources, targets, memory_bits=model.kv_bits, name=name)
    return bits


def quality_of(pairs: Sequence[Pair], answers: Answers, reference: Answers | None = None) -> PairQuality:
    """The scores of what a model made of the pairs; groups sorted by name, those of a single kind left out."""
    names = sorted({pair.group for pair in pairs})
    places = {name: np.array([pair.group == name for pair in pairs]) for name in names}
    copied = np.array([edit_distance(_text(pair.source), _text(pair.target)) for pair in pairs], float)
    groups = {} if names == [""] else {name: _score(pairs, answers, reference, copied, places[name]) for name in names}
    return PairQuality(groups, _score(pairs, answers, reference, copied, np.ones(len(pairs), bool)))


def _score(
    pairs: Sequence[Pair], answers: Answers, reference: Answers | None, copied: Floats, where: npt.NDArray[np.bool_]
) -> PairScore:
    sizes = np.array([len(pair.target) for pair in pairs], float)[where]
    characters = np.array([len(_text(pair.target)) for pair in pairs], float)[where]
    ones = np.ones(len(sizes))
    beside = None
    if reference is not None:
        beside = PairComparison(
            bits_per_target_byte=_ratio((answers.bits - reference.bits)[where], sizes),
            character_error_rate=_ratio((answers.errors - reference.errors)[where], characters),
            exact_match=ratio((answers.exact.astype(float) - reference.exact.astype(float))[where], ones),
        )
    return PairScore(
        pairs=len(sizes),
        target_bytes=int(sizes.sum()),
        characters=int(characters.sum()),
        total_bits=float(answers.bits[where].sum()),
        bits_per_target_byte=_ratio(answers.bits[where], sizes),
        character_error_rate=_ratio(answers.errors[where], characters),
        exact_match=ratio(answers.exact[where].astype(float), ones),
        copied_error_rate=_ratio(copied[where], characters),
        against_reference=beside,
    )


def _ratio(totals: Floats, sizes: Floats) -> Estimate | None:
    return ratio(totals, sizes) if sizes.any() else None


def _batches(pairs: Sequence[Pair]) -> Iterator[list[int]]:
    """Places of pairs in passes of like lengths, longest first."""
    order = sorted(range(len(pairs)), key=lambda index: -max(len(pairs[index].source), len(pairs[index].target)))
    while order:
        longest = pairs[order[0]]
        count = max(1, BYTES_PER_PASS // (len(longest.source) + len(longest.target) + 2))
        yield order[:count]
        order = order[count:]


def _text(data: bytes) -> str:
    """Code points, and one for each byte that is not UTF-8."""
    return data.decode("utf-8", errors="surrogateescape")
