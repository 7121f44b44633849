"""Tables of rows that stay in their file: the same bits as in memory, in every format, and a file that was cut."""

import mlx.core as mx
import pytest
from blt_cases import blt_folder, random_blt
from mlx.utils import tree_flatten

from marlin_cli import load
from marlin_cli.engine import disk_tables
from marlin_cli.engine.disk_tables import DiskTable
from marlin_cli.errors import CheckpointError, UsageError
from marlin_cli.models.blt_config import StackConfig
from marlin_cli.quantization.plan import QuantizationSettings

NETWORK = random_blt(encoder=StackConfig(32, 64, 2, 1))


@pytest.fixture
def short_memory(monkeypatch):
    """A machine without any memory left, from the call of it on."""
    return lambda: monkeypatch.setattr(disk_tables, "free_memory_bytes", lambda: 0)


@pytest.mark.parametrize("format", ["16bit", "int8", "mxfp8"])
def test_the_same_bytes_from_disk(format, tmp_path, short_memory):
    source = load(blt_folder(tmp_path / "model", NETWORK), device="cpu")
    source.quantize(settings=QuantizationSettings(hash_format=format)).save(tmp_path / "packed")
    resident = load(tmp_path / "packed", device="cpu")
    short_memory()
    streamed = load(tmp_path / "packed", device="cpu")
    assert isinstance(streamed.network.hash_embedding, DiskTable)
    assert not any(path.startswith("hash_embedding") for path, _ in tree_flatten(streamed.network.parameters()))
    rows = mx.array([[0, 193, 5], [5, 5, 0]])
    assert mx.array_equal(streamed.network.hash_embedding(rows), resident.network.hash_embedding(rows))
    assert streamed.network.hash_embedding(rows[:0]).shape == (0, 3, 32)
    windows = mx.random.randint(0, 256, (2, 90), key=mx.random.key(1))
    assert mx.array_equal(streamed.network.predictions(windows), resident.network.predictions(windows))
    assert streamed.generate(b"a prompt", max_bytes=24) == resident.generate(b"a prompt", max_bytes=24)


def test_what_stays_in_its_file_is_not_saved(tmp_path, short_memory):
    load(blt_folder(tmp_path / "model", NETWORK), device="cpu").save(tmp_path / "own")
    short_memory()
    with pytest.raises(UsageError, match="its hash tables stay in their file"):
        load(tmp_path / "own", device="cpu").save(tmp_path / "again")


def test_another_layouts_tables_stay_on_disk_too(tmp_path, short_memory):
    folder = blt_folder(tmp_path / "model", NETWORK)
    resident = load(folder, device="cpu").generate(b"a prompt", max_bytes=24)
    short_memory()
    streamed = load(folder, device="cpu")
    assert isinstance(streamed.network.hash_embedding, DiskTable)
    assert streamed.network.hash_embedding.file_bytes == 4 * 2 * 97 * 32
    assert streamed.generate(b"a prompt", max_bytes=24) == resident


def test_a_file_that_was_cut(tmp_path, short_memory):
    load(blt_folder(tmp_path / "model", NETWORK), device="cpu").save(tmp_path / "own")
    short_memory()
    model = load(tmp_path / "own", device="cpu")
    mx.eval(model.network.parameters())
    with (tmp_path / "own" / "model.safetensors").open("r+b") as file:
        file.truncate(64)
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        model.network.hash_embedding(mx.array([1]))
