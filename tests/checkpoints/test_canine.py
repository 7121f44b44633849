"""Folders of CANINE and LA-CANINE: every way to store them, what their configurations say, and what is refused."""

import json
import re

import mlx.core as mx
import numpy as np
import pytest
from canine_cases import DATA, LA_KINDS, LA_TINY, TINY, random_canine, random_la_canine, weight, write_folder
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file
from torch_writer import tensor, write_zip

from marlin_cli import load
from marlin_cli.checkpoints import ImportOptions, architecture_of, canine, fingerprint, la_canine, read_checkpoint
from marlin_cli.config import from_mapping
from marlin_cli.errors import CheckpointError, ConfigError
from marlin_cli.models import config_as_mapping, linear_layers
from marlin_cli.models.canine import CanineConfig
from marlin_cli.models.la_canine import LaCanineConfig
from marlin_cli.tensor_files import safetensors_header

LABELS = {str(index): f"L{index}" for index in range(3)}
CONFIG = {**TINY, "model_type": "canine", "architectures": ["CanineForTokenClassification"], "id2label": LABELS}


@pytest.fixture(scope="module")
def shapes():
    return json.loads(safetensors_header(DATA / "canine_golden.safetensors")[1]["shapes"])["TokenClassification"]


@pytest.fixture(scope="module")
def la_shapes():
    return json.loads((DATA / "la_canine_golden.json").read_text())["shapes"]


def same(one, other):
    return one.keys() == other.keys() and all(mx.array_equal(array, other[name]).item() for name, array in one.items())


def test_every_way_to_store_one(shapes, tmp_path):
    whole = read_checkpoint(write_folder(tmp_path / "whole", CONFIG, shapes))
    assert whole.layout == "canine" and whole.config["labels"] == ("L0", "L1", "L2")
    from_mapping(CanineConfig, whole.config, "here")
    # Shards, with the buffer of older files.
    folder = write_folder(tmp_path / "shards", CONFIG, dict(list(shapes.items())[:20]), "a.safetensors")
    write_folder(
        folder, CONFIG, dict(list(shapes.items())[20:]) | {"canine.char_embeddings.position_ids": [1, 4]}, "b.safetensors"
    )
    table = {name: "a.safetensors" if index < 20 else "b.safetensors" for index, name in enumerate(shapes)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    assert same(read_checkpoint(folder).weights, whole.weights)
    # A pickle.
    folder = tmp_path / "pickle"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_zip(folder / "pytorch_model.bin", {name: tensor(weight(name, tuple(shape))) for name, shape in shapes.items()})
    assert same(read_checkpoint(folder).weights, whole.weights)
    assert fingerprint(folder) != fingerprint(tmp_path / "whole")


def test_a_body_alone_has_no_prefix(shapes, tmp_path):
    body = {name.removeprefix("canine."): shape for name, shape in shapes.items() if not name.startswith("classifier")}
    found = read_checkpoint(write_folder(tmp_path / "body", CONFIG | {"architectures": ["CanineModel"]}, body))
    assert (found.config["head"], found.config["pooler"], "labels" in found.config) == ("none", True, False)
    for name in [name for name in body if name.startswith("pooler")]:
        del body[name]
    found = read_checkpoint(write_folder(tmp_path / "bare", CONFIG | {"architectures": ["CanineModel"]}, body))
    assert not from_mapping(CanineConfig, found.config, "here").pooler


def test_convolutions_are_products_over_windows(shapes, tmp_path):
    weights = read_checkpoint(write_folder(tmp_path / "model", CONFIG, shapes)).weights
    for ours, theirs in (("down", "chars_to_molecules"), ("up", "projection")):
        kernel = weight(f"canine.{theirs}.conv.weight", tuple(shapes[f"canine.{theirs}.conv.weight"]))
        product = np.array(weights[f"local.{ours}.conv.weight"])
        out, width, steps = kernel.shape
        assert product.shape == (out, steps * width)
        assert (product[5, 2 * width + 7], product[1, 0]) == (kernel[5, 7, 2], kernel[1, 0, 0])


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"hidden_act": "gelu_new"}, "activation", "gelu_tanh"),
        ({"problem_type": "multi_label_classification"}, "problem", "several_labels"),
        ({"problem_type": "regression"}, "problem", "regression"),
        ({}, "problem", "one_label"),
        ({}, "second_type", 1),
        ({"transformers_version": "4.57.6"}, "second_type", 1),
        ({"transformers_version": "5.24.0"}, "second_type", 0),
        ({"transformers_version": "10.0"}, "second_type", 0),
        ({"local_transformer_stride": 64}, "block_characters", 64),
    ],
)
def test_what_a_configuration_says(changes, field, value, shapes, tmp_path):
    assert canine.read(write_folder(tmp_path / "model", CONFIG | changes, shapes)).config[field] == value


def test_labels_that_transformers_leaves_out(shapes, tmp_path):
    two = shapes | {"classifier.weight": [2, 32], "classifier.bias": [2]}
    config = {name: value for name, value in CONFIG.items() if name != "id2label"}
    assert canine.read(write_folder(tmp_path / "two", config, two)).config["labels"] == ("LABEL_0", "LABEL_1")
    with pytest.raises(CheckpointError, match="the classifier has 3 rows, and id2label names 2"):
        canine.read(write_folder(tmp_path / "three", config, shapes))
    one = shapes | {"classifier.weight": [1, 32], "classifier.bias": [1]}
    found = canine.read(write_folder(tmp_path / "one", CONFIG | {"id2label": {"0": "yes"}}, one)).config
    assert (found["labels"], found["problem"]) == (("yes",), "several_labels")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": {"0": "a", "1": "b", "3": "c"}}, "id2label names 3; it must have 0 to 2"),
        ({"id2label": ["a"]}, "id2label should be a table"),
        ({"id2label": {"0": 1, "1": 2, "2": 3}}, "id2label should be a table"),
        ({"architectures": None}, "architectures does not say which"),
        ({"architectures": ["BertModel"]}, "architectures does not say which"),
        ({"architectures": ["CanineForQuestionAnswering"]}, "architectures does not say which"),
        ({"hidden_act": "tanh"}, "hidden_act 'tanh' is none of"),
        ({"hidden_act": ["gelu"]}, "hidden_act"),
        ({"hidden_act": []}, "hidden_act"),
        ({"hidden_act": 0}, "hidden_act"),
        ({"problem_type": "other"}, "problem_type 'other'"),
        ({"problem_type": {}}, "problem_type"),
        ({"hidden_size": "32"}, "hidden_size should be a number"),
        ({"num_hidden_layers": 3}, "encoder.layer.2"),
        ({"num_hidden_layers": 1 << 40}, "asks for 1099511627776 layers, the file holds"),
        ({"num_hidden_layers": -1}, "no place for the tensor 'encoder.layer.0"),
        ({"num_hidden_layers": 1}, "no place for the tensor 'encoder.layer.1"),
        ({"num_hash_functions": 8}, "HashBucketCodepointEmbedder_4"),
    ],
)
def test_what_does_not_fit_is_one_line(changes, message, shapes, tmp_path):
    with pytest.raises((ConfigError, CheckpointError), match=message) as found:
        read_checkpoint(write_folder(tmp_path / "model", CONFIG | changes, shapes))
    assert "\n" not in str(found.value) and str(tmp_path) in str(found.value)


@pytest.mark.parametrize("shape", [[32, 64], [0, 64, 4]])
def test_a_kernel_that_is_none(shape, shapes, tmp_path):
    expected = rf"model: 'projection.conv.weight' has shape {re.escape(str(shape))}, not 3 dimensions with numbers"
    with pytest.raises(CheckpointError, match=expected):
        canine.read(write_folder(tmp_path / "model", CONFIG, shapes | {"canine.projection.conv.weight": shape}))


@pytest.mark.parametrize(
    ("make", "changes"),
    [(random_canine, {"head": "token", "labels": ("a", "b")}), (random_la_canine, {"adapter_dim": 16, "language": "cs"})],
)
def test_marlins_own_folder_is_not_transformers(make, changes, tmp_path):
    network = make(**changes)
    (tmp_path / "config.json").write_text(json.dumps(config_as_mapping(network.config)))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(network.parameters())))
    assert read_checkpoint(tmp_path).layout == "native"
    assert from_mapping(type(network.config), read_checkpoint(tmp_path).config, "here") == network.config


def test_what_can_be_packed_and_what_not():
    paths = linear_layers(random_canine(head="sequence", labels=("a", "b"))).keys()
    assert {"local.down.conv", "local.up.conv", "local.first.attention.q_proj", "layers.1.ffn.down_proj", "output"} <= paths
    assert not any("pooler" in path or "embedding" in path for path in paths)


# LA-CANINE


def la_folder(tmp_path, la_shapes, kind, **changes):
    config = {**LA_TINY, **LA_KINDS[kind], "model_type": "la-canine"} | changes
    return write_folder(tmp_path / kind, config, la_shapes[kind])


def test_the_adapters_of_one_language_are_read(la_shapes, tmp_path):
    folder = la_folder(tmp_path, la_shapes, "on")
    assert la_canine.recognises(folder) and not canine.recognises(folder)
    found = la_canine.read(folder, "cs")
    assert (found.config["language"], found.config["adapter_dim"], found.config["rows"]) == ("cs", 16, 3)
    from_mapping(LaCanineConfig, found.config, "here")
    name = "canine.encoder.layer.1.output.lang_ff_down_weights.weight"
    row = weight(name, tuple(la_shapes["on"][name]))[la_canine.LANGUAGES.index("cs")]
    assert np.array_equal(np.array(found.weights["layers.1.adapter.down_proj.weight"]), row.reshape(32, 16).T)
    assert np.array_equal(np.array(found.weights["layers.1.adapter.up_proj.weight"]), row.reshape(16, 32).T)
    assert same(la_canine.read(folder, str(la_canine.LANGUAGES.index("cs"))).weights, found.weights)


def test_the_way_up_may_be_missing(la_shapes, tmp_path):
    shapes = {name: shape for name, shape in la_shapes["on"].items() if "lang_ff_up_weights" not in name}
    config = {**LA_TINY, **LA_KINDS["on"], "model_type": "la-canine"}
    assert la_canine.read(write_folder(tmp_path / "model", config, shapes), "de").config["language"] == "de"


def test_the_mask_says_how_far_ahead_the_first_layer_sees(la_shapes, tmp_path):
    """wtpsplit saves the number 0 and the right mask."""
    folder = la_folder(tmp_path, la_shapes, "lookahead", lookahead=0)
    assert la_canine.read(folder, "cs").config["lookahead"] == 0
    tensors = load_file(folder / "model.safetensors")
    mask = np.tril(np.ones((130, 130), dtype=np.uint8), 5).repeat(4, axis=0).repeat(4, axis=1)[None, None]
    name = f"canine.{la_canine.FIRST_MASK}"
    save_file(tensors | {name: mask, name.replace("initial_char_encoder", "encoder"): mask}, folder / "model.safetensors")
    assert la_canine.read(folder, "cs").config["lookahead"] == 5
    save_file(tensors | {name: mask[..., 1:]}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="no mask of whole molecules"):
        la_canine.read(folder, "cs")
    edited = json.loads((folder / "config.json").read_text()) | {"lookahead": None}
    (folder / "config.json").write_text(json.dumps(edited))
    assert la_canine.read(folder, "cs").config["lookahead"] is None


@pytest.mark.parametrize(
    ("kind", "language", "changes", "message"),
    [
        ("on", None, {}, r"holds adapters of 85 languages; name one \(--language or --import language=..\): af, am"),
        ("on", "xx", {}, "has no adapters of 'xx'; known: af, am"),
        ("on", "85", {}, "has no adapters of '85'"),
        ("on", "-1", {}, "has no adapters"),
        ("on", "٣", {}, "has no adapters"),
        ("off", "cs", {}, "holds no adapters of a language, 'cs' was asked for"),
        ("shared", "cs", {}, "holds no adapters of a language, 'cs' was asked for"),
        ("off", None, {"ngram_order": 2}, "ngram_order is 2; marlin runs 1"),
        ("off", None, {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ("off", None, {"language_adapter": "maybe"}, "language_adapter 'maybe' is none of"),
        ("off", None, {"language_adapter": "on"}, "lang_ff_down_biases.weight' is missing"),
        ("on", None, {"language_adapter": "off"}, "no place for the tensor"),
        ("off", None, {"language_adapter": ["on"]}, "language_adapter"),
        ("off", None, {"lookahead": "1"}, "lookahead should be a number"),
    ],
)
def test_adapters_and_languages_that_do_not_fit(kind, language, changes, message, la_shapes, tmp_path):
    with pytest.raises((ConfigError, CheckpointError), match=message) as found:
        la_canine.read(la_folder(tmp_path, la_shapes, kind, **changes), language)
    assert "\n" not in str(found.value)


def test_a_model_that_holds_another_language():
    la_canine.check_language({"language": "cs"}, "cs", "model")
    la_canine.check_language({"language": "cs"}, None, "model")
    with pytest.raises(CheckpointError, match="^model: holds the adapters of 'cs', 'de' was asked for"):
        la_canine.check_language({"language": "cs"}, "de", "model")
    with pytest.raises(CheckpointError) as found:
        la_canine.check_language({"language": "\ud800\n" + "x" * 5000}, "de", "model")
    assert str(found.value).encode() and "\n" not in str(found.value) and len(str(found.value)) < 300


def test_the_language_is_an_import_option(la_shapes, tmp_path):
    folder = la_folder(tmp_path, la_shapes, "on")
    assert architecture_of(folder) == "la_canine"
    czech = load(folder, device="cpu", options=ImportOptions(language="cs"))
    assert czech.config.language == "cs"
    german = load(folder, device="cpu", options=ImportOptions(language="de"))
    assert not mx.allclose(czech.encode(b"text"), german.encode(b"text"), atol=1e-3)
    with pytest.raises(CheckpointError, match="holds adapters of 85 languages; name one"):
        load(folder, device="cpu")
    # Of other statistics, as of another model.
    prints = {fingerprint(folder, ImportOptions(language=each)) for each in (None, "cs", "de")}
    assert len(prints) == 3 and fingerprint(folder) in prints
    # What marlin writes holds one language, and says which.
    czech.save(tmp_path / "own")
    assert architecture_of(tmp_path / "own") == "la_canine"
    own = load(tmp_path / "own", device="cpu", options=ImportOptions(language="cs"))
    assert mx.array_equal(own.encode(b"text"), czech.encode(b"text"))
    with pytest.raises(CheckpointError, match="holds the adapters of 'cs', 'de' was asked for; take the original"):
        load(tmp_path / "own", device="cpu", options=ImportOptions(language="de"))
    with pytest.raises(CheckpointError, match="option heads has no meaning here"):
        load(tmp_path / "own", device="cpu", options=ImportOptions(language="cs", heads=2))


@pytest.mark.parametrize("name", ["megabyte-demo", "canine"])
def test_a_language_for_a_model_that_has_none(name, shapes, tmp_path):
    path = name if name != "canine" else write_folder(tmp_path / "model", CONFIG, shapes)
    with pytest.raises(CheckpointError, match="option language has no meaning here"):
        load(path, device="cpu", options=ImportOptions(language="cs"))


def test_what_architectures_folders_are_of(shapes, tmp_path):
    assert architecture_of(write_folder(tmp_path / "model", CONFIG, shapes)) == "canine"
    load(tmp_path / "model", device="cpu").save(tmp_path / "own")
    assert architecture_of(tmp_path / "own") == "canine"


def test_a_folder_without_weights(tmp_path):
    for kind in ("canine", "la-canine"):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIG | {"model_type": kind}))
        with pytest.raises(CheckpointError, match="holds none of model.safetensors") as caught:
            load(folder, device="cpu")
        assert "\n" not in str(caught.value)
