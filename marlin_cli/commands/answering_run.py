"""What `marlin generate` does with ByT5: one answer as it is decoded, or inputs in batches and answers in their order."""

import base64
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from marlin_cli import console
from marlin_cli.answering_model import AnsweringModel
from marlin_cli.api import decode
from marlin_cli.commands.leading import SLICE_ROWS, LeadingAnswers
from marlin_cli.commands.pipes import Arriving, lines_of_pipe
from marlin_cli.commands.prompts import Prompt, one_prompt, read_prompts
from marlin_cli.commands.speculation_options import as_mapping
from marlin_cli.commands.writers import TerminalView, is_viewed, write_stream
from marlin_cli.engine.answer_requests import Answer, AnswerLimits, AnswerPiece, AnswerRequest
from marlin_cli.engine.answer_scheduler import AnsweringScheduler
from marlin_cli.engine.beams import Beams
from marlin_cli.engine.finite import not_finite
from marlin_cli.engine.fused_answers import fuse_answers
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.scheduling import NOT_FINITE, Scheduler, SchedulerLimits
from marlin_cli.engine.speculation import Speculation
from marlin_cli.errors import UsageError
from marlin_cli.models.byt5_ids import bytes_with_sentinels

# Inputs that may be ahead of the first that is not answered yet, in times of those that are answered at once: the order stays.
MOST_AHEAD = 8


@dataclass(frozen=True)
class Request:
    """How inputs are answered, and how answers are written.

    Raises:
        UsageError: beams that would be sampled.
    """

    limits: AnswerLimits
    sampling: Sampling
    beams: Beams | None
    input_prefix: bytes  # goes before every input
    sentinels: bool
    json: bool  # one object an answer, else its bytes and a line feed
    raw: bool = False  # bytes as they are, on a terminal too
    speculation: Speculation = field(default_factory=Speculation)

    def __post_init__(self) -> None:
        if self.beams is not None and self.sampling.temperature:
            raise UsageError("--beams and a --temperature above 0 do not go together; choose one")


def inputs_of(text: str | None, file: str | None, hexadecimal: str | None, prompts: str | None) -> Iterable[Prompt]:
    """One input by an option, those of a JSONL file, or the lines of a pipe, as they come.

    Raises:
        UsageError: two inputs, or one that cannot be read.
    """
    if prompts is not None:
        return read_prompts(prompts)
    piped = not (sys.stdin is None or sys.stdin.isatty())
    if text is None and file is None and hexadecimal is None and piped:
        return (Prompt(line, where=where) for where, line in lines_of_pipe(sys.stdin.fileno(), "stdin"))
    return [one_prompt(text, file, hexadecimal)]


def run(model: AnsweringModel | LeadingAnswers, request: Request, inputs: Iterable[Prompt], batch_size: int) -> None:
    """Answer inputs and write the answers, the n best of an input one after the other.

    The only answer to the only input goes out byte by byte, but for beams, which are not known before their end.
        Of others those that have come are answered side by side, `batch_size` at most; where the kernels take rows of inputs
        that stand at places of their own, one enters as another ends. A slow pipe is answered line by line.
    """
    most_bytes = model.config.max_bytes - len(request.input_prefix)

    def checked(prompt: Prompt) -> Prompt:
        prompt.check_fits(most_bytes)
        return prompt

    if isinstance(inputs, list) and len(inputs) == 1 and request.beams is None and not request.json:
        data = request.input_prefix + checked(inputs[0]).data
        pieces = model.pieces(
            [data], request.limits, request.sampling, sentinels=request.sentinels, speculation=request.speculation
        )
        summary = write_stream(pieces, raw=request.raw, ends_line=True)
        console.note_to_terminal(f"{len(data)} bytes in, {summary}, on {model.device.name}")
        return
    for index, prompt, answers in _answered(model, request, Arriving(map(checked, inputs), 4 * batch_size), batch_size):
        for each in answers:
            data = bytes_with_sentinels(each.ids) if request.sentinels else each.data
            if request.json:
                line = json.dumps(_document(index, prompt, each, data), ensure_ascii=True, allow_nan=False).encode("ascii")
            else:
                line = TerminalView.whole(data) if is_viewed(raw=request.raw) else data
            sys.stdout.buffer.write(line + b"\n")
        sys.stdout.buffer.flush()


def _answered(
    model: AnsweringModel | LeadingAnswers, request: Request, arriving: Arriving[Prompt], batch_size: int
) -> Iterator[tuple[int, Prompt, Sequence[Answer]]]:
    """Inputs by their numbers, and their answers, in order. One that cannot be read ends them when those before are answered.

    Where anything else ends them, those that are answered behind one that is not still come, if numbers are written too.
    """
    scheduler = _scheduler_of(model, batch_size)
    if scheduler is None:
        assert isinstance(model, AnsweringModel)
        count = 0
        while batch := arriving.take(batch_size, wait=True):
            inputs = [request.input_prefix + each.data for each in batch]
            found = model.answers(
                inputs, request.limits, request.sampling, request.beams, sentinels=request.sentinels,
                speculation=request.speculation,
            )  # fmt: skip
            yield from zip(range(count, count + len(batch)), batch, found, strict=True)
            count += len(batch)
        arriving.check()
        return
    # In their order, those that are answered and wait for one before them among them.
    prompts: deque[tuple[int, int, Prompt]] = deque()
    answered: dict[int, Sequence[Answer]] = {}
    count = 0
    try:
        while prompts or not arriving.over:
            room = MOST_AHEAD * batch_size - len(prompts)
            for prompt in arriving.take(room, wait=not prompts):
                asked = AnswerRequest(
                    request.input_prefix + prompt.data, request.limits, request.sampling, request.beams,
                    sentinels=request.sentinels, memory_bits=model.kv_bits, speculation=request.speculation,
                )  # fmt: skip
                prompts.append((scheduler.admit(asked), count, prompt))
                count += 1
            for piece in scheduler.advance():
                if piece.stop_reason == NOT_FINITE:
                    raise not_finite()
                if piece.stop_reason is not None:
                    assert isinstance(piece, AnswerPiece)
                    answered[piece.stream] = piece.answers
            while prompts and prompts[0][0] in answered:
                stream, index, prompt = prompts.popleft()
                yield index, prompt, answered.pop(stream)
    except (Exception, KeyboardInterrupt):
        if request.json:
            yield from ((index, prompt, answered[stream]) for stream, index, prompt in prompts if stream in answered)
        raise
    arriving.check()


def _scheduler_of(model: AnsweringModel | LeadingAnswers, batch_size: int) -> Scheduler[Any] | None:
    """What answers inputs that come and go: that of the ranks, or of the kernels; None where all go in step."""
    if isinstance(model, LeadingAnswers):
        return model.scheduler
    streams = fuse_answers(model.network)
    limits = SchedulerLimits(batch_size, slice_rows=SLICE_ROWS)
    return None if streams is None else AnsweringScheduler(model.network, limits, streams)


def _document(index: int, prompt: Prompt, answer: Answer, data: bytes) -> dict[str, object]:
    return {
        "index": index,
        **({} if prompt.name is None else {"id": prompt.name}),
        "rank": answer.rank,
        "prompt_bytes": len(prompt.data),
        "generated_bytes": len(data),
        "bytes_base64": base64.b64encode(data).decode("ascii"),
        "text": decode(data),
        "score": answer.score,
        "stop_reason": answer.stop_reason,
        **({} if answer.speculated is None else {"speculation": as_mapping(answer.speculated, len(data))}),
    }
