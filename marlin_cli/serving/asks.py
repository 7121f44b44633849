"""What one stream is asked for, whichever path it came by; and how the fields that all paths share are read."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from marlin_cli.config import describe
from marlin_cli.engine.beams import Beams
from marlin_cli.engine.sampling import Sampling
from marlin_cli.errors import UsageError
from marlin_cli.serving.fields import Fields, bytes_of
from marlin_cli.serving.refusals import bad
from marlin_cli.serving.served import Served

DEFAULT_MAX_BYTES = 256
MOST_CHOICES = 128
MOST_BEAMS = 64

# Seeds of requests that name none: small enough for every reader of JSON.
FRESH_SEED_BITS = 32

T = TypeVar("T")


@dataclass(frozen=True)
class Ask:
    """What one stream is asked for. Numbers count bytes; of a model that answers, ids.

    Attributes:
        logprobs: how many of the likeliest ids are told beside each drawn one; None: nothing is told.
        beams: of a model that answers; the stream has several answers then.
        prediction: what may follow, which is verified as a draft.
    """

    prompt: bytes
    max_bytes: int = DEFAULT_MAX_BYTES
    min_bytes: int = 0
    stop: tuple[bytes, ...] = ()
    sampling: Sampling = Sampling()
    sentinels: bool = False
    logprobs: int | None = None
    beams: Beams | None = None
    prediction: bytes = b""

    @property
    def choices(self) -> int:
        """Answers that the stream will have."""
        return 1 if self.beams is None else self.beams.answers


def read_ask(fields: Fields, served: Served, prompt: bytes, longest: tuple[str, ...] = ("max_tokens",)) -> Ask:
    """The fields of sampling and length, for one prompt.

    Args:
        longest: names of the field that counts bytes, of which one may be given.

    Raises:
        Refusal: 400: a value that cannot be, or that the model has no use for.
    """
    given = [fields.whole(name, -1, 0, (1 << 31) - 1) for name in longest]
    if sum(value >= 0 for value in given) > 1:
        raise bad(f"{' and '.join(longest)} say the same; give one", longest[0])
    most = max(given) if max(given) >= 0 else min(DEFAULT_MAX_BYTES, served.max_bytes)
    least = fields.whole("min_tokens", 0, 0, (1 << 31) - 1)
    seed = fields.whole("seed", -1, 0, (1 << 64) - 1)
    sampling = settings(
        lambda: Sampling(
            temperature=fields.number("temperature", 0.0),
            top_k=max(fields.whole("top_k", 0, -1, (1 << 31) - 1), 0),  # -1 is how other servers write all
            top_p=fields.number("top_p", 1.0),
            min_p=fields.number("min_p", 0.0),
            seed=seed if seed >= 0 else secrets.randbits(FRESH_SEED_BITS),
        )
    )
    prediction = read_prediction(fields.take("prediction"))
    ask = Ask(prompt, most, least, fields.stops(), sampling, fields.flag("sentinels"), prediction=prediction)
    check_fits(ask, served)
    return ask


def read_prediction(value: Any) -> bytes:
    """What may follow: OpenAI's {"type": "content", "content": ..}, whose content is bytes in any form, or parts of text."""
    if value is None:
        return b""
    if not isinstance(value, dict) or value.get("type") != "content" or not value.keys() <= {"type", "content"}:
        raise bad(f'prediction: expected {{"type": "content", "content": ..}}, found {describe(value)}', "prediction")
    content = value.get("content")
    if isinstance(content, list) and content and isinstance(content[0], dict):
        texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
        return b"".join(bytes_of(text, "prediction") for text in texts)
    return bytes_of(content, "prediction")


def check_fits(ask: Ask, served: Served) -> None:
    """See that the model has room and a use for what is asked.

    Raises:
        Refusal: 400.
    """
    if len(ask.prompt) > served.max_bytes:
        raise bad(
            f"the prompt has {len(ask.prompt):,} bytes, but the model reads {served.max_bytes:,}; give the last ones", "prompt"
        )
    if served.answers:
        if ask.max_bytes > served.max_bytes:
            raise bad(f"max_tokens: an answer has at most {served.max_bytes:,} bytes, found {ask.max_bytes:,}", "max_tokens")
        if ask.min_bytes > ask.max_bytes:
            raise bad(f"min_tokens: {ask.min_bytes:,} are more than max_tokens ({ask.max_bytes:,})", "min_tokens")
    elif ask.min_bytes:
        raise bad("min_tokens: has a meaning for models that answer; this one continues bytes", "min_tokens")
    if len(ask.prediction) > served.max_bytes:
        raise bad(f"prediction: {len(ask.prediction):,} bytes, more than the model's {served.max_bytes:,}", "prediction")
    if ask.prediction and not served.speculation.most:
        raise bad("prediction: this server verifies no drafts (--speculate off); leave it out", "prediction")
    if ask.sentinels and not served.has_sentinels:
        raise bad("sentinels: this model has no ids beside bytes; leave it out", "sentinels")


def several(ask: Ask, count: int) -> list[Ask]:
    """So many streams of one prompt, each with a seed of its own: the first has the request's."""
    seeds = [(ask.sampling.seed + number) % (1 << 64) for number in range(count)]
    return [replace(ask, sampling=replace(ask.sampling, seed=seed)) for seed in seeds]


def settings(make: Callable[[], T]) -> T:
    """What `make` returns; a setting that the engine does not take is a refusal."""
    try:
        return make()
    except UsageError as error:
        raise bad(str(error)) from None
