"""Hugging Face folders of ByT5: the numbers of transformers, every way to store them, and what is refused."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli import ByT5Model, load
from marlin_cli.checkpoints import fingerprint, read_checkpoint
from marlin_cli.checkpoints.hugging_face import config_of, names_of
from marlin_cli.engine.answer_requests import AnswerLimits
from marlin_cli.engine.beams import Beams
from marlin_cli.errors import CheckpointError, ConfigError

DATA = Path(__file__).parents[1] / "data" / "byt5"
SOURCES = [b"bytes \x00\xff", b"another, longer input"]
STRAY = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


@pytest.fixture
def folder(tmp_path):
    shutil.copytree(DATA / "gated", tmp_path / "model")
    return tmp_path / "model"


def edit(folder, **changes):
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(document | changes))


def rewrite(folder, change):
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)


@pytest.mark.parametrize("name", ["gated", "relu"])
def test_the_numbers_of_transformers(name):
    expected = {key: np.array(value) for key, value in mx.load(str(DATA / f"{name}.safetensors")).items()}
    model = load(DATA / name, device="cpu")
    assert isinstance(model, ByT5Model)
    assert np.abs(np.array(model.encode(SOURCES[0])) - expected["states"]).max() < 1e-5
    assert np.abs(np.array(model.logits(SOURCES[0], b"target")) - expected["logits"]).max() < 1e-5
    for key, beams in (("greedy", None), ("beams", Beams(4))):
        found = [answers[0].ids for answers in model.answers(SOURCES, AnswerLimits(12), None, beams)]
        for ids, row in zip(found, expected[key].tolist(), strict=True):
            assert list(ids) == (row[: row.index(1)] if 1 in row else row)[: len(row)]


def test_shards_and_a_stray_key(folder):
    whole = read_checkpoint(folder)
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(tensors)
    names = sorted(tensors)
    parts = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in parts.items():
        extra = {STRAY: mx.zeros((32, 2))} if file[0] == "a" else {}
        mx.save_safetensors(str(folder / file), {name: tensors[name] for name in part} | extra)
    (folder / "model.safetensors").unlink()
    table = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))
    again = read_checkpoint(folder)
    assert again.config == whole.config and again.weights.keys() == whole.weights.keys()
    assert all(mx.array_equal(array, whole.weights[name]) for name, array in again.weights.items())


def test_aliases_of_the_embeddings(folder):
    rewrite(folder, lambda t: t.update({"encoder.embed_tokens.weight": t.pop("shared.weight")}))
    assert load(folder, device="cpu").config.vocab_size == 384
    rewrite(folder, lambda t: t.update({"shared.weight": t["encoder.embed_tokens.weight"] + 1}))
    with pytest.raises(CheckpointError, match="should be the same table"):
        load(folder)


def test_an_encoder_alone(folder):
    states = load(folder, device="cpu").encode(b"abc")
    rewrite(folder, lambda t: [t.pop(name) for name in list(t) if name.startswith(("decoder.", "lm_head."))])
    encoder = load(folder, device="cpu")
    assert encoder.config.decoder_layers == 0
    assert mx.array_equal(encoder.encode(b"abc"), states)


LABELS = ("O", "A", "B")


def label_bytes(tensors):
    """The folder's encoder, as transformers' T5ForTokenClassification has it."""
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith(("shared.", "encoder."))}
    tensors.clear()
    tensors.update({f"transformer.{name}": tensor for name, tensor in kept.items()})
    d_model = kept["shared.weight"].shape[1]
    tensors["classifier.weight"] = mx.arange(3 * d_model).reshape(3, d_model).astype(mx.float32) % 7 - 3
    tensors["classifier.bias"] = mx.array([0.0, 1.0, -1.0])


def test_an_encoder_that_labels_bytes(folder, tmp_path):
    plain = load(folder, device="cpu").encode(SOURCES[1])
    rewrite(folder, label_bytes)
    edit(folder, id2label={str(index): label for index, label in enumerate(LABELS)})
    model = load(folder, device="cpu")
    assert mx.allclose(model.encode(SOURCES[1]), plain, atol=1e-6)
    assert model.config.labels == LABELS and model.config.decoder_layers == 0
    assert mx.allclose(
        model.network.label_scores(plain), plain @ model.network.output.weight.T + mx.array([0, 1, -1]), atol=1e-4
    )
    spans = model.label(SOURCES[1])
    assert {span.label for span in spans} <= {"A", "B"}
    model.save(tmp_path / "own")
    assert load(tmp_path / "own", device="cpu").label(SOURCES[1]) == spans
    # Under transformers' names again.
    config = read_checkpoint(tmp_path / "own").config
    assert names_of(config)["output.bias"] == "classifier.bias"
    assert names_of(config)["encoder.norm.weight"] == "transformer.encoder.final_layer_norm.weight"
    assert config_of(config | {"activation": "gelu_tanh"})["architectures"] == ["T5ForTokenClassification"]
    assert config_of(config)["id2label"] == {"0": "O", "1": "A", "2": "B"}


def test_labels_that_do_not_fit(folder):
    rewrite(folder, label_bytes)
    for table, error, message in (
        ({"0": "O"}, CheckpointError, "the classifier has 3 rows, and id2label names 1; it must have 0 to 2"),
        (None, CheckpointError, "the classifier has 3 rows, and id2label names 2"),
        (["O", "A", "B"], ConfigError, "id2label should be a table of numbers and names, found list"),
    ):
        edit(folder, id2label=table)
        with pytest.raises(error, match=message):
            read_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "kind"), [("classification_head.dense", "SequenceClassification"), ("qa_outputs", "QuestionAnswering")]
)
def test_heads_that_read_the_decoder_are_named(folder, name, kind):
    rewrite(folder, lambda tensors: tensors.update({f"{name}.weight": mx.zeros((2, 2))}))
    with pytest.raises(CheckpointError, match=f"holds a T5For{kind}, whose head reads the decoder"):
        read_checkpoint(folder)


def test_ids_of_the_generation_config_go_first(folder):
    (folder / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": 259, "eos_token_id": [1, 2]}))
    config = load(folder, device="cpu").config
    assert (config.start_id, config.end_id, config.answer_ends, config.pad_id) == (259, 1, (1, 2), 0)
    before = fingerprint(folder)
    (folder / "generation_config.json").unlink()
    assert fingerprint(folder) != before


def test_what_is_not_t5_over_bytes_is_refused(folder):
    for changes, message in (
        ({"vocab_size": 32128}, "pieces of words"),
        ({"feed_forward_proj": "gated-tanh"}, "gated-tanh"),
        ({"vocab_size": 1025}, "vocab_size is 1025, more than 1,024"),
        ({"vocab_size": 10**4000}, "vocab_size is <a whole number of"),
        ({"feed_forward_proj": ["relu"]}, "feed_forward_proj \\['relu'\\] is none of"),
        ({"d_model": "8"}, "d_model should be a whole number, found str '8'"),
        ({"d_model": 8.0}, "d_model should be a whole number, found float 8.0"),
        ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon should be a number, found str 'small'"),
        ({"d_ff": 10**4000}, "ffn_dim is <a whole number of [0-9,]+ bits>, more than"),
        ({"num_layers": 3}, "encoder.block.2.* is missing"),
        ({"num_layers": 1}, "no place for the tensor 'encoder.block.1"),
        ({"d_ff": 16}, "the configuration asks for"),
    ):
        shutil.copy(DATA / "gated" / "config.json", folder / "config.json")
        edit(folder, **changes)
        with pytest.raises((ConfigError, CheckpointError), match=message):
            load(folder, device="cpu")


def test_an_unknown_tensor_is_named(folder):
    rewrite(folder, lambda t: t.update({"classifier.weight": mx.zeros((2, 8))}))
    with pytest.raises(CheckpointError, match=r"classifier\.weight"):
        load(folder)


def test_an_untied_head_that_is_missing(folder):
    """As transformers 4 has it; `test_t5_head.py` has all combinations."""
    rewrite(folder, lambda t: t.pop("lm_head.weight"))
    edit(folder, transformers_version="4.57.6", tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' is missing; with tie_word_embeddings false"):
        load(folder)
