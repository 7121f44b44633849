"""Sentences of a stream of text by LA-CANINE, as wtpsplit finds them, in memory that does not grow with the text."""

import codecs
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.engine.finite import finite
from marlin_cli.engine.fused_canine import CanineRunner, runner_of
from marlin_cli.engine.spans import Span, sigmoid
from marlin_cli.errors import InputError, UsageError
from marlin_cli.models.canine_ids import Ids, padded_to
from marlin_cli.models.la_canine import PADDING, LaCanine

LABEL = "sentence"

# What Python's str.isspace says of single characters.
WHITESPACE = np.array([
    *range(0x09, 0x0E), *range(0x1C, 0x21), 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000,
])  # fmt: skip


@dataclass(frozen=True)
class SplitSettings:
    """How a text is cut; the defaults are those of wtpsplit.

    Raises:
        UsageError: a value out of its range.
    """

    threshold: float = 0.01  # a character with a score above it ends a sentence
    window_characters: int = 512  # read at once
    stride_characters: int = 64  # from the beginning of a window to that of the next; what overlaps is averaged
    windows_at_once: int = 32
    most_characters: int = 1 << 16  # a longer sentence is cut: what is held of a text must have an end

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UsageError(f"threshold must be from 0 to 1, found {self.threshold}")
        if not 0 < self.stride_characters <= self.window_characters:
            raise UsageError(f"stride must be from 1 to the window ({self.window_characters}), found {self.stride_characters}")
        if self.windows_at_once < 1:
            raise UsageError(f"windows_at_once must be at least 1, found {self.windows_at_once}")
        if self.most_characters < 1:
            raise UsageError(f"the longest sentence must be at least 1 character, found {self.most_characters}")


def sentences(
    network: LaCanine, pieces: Iterable[bytes], settings: SplitSettings, where: str = "the input"
) -> Iterator[tuple[Span, bytes]]:
    """The sentences of a stream of UTF-8, as soon as they are sure: where each lies, and its bytes.

    A sentence is sure when all windows that hold its end have been read; an empty piece is a pause, see `boundary_scores`.
    White space after a sentence belongs to it; all sentences together are the text. The score is that of the first
    character that ends the sentence, and of the last one where the text or `most_characters` ends it.

    Raises:
        InputError: the stream is no UTF-8; `where` begins the line.
        UsageError: a window that the network cannot read.
    """
    yield from sentences_of(boundary_scores(network, ids_of_pieces(pieces, where), settings), settings)


def sentences_of(
    scored: Iterable[tuple[Ids, npt.NDArray[np.float32]]], settings: SplitSettings
) -> Iterator[tuple[Span, bytes]]:
    """As `sentences`, of what `boundary_scores` gives."""
    builder = _Builder(settings)
    for ids, scores in scored:
        yield from builder.take(ids, scores)
    yield from builder.finish()


def ids_of_pieces(pieces: Iterable[bytes], where: str = "the input") -> Iterator[Ids]:
    """The characters of a stream, which may be cut within one; none for an empty piece.

    Raises:
        InputError: it is no UTF-8; `where` begins the line.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    taken = 0
    try:
        for piece in pieces:
            held = len(decoder.getstate()[0])
            text = decoder.decode(piece)
            taken += len(piece)
            if text or not piece:
                yield np.frombuffer(text.encode("utf-32-le"), dtype="<i4").astype(np.int32)
        held, piece = len(decoder.getstate()[0]), b""
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: is not UTF-8 ({error.reason} at byte {taken - held + error.start:,}); convert it first"
        ) from None


def boundary_scores(
    network: LaCanine, pieces: Iterable[Ids], settings: SplitSettings
) -> Iterator[tuple[Ids, npt.NDArray[np.float32]]]:
    """Characters in order, and for each the probability that it ends a sentence.

    Many windows are read at once where the stream has them. An empty piece says that the next one has to be waited for:
    what is sure by then comes before it.

    Windows overlap; the last one is moved back to end with the text. What they say is added and averaged in 16 bits,
    as wtpsplit does: it decides which scores lie above a threshold.
    """
    config, runner = network.config, runner_of(network)
    window, stride = settings.window_characters, settings.stride_characters
    if window > config.longest or window % config.downsample_factor:
        raise UsageError(
            f"the window must be a multiple of {config.downsample_factor} and at most {config.longest:,}, found {window}"
        )
    ids = np.zeros(0, dtype=np.int32)  # characters whose scores are not final
    sums = np.zeros(0, dtype=np.float16)
    counts = np.zeros(0, dtype=np.float16)
    start = 0  # of the next window, in ids
    stream = iter(pieces)
    ended = False
    while not ended:
        # Until it is sure that so many windows are not the last one.
        enough = start + window + (settings.windows_at_once - 1) * stride
        waiting = [ids]
        held = len(ids)
        while held <= enough and not ended:
            piece = next(stream, None)
            if piece is None:
                ended = True
            elif len(piece):
                waiting.append(piece)
                held += len(piece)
            elif held > start + window:
                break
        ids = np.concatenate(waiting)
        sums, counts = (np.append(each, np.zeros(held - len(each), dtype=np.float16)) for each in (sums, counts))
        starts = list(range(start, max(start, held - window), stride))
        if ended and held:
            starts.append(max(held - window, 0))
        for first in range(0, len(starts), settings.windows_at_once):
            some = starts[first : first + settings.windows_at_once]
            logits = _window_logits(runner, config.downsample_factor, [ids[at : at + window] for at in some])
            for at, row in zip(some, logits, strict=True):
                with np.errstate(over="ignore"):  # `finite` finds it
                    sums[at : at + window] += row[: len(sums) - at]
                counts[at : at + window] += np.float16(1)
        # No later window begins before the last one or with it.
        final = held if ended else starts[-1] + 1 if starts else 0
        if final:
            mean = finite((sums[:final] / counts[:final]).astype(np.float16).astype(np.float32))
            yield ids[:final], sigmoid(mean)
        ids, sums, counts = ids[final:], sums[final:], counts[final:]
        start = (starts[-1] + stride if starts else start) - final


def _window_logits(runner: CanineRunner, factor: int, windows: list[Ids]) -> npt.NDArray[np.float32]:
    """Scores [windows, longest] of a sentence's end, before a sigmoid; all windows but a text's only one are equally long."""
    longest = max(len(window) for window in windows)
    length = -(-longest // factor) * factor
    lengths = mx.array([len(window) for window in windows]) if length != min(len(window) for window in windows) else None
    return finite(np.array(runner(padded_to(windows, length, PADDING), lengths, None)[:, :longest, 0]))


class _Builder:
    """Cuts characters where their scores say so."""

    def __init__(self, settings: SplitSettings) -> None:
        self._settings = settings
        self._parts: list[Ids] = []  # of the open sentence
        self._held = 0  # its characters
        self._score: float | None = None  # of its end, where that has been seen and white space may follow
        self._last_score = 0.0
        self._character = self._byte = 0  # where it begins

    def take(self, ids: Ids, scores: npt.NDArray[np.float32]) -> Iterator[tuple[Span, bytes]]:
        """Sentences that end before the last of these characters."""
        ends = np.flatnonzero(scores > self._settings.threshold)
        others = np.flatnonzero(~np.isin(ids, WHITESPACE))
        at = 0
        while at < len(ids):
            if self._score is None:
                following = np.searchsorted(ends, at)
                stop = int(ends[following]) + 1 if following < len(ends) else len(ids)
                stop = min(stop, at + self._settings.most_characters - self._held)
                self._hold(ids[at:stop], scores[stop - 1])
                at = stop
                if scores[stop - 1] > self._settings.threshold:
                    self._score = self._last_score
            else:
                following = np.searchsorted(others, at)
                stop = int(others[following]) if following < len(others) else len(ids)
                stop = min(stop, at + self._settings.most_characters - self._held)
                if stop > at:
                    self._hold(ids[at:stop], scores[stop - 1])
                at = stop
                if at < len(ids):
                    yield self._close()
            if self._held >= self._settings.most_characters:
                yield self._close()

    def finish(self) -> Iterator[tuple[Span, bytes]]:
        """The last sentence, whose end is the text's."""
        if self._held:
            yield self._close()

    def _hold(self, ids: Ids, score: float) -> None:
        self._parts.append(ids)
        self._held += len(ids)
        self._last_score = float(score)

    def _close(self) -> tuple[Span, bytes]:
        data = np.concatenate(self._parts).astype("<i4").tobytes().decode("utf-32-le").encode("utf-8")
        score = self._last_score if self._score is None else self._score
        end_byte, end_character = self._byte + len(data), self._character + self._held
        span = Span(LABEL, score, self._byte, end_byte, self._character, end_character)
        self._parts, self._held, self._score = [], 0, None
        self._byte, self._character = end_byte, end_character
        return span, data
