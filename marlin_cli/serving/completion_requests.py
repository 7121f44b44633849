"""The bodies of `/v1/completions` and `/v1/chat/completions`: checked, and made into what streams are asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from marlin_cli.config import describe
from marlin_cli.engine.beams import Beams
from marlin_cli.serving.asks import MOST_BEAMS, MOST_CHOICES, Ask, check_fits, read_ask, settings, several
from marlin_cli.serving.fields import Fields, bytes_of
from marlin_cli.serving.refusals import Refusal, bad
from marlin_cli.serving.served import Served
from marlin_cli.text import quoted

# The likeliest ids told beside each drawn one; a byte has 256.
MOST_LOGPROBS = 20

# Log-probabilities of an answer that is told whole: some 100 bytes of memory each, until all are there.
MOST_TOLD = 1 << 20
# Bytes of answers that are told whole, of streams that no context ends.
MOST_WHOLE = 1 << 24

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class CompletionRequest:
    """What a body asks for.

    Attributes:
        asks: a stream each; choices are in their order, those of the first prompt first.
        count: streams of each prompt.
        include_usage: is there a last event with the counts?
        return_token_ids: are the bytes told as ints too?
    """

    asks: tuple[Ask, ...]
    count: int
    stream: bool
    include_usage: bool
    echo: bool = False
    return_token_ids: bool = False
    chat: bool = False


def read_completion(document: Any, served: Served) -> CompletionRequest:
    """The body of `/v1/completions`.

    Raises:
        Refusal: 400 or 404, with a reason.
    """
    fields = Fields(document)
    _check_model(fields, served)
    given = fields.take("prompt")
    logprobs = fields.whole("logprobs", -1, 0, MOST_LOGPROBS)
    stream, include_usage = _streaming(fields)
    echo, return_token_ids = fields.flag("echo"), fields.flag("return_token_ids")
    ask = replace(read_ask(fields, served, b""), logprobs=logprobs if logprobs >= 0 else None)
    count, beams = _choices(fields, served, ask, stream)
    fields.finish()
    prompts = _prompts(given)
    if echo and served.answers:
        raise bad("echo: this model answers a prompt and does not continue it; leave it out", "echo")
    if echo and logprobs >= 0:
        raise bad("echo: log-probabilities are told of new bytes alone; leave out echo or logprobs", "echo")
    asks: list[Ask] = []
    for prompt in prompts:
        each = replace(ask, prompt=prompt, beams=beams)
        check_fits(each, served)
        asks += [each] if beams is not None else several(each, count)
    if len(prompts) * count > MOST_CHOICES:
        raise bad(f"n: {len(prompts)} prompts with {count} choices are more than {MOST_CHOICES}", "n")
    _check_told(asks, served, stream)
    return CompletionRequest(tuple(asks), len(asks) // len(prompts), stream, include_usage, echo, return_token_ids)


def read_chat(document: Any, served: Served) -> CompletionRequest:
    """The body of `/v1/chat/completions`.

    Raises:
        Refusal: 400 or 404, with a reason.
    """
    fields = Fields(document)
    _check_model(fields, served)
    if served.template is None:
        raise bad(
            "this model has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json, in its folder);"
            " ask /v1/completions"
        )
    messages = _messages(fields.take("messages"))
    stream, include_usage = _streaming(fields)
    wanted, top = fields.flag("logprobs"), fields.whole("top_logprobs", 0, 0, MOST_LOGPROBS)
    if top and not wanted:
        raise bad("top_logprobs: needs logprobs: true", "top_logprobs")
    return_token_ids = fields.flag("return_token_ids")
    prompt = served.template.prompt_of(messages, served.max_bytes)
    ask = read_ask(fields, served, prompt, ("max_tokens", "max_completion_tokens"))
    ask = replace(ask, logprobs=top if wanted else None)
    count, beams = _choices(fields, served, ask, stream)
    fields.finish()
    asks = [replace(ask, beams=beams)] if beams is not None else several(ask, count)
    _check_told(asks, served, stream)
    return CompletionRequest(tuple(asks), len(asks), stream, include_usage, False, return_token_ids, chat=True)


def _check_model(fields: Fields, served: Served) -> None:
    name = fields.text("model")
    if name is not None and name != served.name:
        message = f"the model {quoted(name)} is not served here; this is {quoted(served.name)}"
        raise Refusal(404, message, parameter="model", code="model_not_found")


def _prompts(value: Any) -> list[bytes]:
    """One prompt, or a list of them: a string, a list of bytes as ints, or {"base64": ..} each."""
    if value is None:
        raise bad('prompt: is missing; give a string, a list of bytes as ints, {"base64": ..} or a list of these', "prompt")
    if not isinstance(value, list) or (value and not isinstance(value[0], (str, list, dict))):
        return [bytes_of(value, "prompt")]
    if not value:
        raise bad("prompt: an empty list; give at least one prompt", "prompt")
    if len(value) > MOST_CHOICES:
        raise bad(f"prompt: {len(value):,} prompts, more than {MOST_CHOICES} in a request", "prompt")
    return [bytes_of(each, f"prompt[{number}]") for number, each in enumerate(value)]


def _streaming(fields: Fields) -> tuple[bool, bool]:
    stream, options = fields.flag("stream"), fields.take("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise bad("stream_options: needs stream: true", "stream_options")
    inner = Fields(options)
    include_usage = inner.flag("include_usage")
    inner.flag("include_obfuscation")  # padding against listeners: loopback has none, and a proxy's TLS is the proxy's
    inner.finish()
    return stream, include_usage


def _choices(fields: Fields, served: Served, ask: Ask, stream: bool) -> tuple[int, Beams | None]:
    """How many choices each prompt has, and the beams that find them where there are any."""
    count = fields.whole("n", 1, 1, MOST_CHOICES)
    best_of, num_beams = fields.whole("best_of", 0, 1, MOST_BEAMS), fields.whole("num_beams", 0, 1, MOST_BEAMS)
    penalty = fields.number("length_penalty", 1.0)
    early: Any = fields.take("early_stopping")
    if best_of and num_beams and best_of != num_beams:
        raise bad("best_of and num_beams say the same; give one", "num_beams")
    beams = best_of or num_beams
    if early not in (None, True, False, "never"):
        raise bad(f'early_stopping: expected true, false or "never", found {describe(early)}', "early_stopping")
    if not served.answers:
        if beams > 1 and beams != count:
            name = "best_of" if best_of else "num_beams"
            raise bad(f"{name}: a model that continues bytes draws and does not search; ask for n", name)
        return count, None
    if beams < 2:
        return count, None
    if stream:
        raise bad("stream: of a search with beams nothing is known before its end; leave out stream or best_of", "stream")
    found = settings(lambda: Beams(beams, count, penalty, False if early is None else early))
    settings(lambda: served.request(replace(ask, beams=found)))
    return count, found


def _check_told(asks: Sequence[Ask], served: Served, stream: bool) -> None:
    """See that what is told whole fits in memory until it is."""
    told = written = 0
    for ask in asks:
        written += served.most_written(ask)
        told += 0 if ask.logprobs is None else (ask.logprobs + 1) * served.most_written(ask)
    if served.is_endless and written > MOST_WHOLE and not stream:
        raise bad(
            f"max_tokens: {written:,} bytes are more than {MOST_WHOLE:,} at once; take a stream, or ask for fewer", "max_tokens"
        )
    if told > MOST_TOLD and not stream:
        raise bad(
            f"logprobs: {told:,} log-probabilities are more than {MOST_TOLD:,} at once; take a stream, or ask for fewer",
            "logprobs",
        )


def _messages(value: Any) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not value:
        raise bad(f"messages: expected a list of at least one message, found {describe(value)}", "messages")
    messages: list[Mapping[str, Any]] = []
    for number, each in enumerate(value):
        where = f"messages[{number}]"
        if not isinstance(each, dict) or each.get("role") not in ROLES:
            raise bad(f"{where}: expected an object with a role out of {', '.join(ROLES)}, found {describe(each)}", "messages")
        messages.append({**each, "content": _content(each.get("content"), where)})
    return messages


def _content(value: Any, where: str) -> str:
    """The text of a message; parts of a list that are text are put together."""
    if value is None:
        return ""
    if isinstance(value, list):
        parts = [each.get("text") if isinstance(each, dict) and each.get("type") == "text" else None for each in value]
        if all(isinstance(part, str) for part in parts):
            return "".join(map(str, parts))
    if not isinstance(value, str):
        raise bad(f"{where}: content is text, or a list of parts of type text, found {describe(value)}", "messages")
    bytes_of(value, where)  # no halves of surrogate pairs
    return value
