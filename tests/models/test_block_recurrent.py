"""The network of Block-Recurrent Transformers: what it sees, what it is made of for calibration, and what is refused."""

import mlx.core as mx
import numpy as np
import pytest
from block_recurrent_cases import random_block_recurrent

from marlin_cli.config import from_mapping
from marlin_cli.errors import ConfigError
from marlin_cli.models import linear_layers, part_of, shared_inputs
from marlin_cli.models.block_recurrent import BlockRecurrentConfig
from marlin_cli.models.block_recurrent_steps import BLOCK_RECURRENT
from marlin_cli.statistics.collect import measure
from marlin_cli.statistics.data import pool

IDS = np.random.default_rng(0).integers(0, 256, (2, 29), dtype=np.uint8)


def test_pieces_are_the_network_and_show_every_layer():
    network = random_block_recurrent()
    state = BLOCK_RECURRENT.start(network, IDS)
    shown = []
    for piece in BLOCK_RECURRENT.pieces(network):
        state = piece.run(network, state)
        shown += piece.sources
    logits = network.head(network.norm(state["rows"])).reshape(-1, 256)
    assert mx.allclose(logits, BLOCK_RECURRENT.logits(network, IDS), atol=1e-5)
    layers = set(shared_inputs(network).values()) - {"output"}
    assert sorted(shown) == sorted(layers) and {part_of(path) for path in linear_layers(network)} == {
        "global",
        "states",
        "head",
    }


def test_what_is_seen_goes_back_beyond_two_blocks_through_states_alone():
    """Without recurrent layers a byte reaches at most a block back in each layer; states carry it on."""
    changed = IDS.copy()
    changed[:, 0] ^= 1
    for layers, reach in ((), False), ((1,), True):
        network = random_block_recurrent(layers=2, recurrent_layers=layers)
        last = [network(mx.array(ids.astype(np.int32)))[:, -1] for ids in (IDS, changed)]
        assert (mx.abs(last[0] - last[1]).max().item() > 0) is reach


def test_a_layer_that_is_called_once_a_block_is_measured_in_all_of_them():
    network = random_block_recurrent()
    totals = measure(network, "text", IDS[0])
    rows = {path: int(moments.count.sum()) for path, moments in totals.inputs.items()}
    # 29 bytes: three whole blocks of 8, each of which writes 6 states; the open one reads them.
    assert rows["layers.0.attention.q_proj"] == 29 and rows["states.0.update_proj"] == 3 * 6
    assert rows["states.0.q_proj"] == 3 * 6


def test_a_sample_without_a_whole_block_counts_no_rows_of_what_writes_states():
    network = random_block_recurrent()
    short, long = measure(network, "text", IDS[0, :5]), measure(network, "text", IDS[0])
    assert short.inputs.keys() == long.inputs.keys() and not short.inputs["states.0.update_proj"].count.any()
    both = pool(short, long)
    assert (both.inputs["states.0.update_proj"].count == long.inputs["states.0.update_proj"].count).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers must be at least 1"),
        ({"block_bytes": 1 << 30}, "block_bytes is 1,073,741,824, more than the"),
        ({"head_dim": 15}, "head_dim must be even, found 15"),
        ({"recurrent_layers": [3]}, "recurrent_layers must rise from 0 to 2"),
        ({"recurrent_layers": [1, 1]}, "recurrent_layers must rise"),
        ({"start_id": 256}, "start_id is 256, more than the 255"),
        ({"vocab_size": 255}, "vocab_size must be at least 256"),
    ],
)
def test_impossible_configurations(changes, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(BlockRecurrentConfig, {"layers": 3, "recurrent_layers": [0], **changes}, "config.json")
