"""Small checkpoints written by torch (tests/peers/make_fixtures.py) give the numbers of their own implementations."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from torch_writer import View, document, write_legacy, write_zip

from marlin_cli import load
from marlin_cli.api import capability_of
from marlin_cli.checkpoints import ImportOptions, architecture_of, fingerprint, read_checkpoint
from marlin_cli.checkpoints.torch_file import TorchFile
from marlin_cli.errors import CheckpointError

FOREIGN = Path(__file__).parents[1] / "data" / "foreign"
OPTIONS = {
    "megabyte_pytorch-2-stages": ImportOptions(heads=3, max_bytes=64),
    "megabyte_pytorch-3-stages": ImportOptions(),
    "paper": ImportOptions(),
}
# What the paper's fixture was made with, all of which its model_config says.
PAPER = ImportOptions(rope=True, activation="relu", norm="layernorm", attention_window=0)
TOLERANCE = 1e-4


@pytest.fixture(params=OPTIONS)
def foreign(request):
    """A checkpoint's name, the model read from it and its golden arrays."""
    golden = mx.load(str(FOREIGN / f"{request.param}.safetensors"))
    model = load(FOREIGN / f"{request.param}.pt", device="cpu", options=OPTIONS[request.param])
    return request.param, model, {name: np.array(array) for name, array in golden.items()}


def test_logits_are_those_of_the_original(foreign):
    name, model, golden = foreign
    logits = np.array(model.logits(golden["bytes"].tobytes()))
    # MEGABYTE-pytorch gives no logits of the first byte beside others.
    logits = logits[len(logits) - len(golden["logits"]) :]
    assert np.abs(logits - golden["logits"]).max() < TOLERANCE
    assert np.abs(golden["logits"]).max() > 0.5


def test_greedy_bytes_are_those_of_the_original(foreign):
    _, model, golden = foreign
    for prompt, key in ((b"", "greedy_from_nothing"), (golden["bytes"].tobytes()[:9], "greedy")):
        expected = golden[key].tobytes()
        assert model.generate(prompt, max_bytes=len(expected), temperature=0.0) == expected


@pytest.mark.parametrize("name", OPTIONS)
def test_a_model_saved_again_is_the_same(name, tmp_path):
    model = load(FOREIGN / f"{name}.pt", device="cpu", options=OPTIONS[name])
    model.save(tmp_path / "native")
    again = load(tmp_path / "native", device="cpu")
    assert again.config == model.config
    assert mx.array_equal(again.logits(b"a few bytes"), model.logits(b"a few bytes"))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (
            "megabyte_pytorch-2-stages",
            {"patch_size": 4, "max_bytes": 64, "global_heads": 3, "global_head_dim": 4, "global_positions": "none"},
        ),
        (
            "megabyte_pytorch-3-stages",
            {
                "patch_size": 8,
                "max_bytes": 64,
                "global_heads": 3,
                "global_positions": "learned+rope",
                "vocab_size": 256,
            },
        ),
        (
            "paper",
            {"patch_size": 4, "max_bytes": 64, "global_heads": 4, "qk_norm": True, "ffn": "relu", "bos_byte": 255},
        ),
    ],
)
def test_shapes_and_keys_reveal_the_configuration(name, found):
    config = read_checkpoint(FOREIGN / f"{name}.pt", OPTIONS[name]).config
    assert {key: config[key] for key in found} == found


def test_a_width_of_heads_that_nothing_reveals_is_the_constructors():
    with pytest.raises(CheckpointError, match="heads 64 wide do not divide an attention 12 wide; give heads"):
        read_checkpoint(FOREIGN / "megabyte_pytorch-2-stages.pt")


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("megabyte_pytorch-3-stages", ImportOptions(heads=6), "heads is 3 by the checkpoint, but 6 was given"),
        ("megabyte_pytorch-3-stages", ImportOptions(max_bytes=65), "max_bytes is 64"),
        ("megabyte_pytorch-3-stages", ImportOptions(rope=False), "rope is True"),
        ("megabyte_pytorch-2-stages", ImportOptions(heads=5), "5 heads do not divide an attention 12 wide"),
        ("megabyte_pytorch-2-stages", ImportOptions(heads=3, max_bytes=63), "max_bytes is 60"),
        ("paper", ImportOptions(activation="silu"), "activation is relu"),
    ],
)
def test_options_that_contradict_the_checkpoint_are_refused(name, options, says):
    with pytest.raises(CheckpointError, match=says):
        read_checkpoint(FOREIGN / f"{name}.pt", options)


@pytest.mark.parametrize("vocab_size", [257, 1 << 40, 0, -1])
def test_more_ids_than_embeddings_are_refused(vocab_size, paper_tensors, tmp_path):
    saved = {"model_config": {"d_key": 4, "vocab_size": vocab_size}, "state_dict": paper_tensors}
    with pytest.raises(CheckpointError, match="vocab_size of model_config is .*, the embeddings have 256 rows"):
        read_checkpoint(write_zip(tmp_path / "model.pt", saved))


@pytest.fixture(scope="module")
def paper_tensors():
    """The state dict of the paper's fixture, as NumPy arrays by their own names."""
    file = TorchFile(FOREIGN / "paper.pt")
    return {name: np.array(array) for name, array in file.arrays(file.document["state_dict"]).items()}


WRAPPINGS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state},
    "model_state_dict": lambda state: {"model_state_dict": state, "args": {"lr": 0.1}},
    "two deep": lambda state: {"checkpoint": {"model": state}},
    "data parallel": lambda state: {f"module.{name}": array for name, array in state.items()},
    "compiled": lambda state: {"state_dict": {f"module._orig_mod.{name}": array for name, array in state.items()}},
}


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_wrapped_state_dicts(wrapping, write, paper_tensors, tmp_path):
    path = write(tmp_path / "model.pt", WRAPPINGS[wrapping](paper_tensors))
    read = read_checkpoint(path, PAPER)
    expected = read_checkpoint(FOREIGN / "paper.pt")
    assert read.config == expected.config
    assert read.weights.keys() == expected.weights.keys()
    assert all(mx.array_equal(read.weights[name], array) for name, array in expected.weights.items())


def test_safetensors_and_a_folder_with_one_file(paper_tensors, tmp_path):
    arrays = {name: mx.array(array) for name, array in paper_tensors.items()}
    mx.save_safetensors(str(tmp_path / "weights.safetensors"), arrays)
    from_file = read_checkpoint(tmp_path / "weights.safetensors", PAPER)
    from_folder = read_checkpoint(tmp_path, PAPER)
    assert from_file.layout == from_folder.layout == "paper"
    assert from_file.config == from_folder.config == read_checkpoint(FOREIGN / "paper.pt").config
    assert fingerprint(tmp_path) == fingerprint(tmp_path / "weights.safetensors")


def test_options_that_make_another_network_count_in_a_fingerprint():
    path = FOREIGN / "megabyte_pytorch-2-stages.pt"
    prints = [fingerprint(path, each) for each in (None, ImportOptions(heads=3), ImportOptions(heads=1))]
    assert len(set(prints)) == 3
    assert fingerprint(path, ImportOptions(heads=3, max_bytes=64, heads_by_trial=True)) == prints[1]


def test_options_stand_in_for_a_missing_model_config(paper_tensors, tmp_path):
    path = write_zip(tmp_path / "model.pt", paper_tensors)
    options = ImportOptions(rope=True, activation="silu", norm="variance", attention_window=2)
    config = read_checkpoint(path, options).config
    assert (config["ffn"], config["norm"], config["attention_window"]) == ("silu", "variance", 2)
    assert config["global_positions"] == "learned+rope"


# Reading of torch's tensors


STORED = {
    "float32": (np.arange(6, dtype="<f4"), mx.float32),
    "float64": (np.arange(6, dtype="<f8"), mx.float32),
    "float16": (np.arange(6, dtype="<f2"), mx.float16),
    "bfloat16": ((np.arange(6, dtype="<f4").view("<u4") >> 16).astype("<u2"), mx.bfloat16),
    "int64": (np.arange(6, dtype="<i8"), mx.int64),
    "uint8": (np.arange(6, dtype="u1"), mx.uint8),
}


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize("dtype", STORED)
def test_types_and_strided_views_of_storages(dtype, write, tmp_path):
    storage, expected_dtype = STORED[dtype]
    views = {
        "whole": View(storage, (2, 3), (3, 1)),
        "transposed": View(storage, (3, 2), (1, 3)),
        "tail": View(storage, (2,), (2,), offset=3),
        "scalar": View(storage, (), (), offset=4),
        "empty": View(storage, (0, 3), (3, 1)),
    }
    file = TorchFile(write(tmp_path / "views.pt", views))
    arrays = file.arrays(file.document)
    assert {array.dtype for array in arrays.values()} == {expected_dtype}
    values = {name: np.array(array.astype(mx.float32)).tolist() for name, array in arrays.items()}
    assert values == {
        "whole": [[0, 1, 2], [3, 4, 5]],
        "transposed": [[0, 3], [1, 4], [2, 5]],
        "tail": [3, 5],
        "scalar": 4,
        "empty": [],
    }


def test_values_beside_tensors_come_as_they_are(tmp_path):
    value = {"none": None, "flags": [True, False], "numbers": (1, -(1 << 40), 2.5), "text": "é\n", 7: {"deep": []}}
    assert TorchFile(write_zip(tmp_path / "values.pt", value)).document == value


def test_only_the_tensors_asked_for_are_read(tmp_path):
    # The optimizer's storage is left out of the file, and not missed.
    path = tmp_path / "model.pt"
    value = {"a": np.ones(3, "f4"), "optimizer": {"state": np.ones(4, "f4")}}
    assert document(value).storages.keys() == {"0", "1"}
    file = TorchFile(write_zip(path, value, leave_out="archive/data/1"))
    assert file.arrays({"a": file.document["a"]})["a"].tolist() == [1, 1, 1]
    with pytest.raises(CheckpointError, match="storage '1'"):
        file.arrays({"state": file.document["optimizer"]["state"]})


NO_MODEL = {
    "an empty folder": (lambda folder: None, r"model: expected config.json or one weights file, found none; name the file"),
    "folders of a training": (
        lambda folder: (folder / "checkpoint-500").mkdir(),
        r"model: expected config.json or one weights file, found none; name the file",
    ),
    "weights of another architecture": (
        lambda folder: mx.save_safetensors(str(folder / "model.safetensors"), {"canine.pooler.dense.bias": mx.ones(2)}),
        r"model.safetensors: of no known layout \(found 'canine.pooler.dense.bias'\); known: .*config.json of a .*CANINE",
    ),
    "a state dict of another": (
        lambda folder: write_zip(folder / "model.pt", {"wte.weight": np.ones((2, 2))}),
        r"model.pt: of no known layout \(found 'wte.weight'\)",
    ),
}


@pytest.mark.parametrize("case", NO_MODEL)
def test_where_no_model_is_none_is_named(case, tmp_path):
    write, says = NO_MODEL[case]
    (tmp_path / "model").mkdir()
    write(tmp_path / "model")
    for ask in (architecture_of, capability_of, load):
        with pytest.raises(CheckpointError, match=says):
            ask(tmp_path / "model")


@pytest.mark.parametrize("prefix", ["", "net.", "_orig_mod.module."])
def test_names_alone_tell_a_megabyte(prefix, tmp_path):
    names = ("to_logits.weight", "token_embs.0.weight", "start_tokens.0")
    mx.save_safetensors(str(tmp_path / "any.safetensors"), {f"{prefix}{name}": mx.ones(1) for name in names})
    assert architecture_of(tmp_path / "any.safetensors") == "megabyte"
