"""Generation: prompts in, pieces of bytes out as they are decoded, for one stream or many of unequal length."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from marlin_cli.engine.decoding import CacheBits, Lockstep
from marlin_cli.engine.sampling import Noise, Sampling
from marlin_cli.errors import UsageError
from marlin_cli.models.megabyte import MegaByte


@dataclass(frozen=True)
class Piece:
    """Bytes of one stream, decoded just now; with the last piece comes the reason why it ended."""

    stream: int
    data: bytes
    stop_reason: str | None = None  # length: max_bytes reached; stop: a stop sequence; context: no room; special


@dataclass(frozen=True)
class Stopping:
    """When a stream ends.

    Raises:
        UsageError: max_bytes below 0, or an empty stop sequence.
    """

    max_bytes: int = 256  # bytes to generate
    stop: tuple[bytes, ...] = ()  # byte sequences that end a stream; they are not part of the output

    def __post_init__(self) -> None:
        if self.max_bytes < 0:
            raise UsageError(f"max_bytes must be 0 or more, found {self.max_bytes}")
        if any(not sequence for sequence in self.stop):
            raise UsageError("a stop sequence is empty; give at least one byte")


class StopMatcher:
    """Holds bytes back while they may still turn out to be the beginning of a stop sequence."""

    def __init__(self, sequences: tuple[bytes, ...]) -> None:
        self._sequences = sequences
        self._held = b""

    def push(self, byte: int) -> tuple[bytes, bool]:
        """The bytes that are free to go after `byte`, and whether a stop sequence is complete."""
        held = self._held + bytes([byte])
        for sequence in self._sequences:
            if held.endswith(sequence):
                self._held = b""
                return held[: -len(sequence)], True
        kept = max((_overlap(held, sequence) for sequence in self._sequences), default=0)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept], False

    def flush(self) -> bytes:
        """The bytes still held, when the stream ends without the sequence."""
        held, self._held = self._held, b""
        return held


def _overlap(data: bytes, sequence: bytes) -> int:
    """Length of the longest end of `data` that begins `sequence`."""
    longest = min(len(data), len(sequence) - 1)
    return next((n for n in range(longest, 0, -1) if data.endswith(sequence[:n])), 0)


def generate(
    network: MegaByte,
    prompts: Sequence[bytes],
    stopping: Stopping,
    sampling: Sampling,
    cache_bits: CacheBits | None = None,
) -> Iterator[Piece]:
    """Decode all prompts side by side; the pieces of a stream come in order, each byte as soon as it is decoded.

    Streams at the same byte of their patches share each step. A stream gives the same bytes alone as in a batch.

    Raises:
        UsageError: a prompt longer than the model's context.
        CheckpointError: predictions that are not finite.
    """
    limit = network.config.max_bytes
    for prompt in prompts:
        if len(prompt) > limit:
            raise UsageError(
                f"the prompt has {len(prompt)} bytes, but the model's context is {limit}; give its last {limit} bytes"
            )
    groups: dict[tuple[int, bool], list[int]] = defaultdict(list)
    for stream, prompt in enumerate(prompts):
        if stopping.max_bytes == 0 or len(prompt) >= limit:
            yield Piece(stream, b"", "length" if stopping.max_bytes == 0 else "context")
        else:
            groups[Lockstep.phase(network.config, len(prompt))].append(stream)
    running = [
        _decode(network, streams, [prompts[stream] for stream in streams], stopping, sampling, cache_bits)
        for streams in groups.values()
    ]
    while running:
        for group in list(running):
            pieces = next(group, None)
            if pieces is None:
                running.remove(group)
            else:
                yield from pieces


def _decode(
    network: MegaByte,
    streams: list[int],
    prompts: list[bytes],
    stopping: Stopping,
    sampling: Sampling,
    cache_bits: CacheBits | None,
) -> Iterator[list[Piece]]:
    """Decode streams of equal phase: after each step the pieces that it set free."""
    state = Lockstep(network, prompts, cache_bits)
    noise = Noise(sampling.seed, network.config.vocab_size)
    matchers = {stream: StopMatcher(stopping.stop) for stream in streams}
    decoded = zeros = 0
    check_at = 1  # zeros so far: whatever is no number draws them, and they are seldom else
    state.check_finite()
    while streams:
        starts = dict(zip(streams, state.positions, strict=True))
        columns: list[list[int]] = state.advance(sampling, noise, stopping.max_bytes - decoded).T.tolist()  # type: ignore[assignment]
        zeros += sum(values.count(0) for values in columns)
        if zeros >= check_at:
            state.check_finite()
            check_at = 2 * zeros
        going = list(range(len(streams)))
        for step, values in enumerate(columns, start=1):
            decoded += 1
            pieces = []
            for row in list(going):
                stream, value = streams[row], values[row]
                if value > 255:
                    pieces.append(Piece(stream, matchers[stream].flush(), "special"))
                    going.remove(row)
                    continue
                data, stopped = matchers[stream].push(value)
                full = starts[stream] + step >= network.config.max_bytes
                reason = "stop" if stopped else "length" if decoded >= stopping.max_bytes else "context" if full else None
                if reason is not None:
                    going.remove(row)
                    data += b"" if stopped else matchers[stream].flush()
                if data or reason:
                    pieces.append(Piece(stream, data, reason))
            yield pieces
            if not going:
                return
        if len(going) < len(streams):
            streams = [streams[row] for row in going]
            state.keep(going)
