"""Span corruption: raw bytes to an input with gaps and the answer that fills them, as ByT5 was pre-trained."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from marlin_cli.errors import CorpusError

# ByT5 marks gaps by the ids from 258 down, which are the bytes from 0xFF down: its pre-training left no others.
FIRST_MARK = 0xFF


@dataclass(frozen=True)
class SpanCorruption:
    """How much is taken out, and in pieces of what length (ByT5, arXiv 2105.13626, section 3.1).

    Raises:
        CorpusError: a share that is not between 0 and 1, or a length below 1.
    """

    noise_density: float = 0.15  # share of the bytes that is taken out
    mean_span_bytes: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.noise_density < 1:
            raise CorpusError(f"--noise-density must be between 0 and 1, found {self.noise_density:g}")
        if not 1 <= self.mean_span_bytes < float("inf"):
            raise CorpusError(f"--span-bytes must be 1 or more, found {self.mean_span_bytes:g}")


def corrupt(data: bytes, settings: SpanCorruption, rng: np.random.Generator) -> tuple[bytes, bytes]:
    """An input in which spans of `data` are replaced by marks, and the answer: each mark with what it stands for.

    As T5's `random_spans_noise_mask` has it: a kept span first, a lost one last, all of random lengths. Data of less
    than two bytes comes back whole, with an empty answer.
    """
    total = len(data)
    if total < 2:
        return data, b""
    lost = min(max(round(total * settings.noise_density), 1), total - 1)
    count = min(max(round(lost / settings.mean_span_bytes), 1), lost, total - lost, FIRST_MARK + 1)
    source, target, start = bytearray(), bytearray(), 0
    lengths = zip(_partition(total - lost, count, rng), _partition(lost, count, rng), strict=True)
    for number, (kept, gone) in enumerate(lengths):
        mark = FIRST_MARK - number
        source += data[start : start + kept]
        source.append(mark)
        target.append(mark)
        target += data[start + kept : start + kept + gone]
        start += kept + gone
    return bytes(source), bytes(target)


def _partition(total: int, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """`count` lengths of 1 or more with the sum `total`, each such list as likely as another."""
    cuts = np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))
