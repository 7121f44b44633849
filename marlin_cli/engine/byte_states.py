"""What ByT5's encoder makes of inputs: states and labelled spans. An input gives the same alone and in a batch."""

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.engine.encoder_decoder import encode
from marlin_cli.engine.finite import finite
from marlin_cli.engine.spans import OUTSIDE, Place, Span, labelled_runs, softmax
from marlin_cli.errors import UsageError
from marlin_cli.models import architecture_of
from marlin_cli.models.byt5 import ByT5
from marlin_cli.models.byt5_ids import ids_of_bytes, padded

# Positions in one pass, filler included: bounds the memory of activations.
POSITIONS_AT_ONCE = 1 << 14

END_MARK = "</s>"  # as transformers' tokenizer has it


def states(network: ByT5, inputs: Sequence[bytes]) -> Iterator[mx.array]:
    """The encoder's states of each input, its end's included: [states, d_model] float32."""
    for batch in _batches([[*ids_of_bytes(data), network.config.end_id] for data in inputs]):
        ids, lengths = padded(batch, network.config.pad_id)
        rows = encode(network, ids, lengths).astype(mx.float32)
        real = None if lengths is None else network.state_lengths(lengths)
        mx.eval(rows)
        counts: list[int] = [rows.shape[1]] * len(batch) if real is None else real.tolist()  # type: ignore[assignment]
        for row, count in zip(rows, counts, strict=True):
            yield row[:count]


def tag(network: ByT5, inputs: Sequence[bytes], *, outside: Sequence[str] = OUTSIDE, merge: bool = True) -> list[list[Span]]:
    """The labelled spans of each input; see `engine.spans.labelled_runs`.

    A span may begin or end within a character: its characters are those of which it holds a byte. Where the bytes are no
    UTF-8, characters are counted by the bytes that would begin one.

    Raises:
        UsageError: the network does not label bytes.
    """
    config = network.config
    if not config.labels:
        does = "answers an input" if config.decoder_layers else "encodes"
        raise UsageError(f"this {architecture_of(network).title} {does}; what was asked for needs one that labels bytes")
    found = []
    for data, rows in zip(inputs, states(network, inputs), strict=True):
        scores = softmax(finite(np.array(network.label_scores(rows)))[: len(data)])
        held_by = character_of_bytes(data)
        found.append([
            Span(run.label, run.score, run.first, run.end, int(held_by[run.first]), int(held_by[run.end - 1]) + 1)
            for run in labelled_runs(config.labels, scores, outside, merge)
        ])  # fmt: skip
    return found


def rows_of(network: ByT5, ids: int) -> int:
    """How many states an input of so many ids has."""
    return -(-ids // network.ids_in_state)


def places(network: ByT5, data: bytes) -> list[Place]:
    """What each state of an input stands for: a byte, or several where a front end joins them; then the end."""
    joined = network.ids_in_state
    held_by = character_of_bytes(data)
    found = []
    for first in range(0, len(data) + 1, joined):
        end = min(first + joined, len(data))
        if first == end:
            found.append(Place(END_MARK))
        else:
            found.append(Place(None, first, end, int(held_by[first]), int(held_by[end - 1]) + 1))
    return found


def character_of_bytes(data: bytes) -> npt.NDArray[np.int64]:
    """The number of the character that each byte is of: [bytes]."""
    begins = (np.frombuffer(data, dtype=np.uint8) & 0xC0) != 0x80
    return np.maximum(np.cumsum(begins) - 1, 0)


def _batches(sources: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    """Inputs in their order, as many at once as fit beside the longest of them."""
    start, longest = 0, 0
    for index, source in enumerate(sources):
        longest = max(longest, len(source))
        if index > start and longest * (index + 1 - start) > POSITIONS_AT_ONCE:
            yield sources[start:index]
            start, longest = index, len(source)
    if sources:
        yield sources[start:]
