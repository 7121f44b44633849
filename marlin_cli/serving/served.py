"""The model as the server sees it: its name, what it reads, and how its ids and requests are made. No array is touched here."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from marlin_cli.engine.answer_requests import AnswerLimits, AnswerRequest
from marlin_cli.engine.scheduling import Request
from marlin_cli.engine.speculation import OFF, Speculation
from marlin_cli.engine.stopping import Stopping
from marlin_cli.models import Capability
from marlin_cli.serving.chat_template import ChatTemplate

if TYPE_CHECKING:
    from marlin_cli.serving.asks import Ask


@dataclass(frozen=True)
class Served:
    """What is served.

    Attributes:
        name: what clients call the model.
        max_bytes: that a prompt may have, and of a model that continues bytes, prompt and continuation together.
        first_byte: id of the byte 0.
        text_of: (id) -> what stands in text for an id that is no byte; empty where nothing does.
        request: (ask) -> what the model's scheduler takes; raises `UsageError` for settings that do not go together.
        speculation: how streams are drafted ahead.
        template: how a chat is written down for the model; None where its folder has none.
        is_endless: does a stream go on beyond the model's context, so that `max_bytes` bounds prompts alone?
    """

    name: str
    title: str
    capability: Capability
    max_bytes: int
    first_byte: int
    has_sentinels: bool
    text_of: Callable[[int], bytes]
    request: Callable[["Ask"], Any]
    template: ChatTemplate | None = None
    speculation: Speculation = OFF
    is_endless: bool = False

    def most_written(self, ask: "Ask") -> int:
        """Bytes that may come of what is asked for, at most."""
        if self.is_endless:
            return ask.max_bytes
        return min(ask.max_bytes, self.max_bytes if self.answers else self.max_bytes - len(ask.prompt))

    @property
    def answers(self) -> bool:
        """Does it answer an input, rather than continue it?"""
        return self.capability is Capability.ANSWERS

    def token(self, id: int) -> str:
        """An id as text for people: a printable ASCII character, `bytes:\\xc3`, a sentinel, or its number."""
        byte = id - self.first_byte
        if 0 <= byte < 256:
            return chr(byte) if 32 <= byte < 127 or byte in b"\t\n\r" else f"bytes:\\x{byte:02x}"
        return self.text_of(id).decode("utf-8", "replace") or f"<id_{id}>"

    def bytes_of(self, id: int) -> bytes:
        """The bytes that an id stands for in an answer."""
        byte = id - self.first_byte
        return bytes([byte]) if 0 <= byte < 256 else self.text_of(id)

    def data_of(self, ids: Iterable[int], sentinels: bool) -> bytes:
        """The bytes of an answer's ids; those that are no bytes are left out unless `sentinels` stand for them."""
        low, high = self.first_byte, self.first_byte + 256
        return b"".join(self.bytes_of(id) for id in ids if sentinels or low <= id < high)


def continuing_request(ask: "Ask", speculation: Speculation = OFF) -> Any:
    """What the scheduler of a model that continues bytes takes."""
    stopping, drafted = Stopping(ask.max_bytes, ask.stop), replace(speculation, prediction=ask.prediction)
    return Request(ask.prompt, stopping, ask.sampling, ask.sentinels, ask.logprobs, drafted)


def answering_request(ask: "Ask", speculation: Speculation = OFF) -> Any:
    """What the scheduler of a model that answers takes; beams are not drafted."""
    limits = AnswerLimits(ask.max_bytes, ask.min_bytes, b"", ask.stop)
    drafted = OFF if ask.beams is not None else replace(speculation, prediction=ask.prediction)
    return AnswerRequest(ask.prompt, limits, ask.sampling, ask.beams, ask.sentinels, logprobs=ask.logprobs, speculation=drafted)
