"""A model inside the files of training scripts: found under any wrapper, one copy of several, nothing lost in silence."""

import warnings

import mlx.core as mx
import numpy as np
import pytest
from foreign_states import lucid_state, state_of
from torch_writer import Opcodes, document, write_legacy, write_zip

from marlin_cli.checkpoints import ImportOptions, read_checkpoint
from marlin_cli.errors import AssumptionWarning, CheckpointError

GIVEN = {"heads": 4, "max_bytes": 64}
MODEL = lucid_state(dims=(16, 8), inner=16)
MEAN = lucid_state(dims=(16, 8), inner=16, seed=1)
BIAS = "output.bias"


def under(prefix, state):
    return {f"{prefix}{name}": array for name, array in state.items()}


def read(path, **options):
    """Which model was read, and what was said of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AssumptionWarning)
        checkpoint = read_checkpoint(path, ImportOptions(**{**GIVEN, **options}))
    bias = np.array(checkpoint.weights[BIAS])
    which = {"model": MODEL, "ema": MEAN}
    (name,) = [name for name, state in which.items() if np.array_equal(bias, state["to_logits.bias"])]
    return name, [str(each.message) for each in caught]


COUNTERS = {"initted": np.array(True), "step": np.array(7)}
ADAM = {"state": {0: {"exp_avg": np.ones(3, "f4"), "step": np.array(7.0, "f4")}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
EMA = {**under("ema_model.", MEAN), **under("online_model.", MODEL)}

# As the libraries write them: what is read, and what is said.
FILES = {
    "DDP": (under("module.", MODEL), "model", ""),
    "torch.compile of parts": (
        {name.replace("transformers.0.", "transformers.0._orig_mod."): array for name, array in MODEL.items()},
        "model",
        "",
    ),
    "FSDP": (
        under("_fsdp_wrapped_module.", {n.replace(".0.", ".0._fsdp_wrapped_module."): a for n, a in MODEL.items()}),
        "model",
        "",
    ),
    "recomputed activations": (
        {name.replace(".layers.0.", ".layers.0._checkpoint_wrapped_module."): array for name, array in MODEL.items()},
        "model",
        "",
    ),
    "DeepSpeed": ({"module": MODEL, "optimizer": ADAM, "global_steps": 3}, "model", ""),
    "accelerate": ({"model": under("_orig_mod.", MODEL), "optimizer": ADAM, "scaler": {"scale": np.ones(())}}, "model", ""),
    "Lightning": (
        {"state_dict": under("net.", MODEL), "optimizer_states": [ADAM], "hyper_parameters": {"lr": 0.1}, "epoch": 3},
        "model",
        "",
    ),
    "Lightning with more than the model": (
        {"state_dict": {**under("model.", MODEL), "loss.weight": np.ones((2, 3), "f4"), "seen": np.ones(1, "f4")}},
        "model",
        "the model stands under 'state_dict.model.'; 1 other tensors are left out, such as 'state_dict.loss.weight'",
    ),
    "ema_pytorch": ({**COUNTERS, **EMA}, "ema", "nothing in it tells weights; assumed weights=ema;"),
    "ema_pytorch without the model": ({**COUNTERS, **under("ema_model.", MEAN)}, "ema", ""),
    "ema_pytorch of old": ({"initted": np.ones(1, "f4"), "step": np.ones(1, "f4"), **under("ema_model.", MEAN)}, "ema", ""),
    "a trainer with ema_pytorch": (
        {"step": 5, "model": MODEL, "ema": {**COUNTERS, **EMA}, "opt": ADAM, "version": "1.0"},
        "ema",
        "assumed weights=ema;",
    ),
    "Lightning with ema_pytorch": (
        {"state_dict": {**under("model.", MODEL), **under("ema.", {**COUNTERS, **EMA})}},
        "ema",
        "assumed weights=ema;",
    ),
    "timm": ({"state_dict": MODEL, "state_dict_ema": MEAN, "epoch": 1}, "ema", "assumed weights=ema;"),
    "AveragedModel": ({"n_averaged": np.array(3), **under("module.", MODEL)}, "model", ""),
    "torch-ema, without names": (
        {"model": MODEL, "ema": {"decay": 0.99, "shadow_params": [np.ones(3, "f4")], "collected_params": None}},
        "model",
        "",
    ),
}


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize("case", FILES)
def test_files_of_training_scripts(case, write, tmp_path):
    content, which, says = FILES[case]
    found, messages = read(write(tmp_path / "model.pt", content))
    assert found == which
    assert [says in message for message in messages] == ([True] if says else [])


FLAT = [case for case, (content, *_) in FILES.items() if all(isinstance(each, np.ndarray) for each in content.values())]


@pytest.mark.parametrize("case", FLAT)
def test_the_same_in_safetensors(case, tmp_path):
    content, which, says = FILES[case]
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {name: mx.array(array) for name, array in content.items()})
    found, messages = read(tmp_path / "model.safetensors")
    assert found == which
    assert [says in message for message in messages] == ([True] if says else [])


@pytest.mark.parametrize("case", ["ema_pytorch", "a trainer with ema_pytorch", "Lightning with ema_pytorch", "timm"])
def test_a_copy_that_is_asked_for(case, tmp_path):
    path = write_zip(tmp_path / "model.pt", FILES[case][0])
    assert read(path, weights="model") == ("model", [])
    assert read(path, weights="ema") == ("ema", [])
    assert read_checkpoint(path, ImportOptions(**GIVEN, weights="ema")).marlin is None
    with pytest.warns(AssumptionWarning):
        assert read_checkpoint(path, ImportOptions(**GIVEN)).marlin == {"assumed": {"weights": "ema"}}


def test_the_papers_layout_with_its_options_beside_the_mean(tmp_path):
    state, content = state_of("paper")
    mean = {**COUNTERS, **under("ema_model.", state)}
    path = write_zip(tmp_path / "ckpt.pt", {"model_config": content["model_config"], "ema": mean})
    # The options stand beside the table of the tensors.
    checkpoint = read_checkpoint(path)
    assert checkpoint.config["global_positions"] == "learned+rope"


REFUSED = {
    "no mean": ({"model": MODEL}, {"weights": "ema"}, "weights is ema, but the file holds no mean over the training"),
    "the mean alone": ({"ema": MEAN}, {"weights": "model"}, "the file holds the mean over the training alone"),
    "two models": ({"student": MODEL, "teacher": MEAN}, {}, "holds 2 models, under 'student.' and 'teacher.'; save the state"),
    "one name twice": ({**MODEL, "_orig_mod.to_logits.bias": np.ones(256, "f4")}, {}, "are names of one tensor"),
    "a part that is missing": (
        {"model": {name: array for name, array in MODEL.items() if name != "to_logits.bias"}},
        {},
        "the tensor 'to_logits.bias' is missing",
    ),
    "an extra part": ({"model": {**MODEL, "adapter.weight": np.ones((2, 2), "f4")}}, {}, "no place for the tensor 'adapter."),
    "an optimizer alone": ({"optimizer": ADAM}, {}, "holds no tensors"),
    "another model": ({"state_dict": {"model.wte.weight": np.ones((2, 2))}}, {}, "of no known layout (found 'wte.weight')"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_holds_no_single_model(case, tmp_path):
    content, options, says = REFUSED[case]
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(write_zip(tmp_path / "model.pt", content), ImportOptions(**{**GIVEN, **options}))
    assert says in str(caught.value)


def test_tables_that_hold_themselves(tmp_path):
    text = b"X\x05\x00\x00\x00model"
    itself = b"}q\x00" + text + b"h\x00s"  # {"model": the same dict}
    for write in (write_zip, write_legacy):
        with pytest.raises(CheckpointError, match="holds no tensors"):
            read_checkpoint(write(tmp_path / "model.pt", Opcodes(itself)))


def test_tables_that_multiply(tmp_path):
    """Each of 40 dicts holds the one before under 20 names: 20^40 ways to reach the last."""
    names = [b"X\x01\x00\x00\x00" + bytes([97 + index]) for index in range(20)]
    content = b"}q\x00"
    for level in range(40):
        content += b"}(" + b"".join(name + b"h" + bytes([level]) for name in names) + b"uq" + bytes([level + 1])
    with pytest.raises(CheckpointError, match="holds no tensors"):
        read_checkpoint(write_zip(tmp_path / "model.pt", Opcodes(content)))


def test_a_table_under_two_names_is_one_model(tmp_path):
    shared = document(MODEL)
    body = shared.pickle[2:-1]
    shared.pickle = b"\x80\x02}(" + b"X\x01\x00\x00\x00a" + body + b"q\x00" + b"X\x01\x00\x00\x00b" + b"h\x00" + b"u."
    assert read(write_zip(tmp_path / "model.pt", shared)) == ("model", [])
