"""What `marlin generate` does with ByT5: one answer as it is decoded, or inputs in batches and answers in their order."""

import base64
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from marlin_cli import console
from marlin_cli.answering_model import AnsweringModel
from marlin_cli.api import decode
from marlin_cli.commands.pipes import as_they_come, lines_of_pipe
from marlin_cli.commands.prompts import Prompt, one_prompt, read_prompts
from marlin_cli.commands.writers import TerminalView, is_viewed, write_stream
from marlin_cli.engine.answer_requests import Answer, AnswerLimits
from marlin_cli.engine.beams import Beams
from marlin_cli.engine.sampling import Sampling
from marlin_cli.errors import UsageError
from marlin_cli.models.byt5_ids import bytes_with_sentinels


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


def run(model: AnsweringModel, request: Request, inputs: Iterable[Prompt], batch_size: int) -> None:
    """Answer inputs and write the answers, the n best of an input one after the other.

    The only answer to the only input goes out byte by byte, but for beams, which are not known before their end.
        A batch is what has come, `batch_size` at most: a slow pipe is answered line by line.
    """
    most_bytes = model.config.max_bytes - len(request.input_prefix)

    def checked(prompt: Prompt) -> Prompt:
        prompt.check_fits(most_bytes)
        return prompt

    if isinstance(inputs, list) and len(inputs) == 1 and request.beams is None and not request.json:
        data = request.input_prefix + checked(inputs[0]).data
        pieces = model.pieces([data], request.limits, request.sampling, sentinels=request.sentinels)
        summary = write_stream(pieces, raw=request.raw, ends_line=True)
        console.note_to_terminal(f"{len(data)} bytes in, {summary}, on {model.device.name}")
        return
    index = 0
    for batch in as_they_come(map(checked, inputs), batch_size):
        inputs_of_batch = [request.input_prefix + each.data for each in batch]
        found = model.answers(inputs_of_batch, request.limits, request.sampling, request.beams, sentinels=request.sentinels)
        for prompt, answers in zip(batch, found, strict=True):
            for each in answers:
                data = bytes_with_sentinels(each.ids) if request.sentinels else each.data
                if request.json:
                    line = json.dumps(_document(index, prompt, each, data), ensure_ascii=True, allow_nan=False).encode("ascii")
                else:
                    line = TerminalView.whole(data) if is_viewed(raw=request.raw) else data
                sys.stdout.buffer.write(line + b"\n")
            index += 1
        sys.stdout.buffer.flush()


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
    }
