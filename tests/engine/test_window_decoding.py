"""Cached decoding of EvaByte: the full pass at every byte, alone, in batches and packed, in memory bounded by the window."""

import mlx.core as mx
import numpy as np
import pytest
from evabyte_cases import SIZES, random_evabyte

from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.continuation import begin, way_of
from marlin_cli.engine.generation import Stopping, generate
from marlin_cli.engine.merged_streams import MergedStreams
from marlin_cli.engine.sampling import Sampling
from marlin_cli.models import continuing_of, preset
from marlin_cli.models.evabyte_steps import rows_kept
from marlin_cli.prediction.arithmetic import costs_of

WINDOW, CHUNK = SIZES["window_bytes"], SIZES["chunk_bytes"]
DATA = np.random.default_rng(0).integers(0, 256, (3, 3 * WINDOW + 9), dtype=np.uint8)


# A mark leads: a window is full of one byte less.
@pytest.mark.parametrize("prompt", [0, CHUNK - 2, WINDOW - 2, WINDOW - 1, WINDOW, 3 * WINDOW + 2])
@pytest.mark.parametrize(("bits", "tolerance"), [(CacheBits(), 1e-4), (CacheBits(8, 16), 0.5)])
def test_cached_decoding_is_the_full_pass_at_every_byte(prompt, bits, tolerance):
    network = random_evabyte()
    full = continuing_of(network).predictions(network, mx.array(DATA.astype(np.int32)))
    state = begin(network, [bytes(row[:prompt]) for row in DATA], bits)
    kept = [0, 1, 2]
    for position in range(prompt, DATA.shape[1]):
        assert mx.abs(state.logits - full[mx.array(kept), position]).max().item() < tolerance, position
        if position == 2 * WINDOW + 3:
            kept = [2, 0]
            state.keep(kept)
        state.push(mx.array(DATA[kept, position].astype(np.int32) + 64))


def test_streams_of_unequal_lengths_are_as_alone():
    network = random_evabyte()
    prompts = [b"", b"a", b"x" * (WINDOW - 1), b"x" * (WINDOW + 3), b"y" * (2 * WINDOW + 7)]

    def bytes_of(some):
        found = [b""] * len(some)
        for piece in generate(network, some, Stopping(2 * WINDOW), Sampling(temperature=1.0, seed=5)):
            found[piece.stream] += piece.data
        return found

    assert bytes_of(prompts) == [bytes_of([prompt])[0] for prompt in prompts]


@pytest.mark.parametrize("bits", [CacheBits(), CacheBits(8, 8), CacheBits(4, 4)])
def test_its_memory_is_what_the_plan_says(bits):
    network = random_evabyte(max_bytes=1 << 20)
    rows = 9 * WINDOW + CHUNK  # a mark among them
    state = begin(network, [bytes(rows - 1)], bits)
    width = 32 if bits == CacheBits() else bits.keys
    planned = costs_of(network.config, {}, rows, width, 32).cache_bytes["window"]
    # Beside the rows that are read there are those of the open window's chunks, which none sees yet.
    assert planned <= state.cache_bytes["window"] < 1.5 * planned
    assert state.cache_bytes["window"] <= MergedStreams(network, way_of(network).begin, lambda *_: 0, bits).most_bytes(rows)
    assert rows_kept(network.config, rows) == CHUNK + 9 * WINDOW // CHUNK


def test_a_hundred_windows_in_memory_that_grows_by_their_chunks_alone():
    network = random_evabyte(max_bytes=1 << 20, layers=1, window_bytes=8, chunk_bytes=4)
    state = begin(network, [bytes(7)])
    first = state.cache_bytes["window"]
    for _ in range(100):
        for step in range(8):
            state.push(mx.array([64 + step]))
    assert state.cache_bytes["window"] == 101 * first and mx.isfinite(state.logits).all()


def test_the_preset_is_the_released_model():
    config = preset("evabyte")
    assert (config.layers, config.d_model, config.window_bytes, config.prediction_heads) == (32, 4096, 2048, 8)
