"""Cached decoding of Block-Recurrent Transformers: the full pass at every byte, in memory that does not grow."""

import mlx.core as mx
import numpy as np
import pytest
from block_recurrent_cases import MELIAD, SIZES, random_block_recurrent

from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.continuation import begin, way_of
from marlin_cli.engine.generation import Stopping, generate
from marlin_cli.engine.merged_streams import MergedStreams
from marlin_cli.engine.sampling import Sampling
from marlin_cli.errors import UsageError
from marlin_cli.models import preset
from marlin_cli.prediction.arithmetic import costs_of

BLOCK = SIZES["block_bytes"]
DATA = np.random.default_rng(0).integers(0, 256, (3, 4 * BLOCK + 3), dtype=np.uint8)


@pytest.mark.parametrize("prompt", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 2])
@pytest.mark.parametrize(
    "changes", [{}, {"all_layers_qk_norm": True}, *MELIAD], ids=lambda each: "-".join(map(str, each.values()))
)
def test_cached_decoding_is_the_full_pass_at_every_byte(prompt, changes):
    network = random_block_recurrent(**changes)
    full = network(mx.array(DATA.astype(np.int32)))
    state = begin(network, [bytes(row[:prompt]) for row in DATA])
    for position in range(prompt, DATA.shape[1]):
        assert mx.allclose(state.logits, full[:, position - 1], atol=1e-4), position
        state.push(mx.array(DATA[:, position].astype(np.int32)))
        if position == 2 * BLOCK + 3:  # some of the streams end within a block
            state.keep([2, 0])
            break
    kept = [2, 0] if len(state.positions) == 2 else [0, 1, 2]
    for position in range(state.positions[0], DATA.shape[1]):
        assert mx.allclose(state.logits, full[mx.array(kept), position - 1], atol=1e-4), position
        state.push(mx.array(DATA[kept, position].astype(np.int32)))


@pytest.mark.parametrize("changes", [{}, MELIAD[3]], ids=["lucidrains", "meliad"])
def test_streams_of_unequal_lengths_are_as_alone(changes):
    network = random_block_recurrent(**changes)
    prompts = [b"", b"a", b"abcdefgh", b"abcdefghi", b"x" * 19]

    def bytes_of(some):
        found = [b""] * len(some)
        for piece in generate(network, some, Stopping(3 * BLOCK), Sampling(temperature=1.0, seed=5)):
            found[piece.stream] += piece.data
        return found

    assert bytes_of(prompts) == [bytes_of([prompt])[0] for prompt in prompts]


@pytest.mark.parametrize("changes", [{}, MELIAD[3]], ids=["lucidrains", "meliad"])
def test_a_hundred_blocks_in_constant_memory(changes):
    network = random_block_recurrent(**changes)
    state = begin(network, [b"abc"])
    sizes = []
    for step in range(100 * BLOCK):
        state.push(mx.array([step % 256]))
        sizes.append(state.cache_bytes["memory"])
    assert max(sizes[: 3 * BLOCK]) == max(sizes) and sizes[5 * BLOCK] == sizes[-1 - (len(sizes) - 1 - 5 * BLOCK) % BLOCK]
    assert mx.isfinite(state.logits).all()


@pytest.mark.parametrize("changes", [{}, MELIAD[3]], ids=["lucidrains", "meliad"])
def test_its_memory_is_what_the_plan_says(changes):
    network = random_block_recurrent(**changes)
    state = begin(network, [bytes(3 * BLOCK - 1)])
    costs = costs_of(network.config, {}, 3 * BLOCK - 1, 32, 32)
    # Beside keys, values and what is read of states there are the states themselves, before and after their norm.
    assert 0.5 < sum(costs.cache_bytes.values()) / state.cache_bytes["memory"] < 1.5
    for rows in (1, BLOCK, 2 * BLOCK - 1, 3 * BLOCK + 1):
        held = begin(network, [bytes(rows)]).cache_bytes["memory"]
        assert held <= MergedStreams(network, way_of(network).begin, lambda *_: 0, CacheBits()).most_bytes(rows)
    assert costs.cache_bytes == costs_of(network.config, {}, 30 * BLOCK - 1, 32, 32).cache_bytes


def test_bits_of_what_does_not_grow_are_refused():
    with pytest.raises(UsageError, match="does not grow"):
        begin(random_block_recurrent(), [b"a"], CacheBits(8, 8))


def test_the_preset_is_of_the_training_script():
    config = preset("block-recurrent-enwik8")
    assert (config.layers, config.d_model, config.recurrent_layers, config.block_bytes) == (6, 512, (3,), 512)


def test_meliads_preset_is_the_one_its_readme_names():
    config = preset("block-recurrent-meliad-150m")
    assert (config.layers, config.d_model, config.recurrent_layers, config.block_bytes) == (12, 1024, (9,), 512)
    assert (config.equations, config.gate, config.state_update) == ("meliad", "bias", "skip")
