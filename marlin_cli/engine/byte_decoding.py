"""A byte decoder without patches (ByGPT5): what it makes of given bytes, and bytes that go on from a prompt."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.engine.encoder_decoder import GrowingCache
from marlin_cli.engine.generation import Piece, StopMatcher, Stopping
from marlin_cli.engine.sampling import Noise, Sampling, sample
from marlin_cli.errors import InputError, UsageError
from marlin_cli.models.bygpt5 import ByGPT5, ByGPT5Config
from marlin_cli.models.byt5_ids import FIRST_BYTE, FIRST_SPECIAL, ids_of_bytes, ids_with_sentinels
from marlin_cli.ops.long_attention import SCORES_AT_ONCE


def logits_of(network: ByGPT5, data: bytes) -> mx.array:
    """Logits [bytes, vocab] float32: row i is the distribution of byte i given those before it; byte b has column b + 3.

    Where no mark leads a text, the first row comes of `start_id` alone, and the others of the bytes alone.

    Raises:
        InputError: more bytes than the model's context.
    """
    ids, config = ids_of_bytes(data), network.config
    if len(ids) > config.max_bytes:
        raise InputError(f"the text has {len(ids):,} bytes, the model's context is {config.max_bytes:,}; give fewer")
    if config.starts_all or len(ids) < 2:
        return network(mx.array([[config.start_id, *ids]]))[0, : len(ids)]
    first = network(mx.array([[config.start_id]]))[0]
    return mx.concatenate([first, network(mx.array([ids[:-1]]))[0]])


def bits_of(network: ByGPT5, data: bytes, window_bytes: int) -> npt.NDArray[np.float64]:
    """Bits that each byte costs, in disjoint windows that begin without context: [bytes]."""
    bits = np.empty(len(data))
    for start in range(0, len(data), window_bytes):
        window = data[start : start + window_bytes]
        logits = logits_of(network, window)
        chosen = mx.take_along_axis(logits, mx.array(ids_of_bytes(window))[:, None], axis=-1)[:, 0]
        bits[start : start + len(window)] = np.array(mx.logsumexp(logits, axis=-1) - chosen) / math.log(2)
    return bits


def prompt_ids(config: ByGPT5Config, prompt: bytes, *, sentinels: bool = False) -> list[int]:
    """What the network reads of a prompt; with `sentinels`, `<extra_id_N>` stands for one id (styles of fine-tunes)."""
    ids = ids_with_sentinels(prompt, config.vocab_size) if sentinels else ids_of_bytes(prompt)
    return [config.start_id, *ids] if config.starts_all or not ids else ids


def generate(network: ByGPT5, prompts: Sequence[Sequence[int]], stopping: Stopping, sampling: Sampling) -> Iterator[Piece]:
    """Go on from prompts of `prompt_ids`; the pieces of a stream come in order, each byte as soon as it is decoded.

    Streams of equal length share each step. A stream gives the same bytes alone as in a batch. Ids that are no bytes
    count as one byte and are read on, but give none; an end ends a stream.

    Raises:
        UsageError: a prompt longer than the model's context, or of no ids.
    """
    limit = network.config.max_bytes
    groups: dict[int, list[int]] = defaultdict(list)
    for stream, prompt in enumerate(prompts):
        if not prompt or len(prompt) > limit:
            raise UsageError(f"the prompt has {len(prompt)} ids, but the model's context is 1 to {limit}; give its last ones")
        if stopping.max_bytes == 0 or len(prompt) >= limit:
            yield Piece(stream, b"", "length" if stopping.max_bytes == 0 else "context")
        else:
            groups[len(prompt)].append(stream)
    running = [
        _decode(network, streams, [prompts[stream] for stream in streams], stopping, sampling) for streams in groups.values()
    ]
    while running:
        for group in list(running):
            pieces = next(group, None)
            if pieces is None:
                running.remove(group)
            else:
                yield from pieces


def _decode(
    network: ByGPT5, streams: list[int], prompts: list[Sequence[int]], stopping: Stopping, sampling: Sampling
) -> Iterator[list[Piece]]:
    """Decode streams of equal length: after each step the pieces that it set free."""
    config = network.config
    caches = [GrowingCache() for _ in range(config.layers)]
    logits = _read(network, mx.array(prompts), caches)
    noise = Noise(sampling.seed, config.vocab_size)
    matchers = {stream: StopMatcher(stopping.stop) for stream in streams}
    ends = config.ends
    room = min(stopping.max_bytes, config.max_bytes - len(prompts[0]))
    for step in range(1, room + 1):
        drawn = sample(logits, sampling, noise.take(1)[0] if sampling.temperature else None)
        chosen: list[int] = drawn.tolist()  # type: ignore[assignment]
        pieces: list[Piece] = []
        going: list[int] = []
        for row, (stream, value) in enumerate(zip(streams, chosen, strict=True)):
            matcher = matchers[stream]
            data, stopped, reason = b"", False, None
            if value not in ends and FIRST_BYTE <= value < FIRST_SPECIAL:
                data, stopped = matcher.push(value - FIRST_BYTE)
            if stopped:
                reason = "stop"
            elif value in ends:
                reason = "special"
            elif step == room:
                reason = "length" if room == stopping.max_bytes else "context"
            if reason in ("special", "length", "context"):
                data += matcher.flush()
            if data or reason:
                pieces.append(Piece(stream, data, reason))
            if reason is None:
                going.append(row)
        yield pieces
        if not going:
            return
        if len(going) < len(streams):
            streams = [streams[row] for row in going]
            chosen = [chosen[row] for row in going]
            for cache in caches:
                cache.keep(mx.array(going))
        logits = network(mx.array(chosen)[:, None], caches)[:, -1]


def _read(network: ByGPT5, ids: mx.array, caches: list[GrowingCache]) -> mx.array:
    """Logits [n, vocab] after ids [n, total], read into the caches in blocks whose scores fit the memory."""
    n, total = ids.shape
    step = max(1, SCORES_AT_ONCE // (n * network.config.heads * total))
    hidden = mx.zeros((n, 0, network.config.d_model))
    for start in range(0, total, step):
        hidden = network.decode(ids[:, start : start + step], caches)
        mx.eval(hidden)
    return network.head(hidden[:, -1])
