"""`heads=auto`: the number that bytes of the model's own kind tell, and a refusal where they tell nothing."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints"))

from foreign_states import FOREIGN, lucid_state  # noqa: E402
from torch_writer import write_zip  # noqa: E402

from marlin_cli import load
from marlin_cli.checkpoints import ImportOptions, read_checkpoint
from marlin_cli.engine import heads as heads_module
from marlin_cli.engine.heads import with_heads
from marlin_cli.errors import AssumptionWarning, CheckpointError

AUTO = ImportOptions(heads="auto", max_bytes=32)
TRUE_HEADS = 4
# So much larger than at random that attention decides and bytes are far from equally likely.
SHARPER = {"to_q.weight": 4, "to_kv.weight": 4, "to_out.weight": 8, "to_logits.weight": 4}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    state = lucid_state(dims=(16, 8), inner=16)
    for name in state:
        state[name] *= next((factor for end, factor in SHARPER.items() if name.endswith(end)), 1)
    return write_zip(tmp_path_factory.mktemp("lucid") / "model.pt", state)


@pytest.fixture(scope="module")
def sample(path):
    """Bytes that the model draws with its true number of heads: no other gives them so high a probability."""
    network = load(path, device="cpu", options=ImportOptions(heads=TRUE_HEADS, max_bytes=32)).network
    generator = np.random.default_rng(0)
    ids = np.zeros((32, 32), np.int32)
    for index in range(32):
        logits = np.array(network(mx.array(ids)))[:, index]
        ids[:, index] = (logits + generator.gumbel(size=logits.shape)).argmax(axis=1)
    return ids.astype(np.uint8).reshape(-1)


def test_the_number_under_which_bytes_cost_least(path, sample):
    with pytest.warns(AssumptionWarning, match=r"took heads=4: sample bytes cost \d\.\d+ bits each, and \d\.\d+ more"):
        options = with_heads(path, AUTO, sample)
    assert options.heads == TRUE_HEADS
    checkpoint = read_checkpoint(path, options)
    assert checkpoint.config["global_heads"] == checkpoint.config["local_heads"] == TRUE_HEADS
    assert checkpoint.marlin == {"assumed": {"heads": TRUE_HEADS}}


def test_bytes_that_tell_nothing(path, sample, tmp_path):
    with pytest.raises(CheckpointError, match="cannot tell: .* bits each, .* a model of other bytes, or none: give the number"):
        with_heads(path, AUTO, np.random.default_rng(1).integers(0, 256, 1024, dtype=np.uint8))
    with pytest.raises(CheckpointError, match="cannot tell: .* within noise; give the number of heads"):
        with_heads(path, AUTO, sample[:32])
    # An attention that adds nothing is the same with any number of heads.
    state = lucid_state(dims=(16, 8), inner=16)
    for name in state:
        state[name] *= not name.endswith(("to_out.weight", "to_logits.weight"))
    state["to_logits.bias"] = np.where(np.arange(256) == 7, 5, 0).astype("f4")
    with pytest.raises(CheckpointError, match=r"and 0\.000 more .* within noise"):
        with_heads(write_zip(tmp_path / "model.pt", state), AUTO, np.full(1024, 7, np.uint8))


def test_no_trial_where_the_file_tells(monkeypatch):
    monkeypatch.setattr(heads_module, "bits_of", lambda *_: pytest.fail("a trial"))
    three = with_heads(FOREIGN / "megabyte_pytorch-3-stages.pt", ImportOptions(heads="auto"))
    assert (three.heads, three.heads_by_trial) == (3, None)
    assert with_heads(FOREIGN / "paper.pt", ImportOptions(heads="auto")).heads == 4
    given = ImportOptions(heads=2)
    assert with_heads(FOREIGN / "paper.pt", given) is given


def test_a_model_that_says_all_takes_no_option(demo, tmp_path):
    demo.save(tmp_path / "model")
    with pytest.raises(CheckpointError, match="the import option heads has no meaning here"):
        load(tmp_path / "model", device="cpu", options=ImportOptions(heads="auto"))


def test_load_and_the_shipped_sample(path, sample, monkeypatch):
    monkeypatch.setattr(heads_module, "_shipped_sample", lambda window: sample)
    with pytest.warns(AssumptionWarning, match="took heads=4"):
        assert load(path, device="cpu", options=AUTO).config.global_heads == TRUE_HEADS
