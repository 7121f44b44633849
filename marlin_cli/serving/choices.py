"""Pieces of streams as OpenAI's choices: text, bytes as ints, log-probabilities, and why each ended."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from marlin_cli.engine.scheduling import Cost, Piece
from marlin_cli.engine.speculation import Speculated
from marlin_cli.serving.asks import Ask
from marlin_cli.serving.characters import Characters
from marlin_cli.serving.served import Served

# OpenAI's words for why an answer ends.
FINISH = {"length": "length", "context": "length"}


def finish_of(stop_reason: str | None) -> str | None:
    """OpenAI's word for a reason of the engine: a stop sequence and the model's own end are both a stop."""
    return None if stop_reason is None else FINISH.get(stop_reason, "stop")


@dataclass
class Choice:
    """One choice as it grows.

    Attributes:
        stop_reason: the engine's own word, once it has ended.
    """

    served: Served
    ask: Ask
    index: int
    chat: bool
    tell_ids: bool  # are the bytes told as ints too?
    stop_reason: str | None = None
    generated_bytes: int = 0
    speculated: Speculated | None = None
    _characters: Characters = field(default_factory=Characters)
    _told_prompt: bool = False

    def echo(self) -> str:
        """The prompt as text; a character that it leaves unfinished goes on in the answer."""
        return self._characters.push(self.ask.prompt)

    def push(self, pieces: Sequence[Piece], echoed: str = "") -> dict[str, Any]:
        """What is new of the choice after some pieces, as a choice of a completion; the last has its end.

        Args:
            echoed: text that goes before.
        """
        data = b"".join(piece.data for piece in pieces)
        costs = [cost for piece in pieces for cost in piece.costs]
        for piece in pieces:
            self.stop_reason = piece.stop_reason or self.stop_reason
            self.speculated = piece.speculated or self.speculated
        self.generated_bytes += len(data)
        offsets: list[int] = []
        text = echoed
        if costs and not self.chat:
            for cost in costs:
                offsets.append(self._characters.count)
                text += self._characters.push(self.served.bytes_of(cost.id))
        else:
            text += self._characters.push(data)
        if self.stop_reason is not None:
            text += self._characters.push(b"", final=True)
        return self._document(text, data, self._logprobs(costs, offsets))

    def answer(self, data: bytes, stop_reason: str, score: float, index: int) -> dict[str, Any]:
        """A choice that is known whole: one of several answers to one ask."""
        self.stop_reason, self.generated_bytes = stop_reason, self.generated_bytes + len(data)
        document = self._document(data.decode("utf-8", "replace"), data, None)
        self._told_prompt = False
        return {**document, "index": index, "score": score}

    def _document(self, text: str, data: bytes, logprobs: Any) -> dict[str, Any]:
        document: dict[str, Any] = {
            "index": self.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_of(self.stop_reason),
        }
        if self.stop_reason is not None:
            document |= {"stop_reason": self.stop_reason, "seed": self.ask.sampling.seed}
        if self.tell_ids:
            document["token_ids"] = list(data)
            if not self._told_prompt:
                document["prompt_token_ids"] = list(self.ask.prompt)
                self._told_prompt = True
        return document

    def _logprobs(self, costs: Sequence[Cost], offsets: Sequence[int]) -> dict[str, Any] | None:
        if self.ask.logprobs is None:
            return None
        token, bytes_of = self.served.token, self.served.bytes_of
        if self.chat:
            return {"content": [self._priced(cost.id, cost.log_probability, cost) for cost in costs], "refusal": None}
        return {
            "tokens": [token(cost.id) for cost in costs],
            "token_logprobs": [cost.log_probability for cost in costs],
            "top_logprobs": [{token(id): value for id, value in cost.likeliest} for cost in costs],
            "text_offset": list(offsets),
            "bytes": [list(bytes_of(cost.id)) for cost in costs],
        }

    def _priced(self, id: int, log_probability: float, cost: Cost | None = None) -> dict[str, Any]:
        """An id as chats tell it, with the likeliest ones beside it where `cost` has them."""
        priced = {"token": self.served.token(id), "bytes": list(self.served.bytes_of(id)), "logprob": log_probability}
        if cost is not None:
            priced["top_logprobs"] = [self._priced(other, value) for other, value in cost.likeliest]
        return priced


def as_chat_message(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice of a completion as one of a chat that is told whole."""
    rest = {name: value for name, value in choice.items() if name != "text"}
    return {**rest, "message": {"role": "assistant", "content": choice["text"], "refusal": None}}


def as_chat_delta(choice: dict[str, Any], *, first: bool) -> dict[str, Any]:
    """A choice of a completion as one of a chat that is told bit by bit."""
    rest = {name: value for name, value in choice.items() if name != "text"}
    delta = {**({"role": "assistant"} if first else {}), **({"content": choice["text"]} if choice["text"] or first else {})}
    return {**rest, "delta": delta}
