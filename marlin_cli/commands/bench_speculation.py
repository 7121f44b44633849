"""`marlin bench --speculate`: decoding with drafts and without, in turns, after one prompt; and what came of the drafts."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from marlin_cli.checkpoints import ImportOptions
from marlin_cli.engine.speculation import OFF, Speculation


def show_speculation(
    names: Sequence[str],
    speculation: Speculation,
    prompt: bytes,
    decode_bytes: int,
    repeats: int,
    imports: Mapping[str, ImportOptions],
    **options: Any,
) -> None:
    """Print a row a model. What is decoded has to be the same both ways.

    Args:
        imports: what models do not say, by their names.
        options: further ones of `api.load`.

    Raises:
        MarlinError: a model that cannot be read, or that verifies no drafts where these are asked for in any case.
    """
    from marlin_cli import console
    from marlin_cli.api import load
    from marlin_cli.models import decoding_of

    rows = []
    for name in names:
        model = load(name, options=imports.get(name), **options)
        pieces = _pieces_of(model, prompt[max(0, len(prompt) + decode_bytes - model.config.max_bytes) :], decode_bytes)
        patch_bytes = max(decoding_of(model.config).part_bytes(model.config).values(), default=1)
        best: dict[str, float] = {}  # seconds a byte after the first patch; none where nothing follows it
        outputs: dict[str, bytes] = {}
        told = None
        for repeat in range(repeats + 1):  # the first is not timed
            for way, wanted in (("off", OFF), ("on", speculation)):
                seconds, timed_bytes, outputs[way], told = _timed(pieces(wanted), patch_bytes)
                if repeat and timed_bytes:
                    best[way] = min(best.get(way, seconds / timed_bytes), seconds / timed_bytes)
        same = "yes" if outputs["on"] == outputs["off"] else "NO"
        count = len(outputs["on"])
        speeds = ["-", "-", "-"]
        if len(best) == 2:
            speeds = [f"{1 / best['off']:,.0f}", f"{1 / best['on']:,.0f}", f"{best['off'] / best['on']:.2f}"]
        drafts = ["-", "-", "-"] if told is None or not count else [
            f"{told.drafted_bytes:,}", f"{told.accepted_bytes:,}", f"{told.passes / count:.4f}"
        ]  # fmt: skip
        rows.append([name, *speeds, *drafts, same])
    title = f"Drafts after {len(prompt):,} bytes, {decode_bytes:,} decoded"
    columns = ["model", "bytes/s without", "with", "ratio", "drafted bytes", "accepted", "passes a byte", "same bytes"]
    console.table(title, columns, rows, to_stdout=True)


def _pieces_of(model: Any, prompt: bytes, count: int) -> Callable[[Speculation], Iterator[Any]]:
    """What decodes so many bytes after the prompt, or as the answer to it."""
    from marlin_cli.engine.answer_requests import AnswerLimits
    from marlin_cli.engine.sampling import Sampling
    from marlin_cli.engine.stopping import Stopping
    from marlin_cli.models import Capability

    stopping: Any = AnswerLimits(count) if model.capability is Capability.ANSWERS else Stopping(count)
    return lambda wanted: model.pieces([prompt], stopping, Sampling(), speculation=wanted)


def _timed(pieces: Iterator[Any], patch_bytes: int) -> tuple[float, int, bytes, Any]:
    """Seconds after the first patch, which comes at once, the bytes that came in them, all bytes, and what came of drafts."""
    data, told, start, before = b"", None, 0.0, 0
    for piece in pieces:
        data, told = data + piece.data, piece.speculated or told
        if not before and len(data) >= patch_bytes:
            start, before = time.perf_counter(), len(data)
    return time.perf_counter() - start, len(data) - before if before else 0, data, told
