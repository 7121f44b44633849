"""Generation: prompts in, pieces of bytes out as they are decoded, for one stream or many of unequal length."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.continuation import way_of
from marlin_cli.engine.sampling import Noise, Sampling
from marlin_cli.engine.scheduling import Piece
from marlin_cli.engine.states import PromptKeeper
from marlin_cli.engine.stopping import StopMatcher, Stopping
from marlin_cli.errors import UsageError
from marlin_cli.models import Network, continuing_of


def generate(
    network: Network,
    prompts: Sequence[bytes],
    stopping: Stopping,
    sampling: Sampling,
    cache_bits: CacheBits | None = None,
    *,
    sentinels: bool = False,
    keeper: PromptKeeper | None = None,
) -> Iterator[Piece]:
    """Decode all prompts side by side; the pieces of a stream come in order, each byte as soon as it is decoded.

    Streams of equal phase share each step. A stream gives the same bytes alone as in a batch. An id that is neither a
    byte nor an end counts as a byte and is read on.

    Args:
        sentinels: texts stand for such ids, in prompts and in what is generated, which else leaves them out.
        keeper: what knows the beginning of a single prompt, and takes its state when it has been read, whatever follows.

    Raises:
        UsageError: a prompt longer than the model's context, or sentinels where a model has none.
        CheckpointError: predictions that are not finite.
    """
    limit, way = network.config.max_bytes, way_of(network)
    texts = [continuing_of(network).ids(network.config, prompt, sentinels) for prompt in prompts]
    for text in texts:
        if len(text) > limit:
            raise UsageError(
                f"the prompt has {len(text)} bytes, but the model's context is {limit}; give its last {limit} bytes"
            )
    groups: dict[object, list[int]] = defaultdict(list)
    for stream, text in enumerate(texts):
        if stopping.max_bytes == 0 or len(text) >= limit:
            if keeper is not None:
                way.begin(network, [text], cache_bits, keeper)
            yield Piece(stream, b"", "length" if stopping.max_bytes == 0 else "context")
        else:
            groups[way.phase(network.config, len(text))].append(stream)
    running = [
        _decode(network, streams, [texts[stream] for stream in streams], stopping, sampling, cache_bits, sentinels, keeper)
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
    network: Network,
    streams: list[int],
    texts: list[Sequence[int]],
    stopping: Stopping,
    sampling: Sampling,
    cache_bits: CacheBits | None,
    sentinels: bool,
    keeper: PromptKeeper | None,
) -> Iterator[list[Piece]]:
    """Decode streams of equal phase: after each step the pieces that it set free."""
    config, continuing = network.config, continuing_of(network)
    ends, first_byte = continuing.ends(config), continuing.first_byte
    state = way_of(network).begin(network, texts, cache_bits, keeper if len(texts) == 1 else None)
    noise = Noise(sampling.seed, config.vocab_size)
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
                matcher = matchers[stream]
                if value in ends:
                    pieces.append(Piece(stream, matcher.flush(), "special"))
                    going.remove(row)
                    continue
                stopped = False
                if 0 <= value - first_byte < 256:
                    data, stopped = matcher.push(value - first_byte)
                else:  # no stop sequence goes on over it
                    data = matcher.flush() + (continuing.sentinel(value) if sentinels else b"")
                full = starts[stream] + step >= config.max_bytes
                reason = "stop" if stopped else "length" if decoded >= stopping.max_bytes else "context" if full else None
                if reason is not None:
                    going.remove(row)
                    data += b"" if stopped else matcher.flush()
                if data or reason:
                    pieces.append(Piece(stream, data, reason))
            yield pieces
            if not going:
                return
        if len(going) < len(streams):
            streams = [streams[row] for row in going]
            state.keep(going)
