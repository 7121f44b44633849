"""From logits to ids: greedy or random, with the usual filters."""

import math
from dataclasses import dataclass

import mlx.core as mx

from marlin_cli.errors import UsageError


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
        if self.top_k < 0:
            raise UsageError(f"top_k must be 0 or more, found {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, found {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p must be between 0 and 1, found {self.min_p}")


def sample(logits: mx.array, settings: Sampling, keys: mx.array | None) -> mx.array:
    """Draw one id from each row of logits [batch, vocab]: [batch] uint32.

    Args:
        keys: [batch, 2] random keys, one a row; not read when the temperature is 0.
    """
    if settings.temperature == 0:
        return mx.argmax(logits, axis=-1)
    assert keys is not None
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
    # Each row has its own key, so that a prompt gives the same bytes alone and in a batch.
    noise = mx.stack([mx.random.gumbel((vocab,), key=key) for key in keys])
    return mx.argmax(logits + noise, axis=-1)


def stream_keys(seed: int, streams: int) -> mx.array:
    """A random key for each of a number of streams: [streams, 2]; equal keys for equal seeds."""
    return mx.stack([mx.random.key(seed)] * streams)


def next_keys(keys: mx.array) -> tuple[mx.array, mx.array]:
    """Keys to draw with now, and keys to go on with: both [streams, 2]."""
    pairs = [mx.random.split(key) for key in keys]
    return mx.stack([pair[0] for pair in pairs]), mx.stack([pair[1] for pair in pairs])
