"""What `marlin bench --surprise` does once its options are read: one run over a stream, and its costliest lines."""

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlin_cli import console
from marlin_cli.bench.cost_files import CostFile, CostSink, LinesTo, NoFile
from marlin_cli.bench.line_costs import MOST_LINE_BYTES, Line
from marlin_cli.bench.surprise import FileSource, Source, Surprise, default_window, surprise
from marlin_cli.checkpoints import ImportOptions
from marlin_cli.commands.bench_format import Format
from marlin_cli.commands.pipes import PipeSource, stdin_descriptor
from marlin_cli.continuing_model import ContinuingModel
from marlin_cli.engine.endless import Window
from marlin_cli.errors import UsageError
from marlin_cli.files import kind_of_file
from marlin_cli.text import printable

# A pipe that gives nothing for so long: what is there is scored without the rest of its portion.
PAUSE_SECONDS = 0.2


@dataclass(frozen=True)
class SurpriseRequest:
    """What to score, and where it goes."""

    models: tuple[str, ...]
    input: str  # a file, or - for stdin
    window: Window | None  # None: what suits the model
    share_left: float | None
    kv_bits: int | tuple[int, int] | None
    activation_bits: int
    device: str
    options: ImportOptions | None  # what the model does not say
    top: int
    output: str | None
    form: Format | None
    resume: bool

    def __post_init__(self) -> None:
        if len(self.models) > 1:
            raise UsageError(f"--surprise scores by one model, found {len(self.models)}; name one")
        if self.resume and self.output is None:
            raise UsageError("--surprise --resume goes on beside its --output, whose name it needs")
        if self.form not in (None, Format.table, Format.json, Format.jsonl):
            raise UsageError(f"--surprise: --format {self.form.value} says nothing of a stream; take table, json or jsonl")
        if self.output is not None and self.form is Format.jsonl:
            raise UsageError("--format jsonl writes lines to stdout as they are scored; with --output its name tells the form")


def run(request: SurpriseRequest) -> None:
    """Score a stream, and tell what it cost.

    Raises:
        MarlinError: see `surprise`.
    """
    file = None if request.output is None else CostFile(Path(request.output))
    opened: contextlib.AbstractContextManager[Source]
    total = None
    if request.input == "-":
        opened = contextlib.nullcontext(PipeSource(stdin_descriptor(), PAUSE_SECONDS))
    else:
        if _is_empty(Path(request.input)):
            raise UsageError(f"--surprise {request.input}: is empty; there is nothing to score")
        opened = FileSource(Path(request.input))
        total = Path(request.input).stat().st_size or None
    with opened as source:
        _run(request, source, total, file)


def _is_empty(path: Path) -> bool:
    try:
        return path.is_file() and kind_of_file(path) == "empty"
    except OSError:  # which opening it says
        return False


def _run(request: SurpriseRequest, source: Source, total: int | None, file: CostFile | None) -> None:
    model = ContinuingModel.from_pretrained(
        request.models[0],
        device=request.device,
        kv_bits=request.kv_bits,
        activation_bits=request.activation_bits,
        options=request.options,
    )
    model = model.cached(request.window or default_window(model.config), request.share_left)
    live = request.form is Format.jsonl
    sink: CostSink = LinesTo(sys.stdout.buffer) if live else NoFile()
    with console.byte_progress("scoring", total) as progress:
        found = surprise(
            model, request.models[0], source, sink, request.top, file=file, resume=request.resume, on_bytes=progress.advance
        )
    if request.form is Format.json:
        print(json.dumps(as_mapping(found), allow_nan=False))
    else:
        _tell(found, model, to_stdout=not live)
    if file is not None:
        console.note(f"wrote {file.path}")


def as_mapping(found: Surprise) -> dict[str, Any]:
    """For JSON."""
    return {
        "model": found.model,
        "input": found.input,
        "bytes": found.bytes,
        "lines": found.lines,
        "bits_per_byte": found.bits_per_byte,
        "seconds": found.seconds,
        "bytes_per_second": found.bytes_per_second,
        "costliest": [{**line.as_mapping(), "text": _text_of(line)} for line in found.costliest],
    }


def _tell(found: Surprise, model: ContinuingModel, *, to_stdout: bool) -> None:
    window = model.cache_bits.window
    assert window is not None
    view = "the context read again" if window.bytes is None else f"{window.bytes:,} bytes in view"
    title = (
        f"{found.input} by {found.model}: {found.bytes:,} bytes, {found.lines:,} lines,"
        f" {found.bits_per_byte:.4f} bits per byte, {view}; {found.bytes_per_second:,.0f} bytes/s"
    )
    if found.costliest:
        title += f"\nthe {len(found.costliest)} costliest lines (pieces of {MOST_LINE_BYTES:,} bytes of longer ones)"
    rows = []
    for line in found.costliest:
        counts = [f"{count:,}" for count in (line.number, line.offset, line.length)]
        rows.append([_text_of(line), *counts, f"{line.bits:.1f}", f"{line.bits / line.length:.2f}"])
    console.table(title, ["text", "line", "offset", "bytes", "bits", "bits/byte"], rows, to_stdout=to_stdout)


def _text_of(line: Line) -> str:
    text = line.beginning.decode("utf-8", errors="replace").rstrip("\n")
    return printable(text if len(line.beginning) == line.length else f"{text}..")
