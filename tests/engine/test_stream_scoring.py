"""Costs of a stream: those of the full pass while it fits, whatever portions it comes in, and of what was kept of it."""

import math

import mlx.core as mx
import numpy as np
import pytest
from small_networks import CONFIGS, CONTINUING, SMALL, random_weights

from marlin_cli.engine import stream_scoring
from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.decoding import Lockstep
from marlin_cli.engine.endless import Window
from marlin_cli.engine.scoring import costs
from marlin_cli.engine.stream_scoring import ScorerMemory, stream_scorer
from marlin_cli.errors import UsageError
from marlin_cli.models.megabyte_config import MegaByteConfig

DATA = np.random.default_rng(2).integers(0, 256, 500, dtype=np.uint8).tobytes()
TURNED = {name: config for name, config in CONFIGS.items() if not config.stages[0].learned} | {
    "token shift": MegaByteConfig(**SMALL, token_shift=True),
    "paper": MegaByteConfig(**SMALL, layout="paper", start_tokens=False),
}


@pytest.fixture(params=["kernels", "operations"])
def way(request, monkeypatch):
    if request.param == "operations":
        monkeypatch.setattr(stream_scoring, "fused_stages", lambda network, bits: None)


def scored(scorer, data: bytes, portions: list[int]) -> np.ndarray:
    found, start = [], 0
    for portion in [*portions, len(data)]:
        found.append(scorer.score(data[start : start + portion]))
        start += portion
    return np.concatenate(found)


@pytest.mark.parametrize("name", TURNED)
def test_costs_are_those_of_the_full_pass_while_it_fits(way, name, monkeypatch):
    monkeypatch.setattr(stream_scoring, "PATCHES_AT_ONCE", 5)
    network = random_weights(TURNED[name])
    expected = np.array(costs(network, mx.array(np.frombuffer(DATA[:90], dtype=np.uint8).astype(np.int32))[None]))[0]
    size = network.config.max_bytes if network.config.attention_window is None else 40
    for portions in ([], [1, 1, 6, 8, 0, 3, 40], [8, 16]):
        scorer = stream_scorer(network, CacheBits(window=Window(size)))
        assert np.abs(scored(scorer, DATA[:90], portions) - expected).max() < 2e-4
        assert scorer.seen == 90


def test_costs_beyond_the_context_are_those_of_decoding(way):
    network = random_weights(CONFIGS["prefix"])
    bits = CacheBits(window=Window(40, 2))
    state, expected = Lockstep(network, [b""], bits), []
    for byte in DATA[:200]:
        row = np.array(state.logits[0]).astype(np.float64)
        expected.append((np.log(np.exp(row).sum()) - row[byte]) / math.log(2))
        state.push(mx.array([byte]))
    found = scored(stream_scorer(network, bits), DATA[:200], [7, 100])
    assert np.abs(found - np.array(expected)).max() < 2e-4


@pytest.mark.parametrize("name", TURNED)
@pytest.mark.parametrize("bits", [16, 8])
def test_a_stream_goes_on_from_what_was_kept_of_it(way, name, bits):
    config = TURNED[name]
    if bits < 16:
        config = MegaByteConfig(**{**SMALL, "global_dim": 64, "token_shift": config.token_shift})
    network = random_weights(config)
    cache = CacheBits(bits, bits, Window(64))
    for at in (0, 3, 4, 333):
        one, other = stream_scorer(network, cache), stream_scorer(network, cache)
        one.score(DATA[:at])
        other.remember(one.memory())
        assert np.array_equal(one.score(DATA[at:]), other.score(DATA[at:]))


def test_what_is_not_the_memory_of_such_a_scorer_is_refused(way):
    networks = [random_weights(CONFIGS[name]) for name in ("prefix", "grouped attention")]
    one, other = (stream_scorer(network, CacheBits(window=Window(64))) for network in networks)
    one.score(DATA[:50])
    memory = one.memory()
    with pytest.raises(ValueError, match="another kind"):
        other.remember(memory)
    for name, value in (("seen", "51"), ("dropped", "1"), ("text", "00")):
        with pytest.raises(ValueError, match="do not fit"):
            one.remember(ScorerMemory(memory.arrays, {**memory.facts, name: value}))


@pytest.mark.parametrize("name", CONTINUING)
def test_any_network_scores_a_stream_by_reading_its_last_half_again(name):
    network = random_weights(CONTINUING[name])
    scorer = stream_scorer(network, CacheBits(window=Window()))
    context = network.config.max_bytes
    found = scored(scorer, DATA[:250], [5, 90, 1, 1])

    def of(start, end):
        return np.array(costs(network, mx.array(np.frombuffer(DATA[start:end], dtype=np.uint8).astype(np.int32))[None]))[0]

    half = context // 2
    starts = range(half, 250 - half, half)
    expected = np.concatenate([of(0, context), *(of(start, min(start + context, 250))[half:] for start in starts)])
    assert found.shape == expected.shape and np.abs(found - expected).max() < 2e-4
    again = stream_scorer(network, CacheBits(window=Window()))
    again.remember(scorer.memory())
    assert np.array_equal(scorer.score(DATA[250:300]), again.score(DATA[250:300]))


def test_a_cache_that_is_not_there_has_no_bits():
    with pytest.raises(UsageError, match="without a cache"):
        stream_scorer(random_weights(CONFIGS["prefix"]), CacheBits(8, 8, Window()))
