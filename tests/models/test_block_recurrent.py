"""The network of Block-Recurrent Transformers: what it sees, what it is made of for calibration, and what is refused."""

import mlx.core as mx
import numpy as np
import pytest
from block_recurrent_cases import MELIAD, random_block_recurrent
from mlx.utils import tree_flatten

from marlin_cli.config import from_mapping
from marlin_cli.errors import ConfigError, QuantizationError
from marlin_cli.models import linear_layers, part_of, shared_inputs, with_weights
from marlin_cli.models.block_recurrent_config import BlockRecurrentConfig
from marlin_cli.models.block_recurrent_steps import BLOCK_RECURRENT
from marlin_cli.quantization.methods.awq import fold, legal_folds
from marlin_cli.quantization.scaled import is_gated
from marlin_cli.statistics.collect import measure
from marlin_cli.statistics.data import pool

IDS = np.random.default_rng(0).integers(0, 256, (2, 29), dtype=np.uint8)


@pytest.mark.parametrize("changes", [{}, *MELIAD], ids=lambda each: "-".join(each.values()))
def test_pieces_are_the_network_and_show_every_layer(changes):
    network = random_block_recurrent(**changes)
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


def test_by_meliad_a_byte_sees_exactly_a_block_of_bytes_before_it_and_not_itself():
    network = random_block_recurrent(layers=1, recurrent_layers=(), **MELIAD[0])
    rows = network.embedding(mx.array(IDS.astype(np.int32)))
    for changed, seen in ((9, False), (10, True), (17, True)):
        others = rows + 0.0
        others[:, changed] *= -1
        attention, last = network.layers[0].attention, []
        for each in (rows, others):
            last.append(attention(each, network.layer_memory(), None)[:, 18])
        assert (mx.abs(last[0] - last[1]).max().item() > 0) is seen, changed
    others = rows + 0.0
    others[:, 18] *= -1  # its own row asks, but is not what is found
    keys = [network.layers[0].attention.k_proj(each) for each in (rows, others)]
    assert mx.abs(keys[0] - keys[1]).max().item() > 0
    network.layers[0].attention.q_proj.weight *= 0
    last = [network.layers[0].attention(each, network.layer_memory(), None)[:, 18] for each in (rows, others)]
    assert mx.array_equal(*last)


def test_states_of_meliad_read_the_block_before_too():
    network = random_block_recurrent(layers=1, recurrent_layers=(0,), **MELIAD[0])
    changed = IDS.copy()
    changed[:, 0] ^= 1
    states = []
    for ids in (IDS, changed):
        memory = network.new_memory()
        network.decode(mx.array(ids[:, :8].astype(np.int32)), memory)
        memory[0].vectors = None  # what the first block wrote
        network.decode(mx.array(ids[:, 8:16].astype(np.int32)), memory)
        states.append(memory[0].vectors)
    assert mx.abs(states[0] - states[1]).max().item() > 0


@pytest.mark.parametrize("changes", [{}, *MELIAD], ids=lambda each: "-".join(each.values()))
def test_channels_that_awq_scales_leave_the_function_as_it_is(changes):
    network = random_block_recurrent(**changes)
    parameters = dict(tree_flatten(network.parameters()))
    folds = legal_folds(parameters, gated=is_gated(network))
    for found in folds:
        channels = parameters[f"{found.consumers[0]}.weight"].shape[1]
        fold(parameters, found, np.random.default_rng(1).uniform(0.5, 2, channels).astype(np.float32))
    assert {path for found in folds for path in found.consumers} >= {
        f"layers.0.attention.{name}_proj" for name in ("q", "state_q")
    }
    ids = mx.array(IDS.astype(np.int32))
    assert mx.allclose(with_weights(network, parameters)(ids), network(ids), atol=1e-5)


def test_rotation_is_refused_with_the_reason_of_its_equations():
    for changes, reason in (({}, "norms subtract the mean"), (MELIAD[0], "gates share out channel by channel")):
        with pytest.raises(QuantizationError, match=reason):
            BLOCK_RECURRENT.rotation(random_block_recurrent(**changes).config)


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
        ({"equations": "meliad"}, "equations 'meliad' want gate, which is left out; give bias or lstm"),
        ({"equations": "meliad", "gate": "bias"}, "want state_update, which is left out; give dual, single or skip"),
        ({**MELIAD[0], "all_layers_qk_norm": True}, "all_layers_qk_norm has no meaning with equations 'meliad'"),
        ({"gate": "bias"}, "gate has no meaning with equations 'lucidrains'"),
        ({"state_update": "skip"}, "state_update has no meaning with equations 'lucidrains'"),
        ({**MELIAD[0], "gate": "full"}, "gate"),
        ({"equations": "paper"}, "equations"),
    ],
)
def test_impossible_configurations(changes, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(BlockRecurrentConfig, {"layers": 3, "recurrent_layers": [0], **changes}, "config.json")
