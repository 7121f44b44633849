"""From logits to ids: greedy or random, with the usual filters."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from marlin_cli.errors import UsageError
from marlin_cli.ops.cpu import kernels

# A temperature beyond which all ids are as likely as one another; below its inverse only the likeliest is drawn.
ENDLESS = 1e30


@dataclass(frozen=True)
class Sampling:
    """How an id is drawn. Filters apply in the order of the fields, as in Hugging Face transformers.

    Raises:
        UsageError: a value out of its range.
    """

    temperature: float = 0.0  # 0 takes the likeliest id
    top_k: int = 0  # keep the k likeliest; 0 keeps all
    top_p: float = 1.0  # keep the likeliest that together reach this probability
    min_p: float = 0.0  # keep those at least this fraction of the likeliest
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature must be 0 or more, found {self.temperature}")
        if not 0 <= self.top_k < 1 << 31:
            raise UsageError(f"top_k must be 0 or more and fit 31 bits, found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, found {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p must be between 0 and 1, found {self.min_p}")
        if not 0 <= self.seed < 1 << 64:
            raise UsageError(f"seed must be 0 or more and fit 64 bits, found {self.seed}")
        # Numbers of 32 bits end soon after, and beyond these nothing else is drawn.
        if self.temperature:
            object.__setattr__(self, "temperature", min(max(self.temperature, 1 / ENDLESS), ENDLESS))
        object.__setattr__(self, "top_p", max(self.top_p, 1 / ENDLESS))


def filter_numbers(settings: Sampling) -> list[float]:
    """The filters as kernels read them: temperature, top_p, the logarithm of min_p or 1 for none, top_k."""
    floor = math.log(settings.min_p) if settings.min_p > 0 else 1.0
    return [settings.temperature, settings.top_p, floor, float(settings.top_k)]


# Steps for which noise is drawn at once.
NOISE_STEPS = 64


class Noise:
    """Gumbel noise by step of a stream, the same however many steps are asked for at once. Equal for equal seeds.

    Streams of equal seed share it, so that a prompt gives the same bytes alone and in a batch.
    """

    def __init__(self, seed: int, vocab: int) -> None:
        self._key = mx.random.key(seed)
        self._left = mx.zeros((0, vocab))

    def take(self, steps: int) -> mx.array:
        """The noise of the next steps: [steps, vocab]."""
        while self._left.shape[0] < steps:
            now, self._key = mx.random.split(self._key)
            block = mx.random.gumbel((NOISE_STEPS, self._left.shape[1]), key=now)
            self._left = mx.concatenate([self._left, block])
        taken, self._left = self._left[:steps], self._left[steps:]
        return taken

    def give_back(self, taken: mx.array) -> None:
        """Take back what was taken last and not used."""
        self._left = mx.concatenate([taken, self._left])


class Draws(NamedTuple):
    """How the next ids of several streams are drawn, each of which has settings and noise of its own, or all have the same.

    Attributes:
        settings: by stream, or one for all.
        noise: of the ids that a stream draws, in their order: [draws, vocab]; by stream, or one for all. Nothing stands in
            it where the temperature is 0.
    """

    settings: Sequence[Sampling]
    noise: Sequence[mx.array]


def no_noise() -> mx.array:
    """What stands for the noise of a stream that takes the likeliest ids."""
    return mx.zeros((0, 0))


def sample(logits: mx.array, settings: Sampling, noise: mx.array | None) -> mx.array:
    """Draw one id from each row of logits [batch, vocab]: [batch] uint32.

    Args:
        noise: [vocab] Gumbel noise of this step, or [batch or 1, vocab]; not read when the temperature is 0.
    """
    if settings.temperature == 0:
        return mx.argmax(logits, axis=-1)
    assert noise is not None
    logits = logits / settings.temperature
    vocab = logits.shape[-1]
    if 0 < settings.top_k < vocab:
        kth = mx.sort(logits, axis=-1)[:, vocab - settings.top_k, None]
        logits = mx.where(logits < kth, -mx.inf, logits)
    if settings.top_p < 1:
        descending = -mx.sort(-logits, axis=-1)
        probabilities = mx.softmax(descending, axis=-1)
        # The likeliest id always stays: what counts is the probability before each.
        inside = mx.cumsum(probabilities, axis=-1) - probabilities < settings.top_p
        smallest = mx.where(inside, descending, mx.inf).min(axis=-1, keepdims=True)
        logits = mx.where(logits < smallest, -mx.inf, logits)
    if settings.min_p > 0:
        floor = logits.max(axis=-1, keepdims=True) + math.log(settings.min_p)
        logits = mx.where(logits < floor, -mx.inf, logits)
    return mx.argmax(logits + noise, axis=-1)


def sample_rows(logits: mx.array, settings: Sequence[Sampling], noise: mx.array | None) -> mx.array:
    """`sample` with settings of its own for each row of logits [rows, vocab], or with one for all: [rows] uint32.

    Args:
        noise: [rows, vocab], or [1, vocab] for all; not read where the temperature is 0.
    """
    if len(set(settings)) == 1:
        return sample(logits, settings[0], noise)
    return mx.concatenate([
        sample(logits[row : row + 1], each, None if noise is None else noise[row if noise.shape[0] > 1 else 0])
        for row, each in enumerate(settings)
    ])  # fmt: skip


def kernel_drawing(module: Any, settings: Sampling) -> Any:
    """The CPU kernels' own copy of settings."""
    return module.Drawing(settings.temperature, settings.top_k, settings.top_p, settings.min_p)


def draw(
    logits: mx.array, forbidden: Sequence[Sequence[int]], settings: Sequence[Sampling], noise: mx.array | None
) -> tuple[list[int], list[float]]:
    """One id for each row of logits [rows, vocab], and minus the logarithm of the probability that they give it.

    Where they are no numbers the cost is none either, and the id says nothing.

    Args:
        forbidden: ids that are not drawn, by row or one for all; the probabilities are those before.
        settings: by row, or one for all.
        noise: [rows, vocab], or [1, vocab] for all; see `sample`.
    """
    module = kernels()[0] if mx.default_device() == mx.Device(mx.cpu) and logits.dtype == mx.float32 else None
    if module is not None:
        drawings = [kernel_drawing(module, each) for each in settings]
        ids, costs = module.draw_ids(logits, [list(each) for each in forbidden], drawings, noise)
        return ids, costs
    alike = len({tuple(each) for each in forbidden}) == 1
    allowed = without(logits, forbidden[0]) if alike else mx.concatenate([
        without(logits[row : row + 1], each) for row, each in enumerate(forbidden)
    ])  # fmt: skip
    drawn = sample_rows(allowed, settings, noise)
    nats = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, drawn[:, None], axis=-1)[:, 0]
    mx.eval(drawn, nats)  # together: an evaluation costs more than either
    return drawn.tolist(), nats.tolist()  # type: ignore[return-value]


def without(scores: mx.array, forbidden: Sequence[int]) -> mx.array:
    """Scores [.., vocab] in which some ids cannot be chosen."""
    if not forbidden:
        return scores
    barred = (mx.arange(scores.shape[-1])[:, None] == mx.array(list(forbidden))).any(axis=-1)
    return mx.where(barred, -mx.inf, scores)
