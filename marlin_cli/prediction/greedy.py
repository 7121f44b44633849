"""Greedy decoding as it is timed: steps of the likeliest bytes, and where the kernels spent the time."""

from collections.abc import Iterator, Mapping

from marlin_cli.engine.continuation import Continuation
from marlin_cli.engine.sampling import Noise, Sampling

GREEDY = Sampling(temperature=0.0)

OVERHEAD = "overhead"  # what decoding takes beyond its parts: Python, the graph between stages, waiting

# The parts of decoding, in the order in which tables and charts have them.
PARTS = (
    "patcher", "encoder", "global", "global cache", "window cache", "memory cache",
    "middle", "local", "local cache", "states", "states cache",
    "decoder", "decoder cache", "head", "sampling", OVERHEAD,
)  # fmt: skip


def decoded(state: Continuation, count: int) -> Iterator[int]:
    """Decode `count` bytes of each stream, as generation does; after each step how many came."""
    noise = Noise(GREEDY.seed, state.config.vocab_size)
    while count > 0:
        ids = state.advance(GREEDY, noise, count)
        ids.tolist()  # waits for the device and brings the number over, as every consumer of bytes must
        count -= ids.shape[1]
        yield ids.shape[1]


def with_overhead(
    before: Mapping[str, float] | None, after: Mapping[str, float] | None, seconds: float
) -> dict[str, float] | None:
    """Seconds of each part between two readings of `Continuation.part_seconds`, and the overhead: together `seconds`.

    None where the parts are not told apart.
    """
    if before is None or after is None:
        return None
    parts = {part: after[part] - before[part] for part in after}
    return {**parts, OVERHEAD: seconds - sum(parts.values())}
