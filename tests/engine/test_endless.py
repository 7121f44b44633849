"""Streams without an end: what a window sees, by operations and by the kernels, and what it costs in memory."""

import mlx.core as mx
import numpy as np
import pytest
from small_networks import CONFIGS, SMALL, random_weights

from marlin_cli.engine import cache as caches
from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.decoding import Lockstep
from marlin_cli.engine.endless import Window, reach_of
from marlin_cli.engine.fused import fuse
from marlin_cli.engine.generation import generate
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.stopping import Stopping
from marlin_cli.errors import UsageError
from marlin_cli.models.megabyte_config import MegaByteConfig

TOLERANCE = 2e-5
DATA = np.random.default_rng(1).integers(0, 256, 700, dtype=np.uint8).tobytes()
GROUPED = MegaByteConfig(**SMALL, global_kv_heads=1, rope_interleaved=True, token_shift=True)


@pytest.fixture(params=["kernels", "operations"])
def way(request, monkeypatch):
    """Both ways in which the CPU runs a stage; pages are short, so that a small stream lets many go."""
    if request.param == "operations":
        monkeypatch.setattr("marlin_cli.engine.decoding.fused_stages", lambda network, bits: None)
        monkeypatch.setattr("marlin_cli.engine.schedulers.way_of", _merged)
    for room in ("cache", "fused"):
        monkeypatch.setattr(f"marlin_cli.engine.{room}.ROWS_PER_PAGE", 4)
    return request.param


def _merged(network):
    from dataclasses import replace

    from marlin_cli.engine.continuation import way_of

    return replace(way_of(network), together=lambda network, bits, keeper: None)


def windowed_logits(network, data: bytes, window: int, sinks: int, places: list[int]) -> np.ndarray:
    """Logits of single places by attention over everything with a mask and a table of angles: the definition."""
    stage = network.stages[0]
    patch, heads = network.config.patch_size, stage.config.heads
    ids = mx.array(np.frombuffer(data, dtype=np.uint8).astype(np.int32))[None]

    def run(number, rows):
        return _defined(network, rows, window, sinks) if number == 0 else network.stages[number].stack(rows)

    assert heads and patch
    return np.array(network(ids, run)[0])[places]


def _defined(network, rows, window, sinks):
    """The global stage as reference: every query against every key, turned by their distance as the window has it."""
    stack, out = network.stages[0].stack, rows
    total = rows.shape[1]
    for layer in stack.layers:
        cache = _Defined(total, window, sinks)
        out = layer(out, cache)
    return stack.norm(out) if "norm" in stack else out


class _Defined:
    """A `TurningCache` that is slow and obviously right: a row at a time."""

    def __init__(self, total, window, sinks):
        self.total, self.window, self.sinks = total, window, sinks

    def delay(self, slot, rows):
        return mx.concatenate([mx.zeros_like(rows[:, :1]), rows[:, :-1]], axis=1)

    def attend_turned(self, queries, keys, values, by):
        queries, keys, values = (np.array(each[0]).astype(np.float64) for each in (queries, keys, values))
        heads, kv_heads = queries.shape[0], keys.shape[0]
        out = np.zeros_like(queries)
        for head in range(heads):
            k, v = keys[head * kv_heads // heads], values[head * kv_heads // heads]
            for row in range(self.total):
                seen = [n for n in range(row + 1) if n < self.sinks or n >= row - self.window]
                scores = []
                for n in seen:
                    place = min(row, self.sinks + self.window) if n < self.sinks else row
                    scores.append(by.scale * turn(queries[head, row], place, by) @ turn(k[n], n, by))
                weights = np.exp(np.array(scores) - max(scores))
                out[head, row] = weights / weights.sum() @ v[seen]
        return mx.array(out.astype(np.float32))[None]


def turn(x, place, by):
    if by.rope_theta is None:
        return x
    half = len(x) // 2
    angles = place * by.rope_theta ** (-np.arange(half) / half)
    first, second = (x[0::2], x[1::2]) if by.rope_interleaved else (x[:half], x[half:])
    parts = first * np.cos(angles) - second * np.sin(angles), first * np.sin(angles) + second * np.cos(angles)
    return np.stack(parts, axis=-1).reshape(-1) if by.rope_interleaved else np.concatenate(parts)


ENDLESS = {"prefix": CONFIGS["prefix"], "grouped": GROUPED, "3 stages": CONFIGS["megabyte_pytorch, 3 stages"]}


@pytest.mark.parametrize("sinks", [0, 1, 3])
@pytest.mark.parametrize("name", ENDLESS)
def test_a_window_sees_its_sinks_and_the_rows_before_it(way, name, sinks):
    network = random_weights(ENDLESS[name])
    patch = network.config.patch_size
    bits = CacheBits(window=Window(9 * patch, sinks))
    window = reach_of(network.config, bits.window).window
    places = [0, 5 * patch - 1, 9 * patch + 1, 10 * patch, 14 * patch + 3, 30 * patch - 1]
    expected = windowed_logits(network, DATA[: 30 * patch], window, sinks, places)
    for prompt in (1, 21 * patch):  # decoded one by one, or read at once
        state = Lockstep(network, [DATA[:prompt]], bits)
        for place in range(prompt, 30 * patch):
            if place in places:
                assert np.abs(np.array(state.logits[0]) - expected[places.index(place)]).max() < TOLERANCE, (prompt, place)
            state.push(mx.array([DATA[place]]))


def test_memory_stays_flat_however_long_a_stream_is(way):
    network = random_weights(CONFIGS["prefix"])
    state = Lockstep(network, [b"x"], CacheBits(window=Window(9 * 4)))
    most = []
    for _ in range(3):
        for _ in range(20 * 4):
            state.push(mx.array([65]))
        mx.eval(state.logits)
        most.append(state.cache_bytes["global"])
    row_bytes = 2 * 4 * network.config.global_dim * network.config.global_layers
    assert most[0] == most[1] == most[2] <= (9 + 2 * caches.ROWS_PER_PAGE) * row_bytes
    assert state.positions == [241]


def test_a_window_of_the_models_own_attention_is_exact(way):
    sizes = {**SMALL, "max_bytes": 400, "attention_window": 5}
    longer, short = (random_weights(MegaByteConfig(**{**sizes, "max_bytes": most})) for most in (400, 96))
    whole = b"".join(piece.data for piece in generate(longer, [DATA[:50]], Stopping(300), Sampling(0.9, seed=3)))
    bits = CacheBits(window=Window(6 * 4))
    kept = b"".join(piece.data for piece in generate(short, [DATA[:50]], Stopping(300), Sampling(0.9, seed=3), bits))
    assert kept == whole


def test_streams_of_any_length_beside_each_other_are_as_alone(way):
    network = random_weights(CONFIGS["prefix"])
    bits, stopping, sampling = CacheBits(window=Window(10 * 4, 2)), Stopping(150), Sampling(0.8, seed=5)
    prompts = [b"", DATA[:3], DATA[:200], DATA[7:60]]
    together = [b""] * len(prompts)
    for piece in generate(network, prompts, stopping, sampling, bits):
        together[piece.stream] += piece.data
        assert piece.stop_reason in (None, "length")
    for prompt, found in zip(prompts, together, strict=True):
        assert b"".join(piece.data for piece in generate(network, [prompt], stopping, sampling, bits)) == found
        assert len(found) == 150


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.05), (4, 0.4)])
def test_packed_pages_are_let_go_too(way, bits, tolerance):
    network = random_weights(MegaByteConfig(**{**SMALL, "global_dim": 64}))
    plain, packed = (Lockstep(network, [DATA[:333]], CacheBits(b, b, Window(12 * 4))) for b in (16, bits))
    for byte in DATA[333:350]:
        plain.push(mx.array([byte]))
        packed.push(mx.array([byte]))
    reference = np.array(plain.logits)
    assert np.abs(np.array(packed.logits) - reference).max() < tolerance * np.abs(reference).max()
    assert packed.cache_bytes["global"] / plain.cache_bytes["global"] == (bits + 8 / (16 if bits == 4 else 32)) / 32


def test_places_far_beyond_the_context_keep_their_angles():
    from marlin_cli.engine.ring import turned

    x = mx.random.normal((1, 1, 2, 16))
    far = 10**7 + np.arange(2)
    products = [np.array(turned(x, places, 10000.0, False))[0, 0] for places in (np.arange(2), far)]
    assert abs(products[0][0] @ products[0][1] - products[1][0] @ products[1][1]) < 1e-5


@pytest.mark.parametrize("name", ["prefix", "megabyte_pytorch", "paper"])
def test_a_context_that_is_full_is_read_again_from_its_last_half_on(way, name):
    network = random_weights(CONFIGS[name])
    context = network.config.max_bytes
    bits, drawn = CacheBits(window=Window()), Sampling(0.7, seed=2)
    found = b"".join(piece.data for piece in generate(network, [DATA[:10]], Stopping(2 * context), drawn, bits))
    assert len(found) == 2 * context
    first = b"".join(piece.data for piece in generate(network, [DATA[:10]], Stopping(context), drawn))
    assert found[: context - 10] == first
    greedy = b"".join(piece.data for piece in generate(network, [DATA[:10]], Stopping(2 * context), Sampling(), bits))
    text = DATA[:10] + greedy
    again = b"".join(piece.data for piece in generate(network, [text[context // 2 : context]], Stopping(context), Sampling()))
    assert text[context : context + context // 2] == again


@pytest.mark.parametrize(
    ("config", "window", "message"),
    [
        (CONFIGS["prefix learned, token shift"], Window(40), "learned a position for each of its 24 patches"),
        (CONFIGS["prefix"], Window(100), "must be 8 to 96 bytes"),
        (CONFIGS["prefix"], Window(15, 3), "must be 16 to 96 bytes for this model with 3 sinks"),
        (MegaByteConfig(**SMALL, attention_window=3), Window(15), "own attention sees 16 bytes, found 15"),
        (MegaByteConfig(**SMALL, attention_window=3), Window(16, 1), "has learned to do without"),
    ],
)
def test_windows_that_a_model_cannot_have_are_refused(config, window, message):
    with pytest.raises(UsageError, match=message):
        reach_of(config, window)


def test_windows_that_say_nothing_are_refused():
    with pytest.raises(UsageError, match="at least 1"):
        Window(0)
    with pytest.raises(UsageError, match="leave --sinks out"):
        Window(None, 2)


def test_drafts_that_are_cut_back_leave_a_ring_as_it_was(monkeypatch):
    monkeypatch.setattr("marlin_cli.engine.fused.ROWS_PER_PAGE", 4)
    fused = fuse(random_weights(CONFIGS["prefix"]))
    x = mx.random.normal((1, 60, 32), key=mx.random.key(3))
    plain, drafting = (fused.new_cache(0, 1, [], CacheBits(window=Window(9 * 4))) for _ in range(2))
    for start in range(0, 60, 3):
        rows = drafting.held.rows
        drafting.run(-x[:, start : start + 3])
        drafting.held.cut(rows, [])
        assert np.array_equal(*(np.array(each.run(x[:, start : start + 3])) for each in (plain, drafting)))
    assert plain.held.dropped == drafting.held.dropped > 40
