"""`marlin bench --speculate`: decoding with drafts and without, in turns, after one prompt; and what came of the drafts."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from marlin_cli.engine.speculation import OFF, Speculation


def show_speculation(
    names: Sequence[str],
    speculation: Speculation,
    prompt: bytes,
    decode_bytes: int,
    repeats: int,
    **options: Any,
) -> None:
    """Print a row a model. What is decoded has to be the same both ways.

    Args:
        options: of `api.load`.

    Raises:
        MarlinError: a model that cannot be read, or that verifies no drafts where these are asked for in any case.
    """
    from marlin_cli import console
    from marlin_cli.api import load

    rows = []
    for name in names:
        model = load(name, **options)
        pieces = _pieces_of(model, prompt[max(0, len(prompt) + decode_bytes - model.config.max_bytes) :], decode_bytes)
        best: dict[str, float] = {}
        outputs: dict[str, bytes] = {}
        told = None
        for repeat in range(repeats + 1):  # the first is not timed
            for way, wanted in (("off", OFF), ("on", speculation)):
                seconds, outputs[way], told = _timed(pieces(wanted))
                if repeat:
                    best[way] = min(best.get(way, seconds), seconds)
        same = "yes" if outputs["on"] == outputs["off"] else "NO"
        count = len(outputs["on"])
        speeds = [count / max(best[way], 1e-9) for way in ("off", "on")]
        drafts = ["-", "-", "-"] if told is None or not count else [
            f"{told.drafted_bytes:,}", f"{told.accepted_bytes:,}", f"{told.passes / count:.4f}"
        ]  # fmt: skip
        rows.append([name, *(f"{speed:,.0f}" for speed in speeds), f"{speeds[1] / speeds[0]:.2f}", *drafts, same])
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


def _timed(pieces: Iterator[Any]) -> tuple[float, bytes, Any]:
    """Seconds after the first piece, the bytes, and what came of drafts."""
    first = next(pieces)
    start = time.perf_counter()
    data, told = first.data, first.speculated
    for piece in pieces:
        data, told = data + piece.data, piece.speculated or told
    return time.perf_counter() - start, data, told
