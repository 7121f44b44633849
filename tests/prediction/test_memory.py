"""What a stream is said to hold, beside what it holds after so many bytes."""

import gc

import mlx.core as mx
import pytest
from block_recurrent_cases import MELIAD, random_block_recurrent
from blt_cases import random_blt
from evabyte_cases import random_evabyte
from spacebyte_cases import random_spacebyte

from marlin_cli import ContinuingModel, load
from marlin_cli.engine import disk_tables
from marlin_cli.engine.continuation import begin
from marlin_cli.models.blt_config import StackConfig
from marlin_cli.ops.device import choose_device
from marlin_cli.prediction.memory import stream_bytes
from marlin_cli.prediction.sizes import bytes_in_float32, weights_by_part

NETWORKS = {
    "blt": random_blt(threshold=1e6, max_patch_bytes=4),
    "spacebyte": random_spacebyte(patch_rule="periodic", max_patches=32),
    "evabyte": random_evabyte(),
    "block_recurrent": random_block_recurrent(block_bytes=32, state_vectors=16),
    "meliad": random_block_recurrent(block_bytes=32, state_vectors=16, **MELIAD[0]),
}


@pytest.mark.parametrize("count", [20, 100])
@pytest.mark.parametrize("name", NETWORKS)
def test_as_much_as_is_held(name, count):
    network = NETWORKS[name]
    # What other tests left would else be freed while this one counts, or be taken for more than was asked for.
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    state = begin(network, [b"abcd "])
    for _ in range(count - 5):
        state.push(mx.argmax(state.logits, axis=-1))
    mx.eval(state.logits)
    held = mx.get_active_memory() - before - state.logits.nbytes
    assert stream_bytes(network.config, count, 32, 32) == pytest.approx(held, rel=0.25)


def test_half_the_bits_are_half_the_bytes():
    for network in NETWORKS.values():
        assert stream_bytes(network.config, 60, 16, 16) == pytest.approx(stream_bytes(network.config, 60, 32, 32) / 2)


def test_tables_that_are_looked_up_keep_their_type():
    weights = {"hash_embedding.weight": mx.zeros((4, 2), mx.bfloat16), "norm.weight": mx.zeros(2, mx.bfloat16)}
    assert bytes_in_float32(weights, {"hash_embedding"}) == {"global": 8, "embeddings": 16}


@pytest.mark.parametrize("packed", [False, True])
def test_tables_on_disk_have_their_weights(packed, tmp_path, monkeypatch):
    model = ContinuingModel(
        random_blt(encoder=StackConfig(64, 64, 2, 1), decoder=StackConfig(64, 64, 4, 1)), choose_device("cpu")
    )
    (model.quantize() if packed else model).save(tmp_path / "model")
    expected = weights_by_part(load(tmp_path / "model", device="cpu").network)
    monkeypatch.setattr(disk_tables, "free_memory_bytes", lambda: 0)
    network = load(tmp_path / "model", device="cpu").network
    assert isinstance(network.hash_embedding, disk_tables.DiskTable)
    assert weights_by_part(network) == expected
