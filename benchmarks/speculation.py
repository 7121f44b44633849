"""Speculation on the CPU: decoding with drafts over decoding without, on texts that repeat much and on such that do not.

    python benchmarks/speculation.py [--formats float32,nvfp4,mxfp8,int4] [--streams 1] [--files 4] [--bytes 2048] [--rounds 3]
        [--kinds edits,refactors,ordinary,binary,limit] [--corpus ../shared/corpus/heldout] [--parts megabyte,bytes,byt5,peer]
        [--clock wall]

Seconds are those of the clock, or with `--clock cpu` of the processor, where others use the machine too (MARLIN_THREADS=1).
The networks are random and write given texts (`scripted.py`), so that all costs are real, and how often drafts are right is
that of the texts. Rows are exact in both runs, whose bytes are compared. Rounds alternate; the least time of each counts.

- edits: the prompt is a file, and what is written the same file with 3 % of its lines changed.
- refactors: the same with two of its names changed wherever they stand.
- ordinary, binary: the prompt is the beginning of a file, and what is written its continuation: text, or machine code.
- limit: edits, with what will be written as the request's prediction.
- bytes: a bygpt5-small and an EvaByte of 70 M, without heads that draft (the noise that writes a text would make all of their
  guesses right; `heads` is that: eight heads, on ordinary text).
- byt5: a byt5-small restores the marks of letters that its input lacks (diacritics), or corrects one letter in forty (typos).
- peer: transformers' prompt lookup (10 tokens) on a decoder of bytes whose byte costs about as much, on the first edits.
"""

import argparse
import os
import random
import re
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("MARLIN_ROWS", "exact")

from many_streams import network_of  # noqa: E402 (rows are exact from the start)
from measured import Row, add_rows_option, report  # noqa: E402
from scripted import writing  # noqa: E402

from marlin_cli.engine.answer_requests import AnswerLimits, AnswerRequest  # noqa: E402
from marlin_cli.engine.sampling import Sampling  # noqa: E402
from marlin_cli.engine.schedulers import scheduler_of  # noqa: E402
from marlin_cli.engine.scheduling import Request, SchedulerLimits  # noqa: E402
from marlin_cli.engine.speculation import AUTO, OFF, Speculation  # noqa: E402
from marlin_cli.engine.stopping import Stopping  # noqa: E402
from marlin_cli.models import continuing_of  # noqa: E402
from marlin_cli.models.byt5_ids import FIRST_BYTE  # noqa: E402

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
STANDARD_LIBRARY = Path(os.__file__).parent


class Task(NamedTuple):
    """A prompt, and what is written after it."""

    prompt: bytes
    text: bytes


def edited(data: bytes, rng: random.Random) -> bytes:
    """A text with 3 % of its lines changed: a word replaced, the line left out, or one put before it."""
    lines = data.splitlines(keepends=True)
    for place in rng.sample(range(len(lines)), max(1, round(0.03 * len(lines)))):
        kind = rng.random()
        words = lines[place].split(b" ")
        words[rng.randrange(len(words))] = rng.choice([b"changed", b"other_value", b"x"])
        lines[place] = b" ".join(words) if kind < 0.6 else b"" if kind < 0.8 else b"    # a new line\n" + lines[place]
    return b"".join(lines)


def refactored(data: bytes, rng: random.Random) -> bytes:
    """A text in which two of its common names have others."""
    names = re.findall(rb"\b[a-z_]{4,12}\b", data)
    common = sorted(set(names), key=lambda name: (-names.count(name), name))[:12]
    for name in rng.sample(common, min(2, len(common))):
        data = re.sub(rb"\b" + name + rb"\b", b"new_" + name, data)
    return data


def tasks_of(kind: str, corpus: Path, files: int, length: int) -> list[Task]:
    """Tasks out of a corpus, or of the standard library where there is none."""
    rng = random.Random(kind)
    folder = corpus / ("binary/elf_x86_64" if kind == "binary" else "code")
    pattern = "*"
    if not folder.is_dir():
        folder, pattern = STANDARD_LIBRARY, "lib-dynload/*.so" if kind == "binary" else "*.py"
    found = [path for path in sorted(folder.rglob(pattern)) if path.is_file() and path.stat().st_size > 2 * length + 1024]
    tasks = []
    for path in rng.sample(found, min(files, len(found))):
        data = path.read_bytes()
        start = rng.randrange(len(data) - 2 * length)
        part = data[start : start + length]
        if kind in ("ordinary", "binary"):
            tasks.append(Task(part[: length // 2], data[start + length // 2 : start + length // 2 + length]))
        else:
            tasks.append(Task(part, (edited if kind in ("edits", "limit") else refactored)(part, rng)))
    return tasks


def run(scheduler: Any, requests: Sequence[Any], clock: Callable[[], float]) -> tuple[float, list[bytes], list[Any]]:
    """Seconds from when every prompt is read; what was written, and what came of drafts."""
    order = [scheduler.admit(request) for request in requests]
    data, told = dict.fromkeys(order, b""), []
    begun: set[int] = set()
    start = clock()
    while scheduler.running or scheduler.waiting:
        for piece in scheduler.advance():
            if piece.stream not in begun:
                begun.add(piece.stream)
                start = clock() if len(begun) == len(requests) else start
            data[piece.stream] += piece.data
            told += [piece.speculated] if piece.speculated else []
    return clock() - start, [data[number] for number in order], told


Requests = Callable[[Task, int, Speculation], Any]


def compared(
    network: Any, tasks: Sequence[Task], requests: Requests, streams: int, rounds: int, clock: str, first_byte: int = 0
) -> str:
    """The gain of drafts over none, both ways in turns, and what came of them.

    Args:
        first_byte: id of byte 0.
    """
    gains, drafted, accepted, passes, written = [], 0, 0, 0, 0
    seconds = {"off": 0.0, "on": 0.0}
    for first in range(0, len(tasks), streams):
        group = tasks[first : first + streams]
        with writing([[byte + first_byte for byte in task.text] for task in group]):
            best: dict[str, float] = {}
            outputs: dict[str, list[bytes]] = {}
            for _ in range(rounds):
                for name, speculation in (("off", OFF), ("on", AUTO)):
                    asked = [requests(task, number, speculation) for number, task in enumerate(group)]
                    limits = SchedulerLimits(max_streams=len(group))
                    took, outputs[name], told = run(scheduler_of(network, limits), asked, CLOCKS[clock])
                    best[name] = min(best.get(name, took), took)
        assert outputs["on"] == outputs["off"] == [task.text for task in group], "drafts have changed bytes"
        gains.append(best["off"] / best["on"])
        seconds = {name: seconds[name] + best[name] for name in seconds}
        drafted, accepted = drafted + sum(t.drafted_bytes for t in told), accepted + sum(t.accepted_bytes for t in told)
        passes, written = passes + sum(t.passes for t in told), written + sum(len(task.text) for task in group)
    return (
        f"{seconds['off'] / seconds['on']:.2f}x ({min(gains):.2f} to {max(gains):.2f}), {written / seconds['on']:.0f} bytes/s"
        f" against {written / seconds['off']:.0f}; {accepted / written:.0%} of the bytes accepted,"
        f" {accepted / max(1, drafted):.0%} of those drafted, {passes / written:.4f} passes a byte; bytes equal"
    )


def continuing(task: Task, number: int, speculation: Speculation) -> Request:
    return Request(task.prompt, Stopping(len(task.text)), Sampling(1.0, seed=number), speculation=speculation)


def predicted(task: Task, number: int, speculation: Speculation) -> Request:
    known = Speculation(speculation.most, speculation.adapts, task.text) if speculation.most else speculation
    return Request(task.prompt, Stopping(len(task.text)), Sampling(1.0, seed=number), speculation=known)


def answering(task: Task, number: int, speculation: Speculation) -> AnswerRequest:
    limits = AnswerLimits(len(task.text), len(task.text))
    return AnswerRequest(task.prompt, limits, Sampling(1.0, seed=number), speculation=speculation)


def byt5_tasks(kind: str, corpus: Path, files: int, length: int) -> list[Task]:
    """Inputs, and their answers: letters whose marks come back, or a letter in forty that was another."""
    rng = random.Random(kind)
    texts = [
        p.read_bytes() for p in sorted((corpus / "multilingual").rglob("*")) if p.is_file() and p.stat().st_size > 4 * length
    ]
    found = []
    for data in texts:
        text = data[: 4 * length].decode("utf-8", "ignore")
        bare = "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))
        share = sum(one != other for one, other in zip(text, bare, strict=False)) / max(1, len(text))
        if len(bare) == len(text) and bare.encode().isascii() is False and share < 0.01:
            continue  # another script
        if kind == "diacritics" and len(bare) == len(text) and share > 0.03:
            found.append((text, bare))
        if kind == "typos":
            typed = "".join(
                rng.choice("abcdefghij") if c.isascii() and c.isalpha() and rng.random() < 1 / 40 else c for c in text
            )
            found.append((text, typed))
    tasks = []
    for text, given in rng.sample(found, min(files, len(found))):
        count = length // 2
        tasks.append(Task(given[:count].encode(), text[:count].encode()))
    return tasks


def byt5_of(format: str) -> Any:
    from marlin_cli.models.byt5 import ByT5
    from marlin_cli.models.byt5_config import ByT5Config

    return random_packed(
        ByT5(ByT5Config(d_model=1472, ffn_dim=3584, heads=6, head_dim=64, encoder_layers=12, decoder_layers=4, max_bytes=4096)),
        format,
    )


def random_packed(network: Any, format: str) -> Any:
    """A network of random weights, in a format."""
    import mlx.core as mx
    from mlx.utils import tree_map

    from marlin_cli.quantization.apply import quantize_network
    from marlin_cli.quantization.plan import QuantizationSettings

    mx.random.seed(0)
    network.update(
        tree_map(lambda a: mx.random.normal(a.shape) * (1 if a.ndim == 1 else a.shape[-1] ** -0.5), network.parameters())
    )
    mx.eval(network.parameters())
    if format == "float32":
        return network
    settings = QuantizationSettings(**{f"{part}_format": format for part in ("encoder", "decoder", "cross", "wo", "global")})
    return quantize_network(network, settings).network


def networks_by_bytes(format: str) -> Iterator[tuple[str, Any, Sequence[str]]]:
    """Networks that take bytes one by one: names, themselves, and kinds of tasks."""
    from marlin_cli.models.bygpt5 import ByGPT5, ByGPT5Config
    from marlin_cli.models.evabyte import EvaByte, EvaByteConfig

    yield "ByGPT5", random_packed(ByGPT5(ByGPT5Config(max_bytes=8192)), format), ("edits", "ordinary")
    sizes: dict[str, Any] = {"d_model": 1024, "ffn_dim": 2752, "heads": 8, "layers": 6, "max_bytes": 8191}
    for heads, kinds in ((1, ("edits", "ordinary")), (8, ("heads",))):
        yield "EvaByte", random_packed(EvaByte(EvaByteConfig(**sizes, prediction_heads=heads)), format), kinds


def peer_gain(tasks: Sequence[Task], rounds: int, clock: Callable[[], float]) -> str:
    """transformers' decoder with prompt lookup over the same without, on the same texts."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("MARLIN_THREADS", len(os.sched_getaffinity(0)))))
    config = LlamaConfig(
        vocab_size=256, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8,
        max_position_embeddings=16384, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()

    class Scripted(LogitsProcessor):
        def __init__(self, start: int, text: bytes) -> None:
            self._start, self._text = start, text

        def __call__(self, ids: Any, scores: Any) -> Any:
            place = ids.shape[1] - self._start
            scores[:, self._text[place] if place < len(self._text) else 0] = 1e6
            return scores

    totals = {"off": 0.0, "on": 0.0}
    written = 0
    for task in tasks:
        ids = torch.tensor([list(task.prompt)])
        best: dict[str, float] = {}
        for _ in range(rounds):
            for name, more in (("off", {}), ("on", {"prompt_lookup_num_tokens": 10})):
                rules = LogitsProcessorList([Scripted(len(task.prompt), task.text)])
                with torch.no_grad():
                    start = clock()
                    model.generate(ids, max_new_tokens=1, do_sample=False, logits_processor=rules)
                    reading = clock() - start
                    start = clock()
                    out = model.generate(ids, max_new_tokens=len(task.text), do_sample=False, logits_processor=rules, **more)
                    took = clock() - start - reading
                assert bytes(out[0, len(task.prompt) :].tolist()) == task.text
                best[name] = min(best.get(name, took), took)
        totals = {name: totals[name] + best[name] for name in totals}
        written += len(task.text)
    return f"{totals['off'] / totals['on']:.2f}x, {written / totals['on']:.0f} bytes/s against {written / totals['off']:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="float32,nvfp4,mxfp8,int4")
    parser.add_argument("--kinds", default="edits,refactors,ordinary,binary,limit")
    parser.add_argument("--parts", default="megabyte,byt5,peer")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--bytes", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--corpus", type=Path, default=Path("../shared/corpus/heldout"))
    add_rows_option(parser)
    options = parser.parse_args()
    for format in options.formats.split(","):
        if "megabyte" in options.parts:
            network = network_of(format)
            for kind in options.kinds.split(","):
                tasks = tasks_of(kind, options.corpus, options.files, options.bytes)
                requests = predicted if kind == "limit" else continuing
                gain = compared(network, tasks, requests, options.streams, options.rounds, options.clock)
                what = f"speculation, {kind}, {format}, {options.streams} streams"
                report(Row(what, gain, "marlin without drafts", gain.partition(" ")[0], "bytes equal"), options.rows_file)
        if "bytes" in options.parts:
            for name, network, kinds in networks_by_bytes(format):
                for kind in kinds:
                    tasks = tasks_of("ordinary" if kind == "heads" else kind, options.corpus, options.files, options.bytes)
                    first_byte = continuing_of(network).first_byte
                    gain = compared(network, tasks, continuing, options.streams, options.rounds, options.clock, first_byte)
                    what = f"speculation, {name} {kind}, {format}, {options.streams} streams"
                    report(Row(what, gain, "marlin without drafts", gain.partition(" ")[0], "bytes equal"), options.rows_file)
        if "byt5" in options.parts:
            network = byt5_of(format)
            for kind in ("diacritics", "typos"):
                tasks = byt5_tasks(kind, options.corpus, options.files, options.bytes // 4)
                gain = compared(network, tasks, answering, options.streams, options.rounds, options.clock, FIRST_BYTE)
                what = f"speculation, ByT5 {kind}, {format}, {options.streams} streams"
                report(Row(what, gain, "marlin without drafts", gain.partition(" ")[0], "ids equal"), options.rows_file)
    if "peer" in options.parts:
        tasks = tasks_of("edits", options.corpus, options.files, options.bytes)
        gain = peer_gain(tasks, options.rounds, CLOCKS[options.clock])
        report(Row("prompt lookup, edits, float32", "-", f"transformers {gain}", gain.partition(",")[0], "bytes equal"), None)


if __name__ == "__main__":
    main()
