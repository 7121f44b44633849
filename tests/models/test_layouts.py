"""What tells the layouts apart: which bytes each stage's state reaches, and where the rows of a patch begin."""

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli.models.megabyte_config import MegaByteConfig, StageConfig

BYTES = 48
PATCH = 8
SIZES = {
    "patch_size": PATCH, "max_bytes": BYTES, "global_layers": 2, "global_dim": 32, "global_heads": 2,
    "local_layers": 1, "local_dim": 16, "local_heads": 2,
}  # fmt: skip
LUCID = {**SIZES, "layout": "megabyte_pytorch", "byte_dim": 16, "ffn": "gelu", "ffn_bias": True}
MIDDLE = StageConfig(length=2, layers=1, dim=24, heads=2, ffn_dim=48)


@pytest.fixture
def ids():
    return mx.array(np.random.default_rng(3).integers(0, 256, (1, BYTES)))


def rows_changed(network, ids, path):
    """Rows of the logits that change when the weight at `path` does."""
    before = network(ids)
    *parents, name = path.split(".")
    holder = network
    for part in parents:
        holder = holder[part]
    holder[name] = holder[name] + 1.0
    difference = mx.abs(network(ids) - before).max(axis=-1)[0]
    return [row for row in range(ids.shape[1]) if difference[row].item() > 1e-6]


def rows_changed_by_byte(network, ids, index):
    """Rows of the logits that change when the byte at `index` does."""
    changed = mx.array(ids)
    changed[0, index] = (ids[0, index] + 1) % 256
    difference = mx.abs(network(ids) - network(changed)).max(axis=-1)[0]
    return [row for row in range(BYTES) if difference[row].item() > 1e-6]


def test_prefix_and_paper_condition_a_patch_on_all_patches_before(random_network, ids):
    paper = {**SIZES, "layout": "paper", "global_positions": "learned"}
    for sizes in (SIZES, paper):
        assert rows_changed_by_byte(random_network(MegaByteConfig(**sizes)), ids, 0) == list(range(1, BYTES))


def test_megabyte_pytorch_predicts_the_first_byte_of_a_patch_from_the_patch_before(random_network, ids):
    network = random_network(MegaByteConfig(**LUCID))
    network.global_to_local.weight = mx.zeros_like(network.global_to_local.weight)
    # Without conditions a byte reaches the rest of its patch and the first byte of the next, and no further.
    assert rows_changed_by_byte(network, ids, 2) == list(range(3, PATCH + 1))


def test_prefix_without_conditions_ends_with_the_patch(random_network, ids):
    network = random_network(MegaByteConfig(**SIZES))
    network.global_to_local.weight = mx.zeros_like(network.global_to_local.weight)
    assert rows_changed_by_byte(network, ids, 2) == list(range(3, PATCH))


def test_three_stages_reach_as_far_as_their_patches(random_network, ids):
    network = random_network(MegaByteConfig(**LUCID, middle=(MIDDLE,)))
    network.global_to_local.weight = mx.zeros_like(network.global_to_local.weight)
    # Without the global stage the middle one still carries a byte over both halves of its patch.
    assert rows_changed_by_byte(network, ids, 0) == list(range(1, PATCH + 1))
    network.middle[0].to_next.weight = mx.zeros_like(network.middle[0].to_next.weight)
    assert rows_changed_by_byte(network, ids, 0) == list(range(1, PATCH // 2 + 1))


def test_a_byte_that_stands_for_the_start_leads_every_patch_without_pads(random_network, ids):
    sizes = {**SIZES, "layout": "paper", "global_positions": "learned", "start_tokens": False}
    first = random_network(MegaByteConfig(**sizes, bos_byte=255))(ids)
    other = random_network(MegaByteConfig(**sizes, bos_byte=0))(ids)
    assert mx.abs(first - other).max(axis=-1)[0, 0].item() > 1e-4


@pytest.mark.parametrize("path", ["global_start", "local_start"])
def test_pads_lead_the_first_patch_and_every_patch(random_network, ids, path):
    network = random_network(MegaByteConfig(**SIZES, layout="paper", global_positions="learned"))
    assert rows_changed(network, ids, path) == list(range(BYTES))


def test_a_window_forgets_patches(random_network, ids):
    window = 2
    # One layer, so that nothing is handed on from row to row.
    sizes = SIZES | {"global_layers": 1}
    changed = rows_changed_by_byte(random_network(MegaByteConfig(**sizes, attention_window=window)), ids, 0)
    # Patch 0 is global row 1, which rows 1 to 1 + window see; row k conditions patch k.
    assert changed == list(range(1, PATCH * (2 + window)))


def test_the_paper_gives_each_byte_a_slice_of_the_global_state(random_network, ids):
    network = random_network(MegaByteConfig(**SIZES, layout="paper", global_positions="learned"))
    condition = network.to_next(0, mx.random.normal((3, 32)))
    assert condition.shape == (3, PATCH, 16)
    state = mx.random.normal((1, 32))
    changed = mx.array(state)
    changed[0, :4] += 1.0
    difference = mx.abs(network.to_next(0, state) - network.to_next(0, changed)).max(axis=-1)[0]
    assert [slot for slot in range(PATCH) if difference[slot].item() > 1e-6] == [0]


def test_sequences_of_a_batch_do_not_meet(each_network):
    ids = mx.array(np.random.default_rng(4).integers(0, 256, (3, 19)))
    together = each_network(ids)
    for index in range(3):
        assert mx.abs(together[index] - each_network(ids[index : index + 1])[0]).max().item() < 1e-5


def test_generation_from_nothing_adds_conditions_to_the_leading_rows(random_network):
    network = random_network(MegaByteConfig(**LUCID))
    of_nothing = network.logits_of_nothing(2)
    assert of_nothing.shape == (2, 256)
    assert mx.array_equal(of_nothing[0], of_nothing[1])
    # Unlike its training, which marlin's first row follows.
    assert mx.abs(of_nothing[0] - network(mx.array([[7]]))[0, 0]).max().item() > 1e-3
