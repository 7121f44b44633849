"""What a foreign file does not tell is said when it is assumed, and stands in every copy that is written of the model."""

import dataclasses
import json
import warnings

import mlx.core as mx
import numpy as np
import pytest
from foreign_states import FOREIGN, lucid_state, state_of
from torch_writer import write_zip
from typer.testing import CliRunner

from marlin_cli import load
from marlin_cli.checkpoints import ImportOptions, native, read_checkpoint
from marlin_cli.cli import app
from marlin_cli.commands import quantization_run
from marlin_cli.errors import AssumptionWarning, CheckpointError, ConfigError

LUCID = "megabyte_pytorch-2-stages"  # no rotary buffer, no learned positions


@pytest.fixture(scope="module")
def lucid(tmp_path_factory):
    """A checkpoint whose attention is one head of the constructor's width, or several narrower ones: no shape tells."""
    return write_zip(tmp_path_factory.mktemp("lucid") / "model.pt", lucid_state())


def said(path, options=None):
    """What is warned of when a checkpoint is read."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint = read_checkpoint(path, options)
    assert all(issubclass(each.category, AssumptionWarning) for each in caught)
    return checkpoint, [str(each.message) for each in caught]


def test_heads_and_context_that_nothing_tells(lucid):
    checkpoint, messages = said(lucid)
    assert messages == [
        f"{lucid}: nothing in it tells heads, max_bytes; assumed heads=1, max_bytes=4096;"
        " if that is wrong, say it with --import NAME=VALUE"
    ]
    assert checkpoint.marlin == {"assumed": {"heads": 1, "max_bytes": 4096}}
    checkpoint, messages = said(lucid, ImportOptions(heads=4))
    assert checkpoint.config["global_heads"] == 4
    assert len(messages) == 1 and "tells max_bytes; assumed max_bytes=4096" in messages[0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (LUCID, ImportOptions(heads=3, max_bytes=64)),
        (LUCID, ImportOptions(head_dim=4, max_bytes=64)),
        ("megabyte_pytorch-3-stages", ImportOptions()),
        ("paper", ImportOptions()),
    ],
)
def test_nothing_is_said_where_all_is_told(name, options):
    checkpoint, messages = said(FOREIGN / f"{name}.pt", options)
    assert not messages and checkpoint.marlin is None


def test_the_papers_layout_without_model_config(tmp_path):
    state, _ = state_of("paper")
    path = write_zip(tmp_path / "model.pt", state)
    checkpoint, (message,) = said(path)
    assert "assumed activation=relu, attention_window=0, norm=layernorm, rope=false;" in message
    given = ImportOptions(activation="silu", attention_window=2, norm="variance", rope=True)
    assert said(path, given)[1] == []
    # Where queries and keys are not normalised, and no pads lead, less is told.
    bare = {name: array for name, array in state.items() if "Q_layer_norm" not in name and "K_layer_norm" not in name}
    bare = {name: array for name, array in bare.items() if not name.endswith("_pad")}
    path = write_zip(tmp_path / "bare.pt", bare)
    checkpoint, (message,) = said(path, ImportOptions(heads=4))
    assert "attention_scale=0.5, attention_window=0, bos_byte=255, norm" in message and "heads" not in message
    told = said(path, ImportOptions(heads=4, attention_scale=0.25, bos_byte=7))[0].config
    assert (told["attention_scale"], told["bos_byte"]) == (0.25, 7)
    with pytest.raises(CheckpointError, match="heads 64 wide do not divide 16 and 8; give head_dim"):
        read_checkpoint(path)


def test_options_that_a_model_config_leaves_out_are_taken_or_assumed(tmp_path):
    state, document = state_of("paper")
    told = {name: value for name, value in document["model_config"].items() if name not in ("rope", "layer_norm")}
    path = write_zip(tmp_path / "model.pt", {"state_dict": state, "model_config": told})
    checkpoint, (message,) = said(path)
    assert "tells norm, rope; assumed norm=layernorm, rope=false" in message
    checkpoint, messages = said(path, ImportOptions(rope=True, norm="layernorm"))
    assert checkpoint.config["global_positions"] == "learned+rope" and not messages


def test_the_record_goes_with_every_copy(lucid, tmp_path, monkeypatch):
    assumed = {"heads": 1, "max_bytes": 4096}
    with pytest.warns(AssumptionWarning):
        model = load(lucid, device="cpu")
    model.save(tmp_path / "saved")
    model.quantize(global_bits=8).save(tmp_path / "packed in Python")
    monkeypatch.chdir(tmp_path)
    batch = np.arange(64, dtype=np.uint8)[None]
    monkeypatch.setattr(quantization_run, "batches_up_to", lambda *_: [("text", batch)])
    eight = ["--global-bits", "8"]
    commands = {
        "packed": ["quantize", str(lucid), *eight],
        "sequentially": ["quantize", str(lucid), *eight, "--sequential"],
        "unpacked": ["quantize", "packed", "--dequantize"],
        "exported": ["quantize", str(lucid), "--export", "compressed-tensors", "--override", "local=16bit"],
    }
    for folder, command in commands.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AssumptionWarning)
            result = CliRunner().invoke(app, [*command, "-o", folder], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    for folder in ("saved", "packed in Python", *commands):
        assert json.loads((tmp_path / folder / "config.json").read_text())["marlin"]["assumed"] == assumed
        assert said(tmp_path / folder)[1] == []  # it was said at the import


def test_rotary_frequencies_of_another_base_are_refused(tmp_path):
    state, _ = state_of("megabyte_pytorch-3-stages")
    name = "transformers.1.rotary_emb.inv_freq"
    path = write_zip(tmp_path / "model.pt", {**state, name: state[name] * 2})
    with pytest.raises(CheckpointError, match=r"1.rotary_emb.inv_freq' is not that of heads 4 wide and base 10000"):
        read_checkpoint(path)


def test_a_start_vector_for_each_of_thousands_of_stages(tmp_path):
    state, _ = state_of(LUCID)
    mx.save_safetensors(
        str(tmp_path / "model.safetensors"),
        {name: mx.array(array) for name, array in state.items()} | {f"start_tokens.{i}": mx.zeros(1) for i in range(2, 5000)},
    )
    with pytest.raises(CheckpointError, match="with 5,000 stages, more than 18"):
        read_checkpoint(tmp_path / "model.safetensors")


@pytest.mark.parametrize("bits", ["4", 5, True, None, [4], 10**400, -8])
def test_bits_of_the_cache_that_cannot_be(bits, tmp_path):
    model = load(FOREIGN / f"{LUCID}.pt", device="cpu", options=ImportOptions(heads=3, max_bytes=64))
    model.marlin = {"kv_bits": bits}
    model.save(tmp_path / "model")
    with pytest.raises(ConfigError, match="marlin's kv_bits in config.json is .*, expected 4, 8 or 16"):
        read_checkpoint(tmp_path / "model")


def test_layouts_with_a_configuration_may_assume_too(tmp_path, monkeypatch):
    load(FOREIGN / f"{LUCID}.pt", device="cpu", options=ImportOptions(heads=3, max_bytes=64)).save(tmp_path / "model")
    read = native.read
    monkeypatch.setattr(native, "read", lambda path: dataclasses.replace(read(path), assumed={"head": "tied"}))
    checkpoint, (message,) = said(tmp_path / "model")
    assert message == f"{tmp_path / 'model'}: nothing in it tells head; assumed head=tied"
    assert checkpoint.marlin == {"assumed": {"head": "tied"}}
