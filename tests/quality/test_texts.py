"""A model that encodes texts beside another: errors of states, equal labels, ends of sentences, and what is no comparison."""

import mlx.core as mx
import numpy as np
import pytest
from canine_cases import random_canine, random_la_canine

from marlin_cli.encoding_model import EncodingModel
from marlin_cli.engine.sentences import SplitSettings
from marlin_cli.errors import UsageError
from marlin_cli.ops.device import choose_device
from marlin_cli.quality.texts import TEXTS_AT_ONCE, measure_texts, readable

TEXTS = {
    "code": [b"def main():\n    pass\n", b"abcd"],
    "multilingual": ["Kůň úpěl. 東京は大きい。".encode()] * TEXTS_AT_ONCE + [b"last"],
}


def pair(make, **config):
    """A network, and one whose weights are a little others."""
    networks = [make(layers=1, **config) for _ in range(2)]
    mx.random.seed(0)
    for layer in networks[1].layers:
        layer.ffn.up_proj.weight = layer.ffn.up_proj.weight + 0.05 * mx.random.normal(layer.ffn.up_proj.weight.shape)
    return [EncodingModel(network, choose_device("cpu")) for network in networks]


def test_states_and_labels_of_characters():
    reference, model = pair(random_canine, head="token", labels=("O", "A", "B"))
    told = []
    same, other = measure_texts({"same": reference, "other": model}, TEXTS, reference, told.append)
    for score in (*same.domains.values(), same.all_domains):
        assert (score.states_error.value, score.equal_labels.value) == (0, 1)
        assert score.states_cosine.value == pytest.approx(1)
        assert score.boundary_error is None and score.equal_sentences is None
    errors, equal, cosines = [], [], []
    for text in TEXTS["code"]:
        ours, theirs = np.array(model.encode(text)), np.array(reference.encode(text))
        errors.append(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
        best = [each.scores_many([text])[0][1:-1].argmax(-1) for each in (model, reference)]
        equal += [*(best[0] == best[1])]
        cosines += [(ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)]
    score = other.domains["code"]
    assert (score.texts, score.characters) == (2, 25)
    assert score.states_error.value == pytest.approx(np.mean(errors), rel=1e-4) and score.states_error.value > 0.001
    assert score.equal_labels.value == pytest.approx(np.mean(equal))
    assert score.states_cosine.value == pytest.approx(np.concatenate(cosines).mean(), rel=1e-6)
    assert other.all_domains.texts == TEXTS_AT_ONCE + 3
    assert sum(told) == 2 * sum(len(text) for found in TEXTS.values() for text in found)


def test_labels_of_texts():
    reference, model = pair(random_canine, head="sequence", labels=("x", "y", "z"))
    (found,) = measure_texts({"m": model}, TEXTS, reference)
    best = [[each.classify(text)[0].label for text in TEXTS["code"]] for each in (model, reference)]
    assert found.domains["code"].equal_labels.value == np.mean([one == other for one, other in zip(*best, strict=True)])
    values = pair(random_canine, head="sequence", labels=("x",), problem="regression")
    assert measure_texts({"m": values[1]}, TEXTS, values[0])[0].all_domains.equal_labels is None
    plain = pair(random_canine)
    assert measure_texts({"m": plain[1]}, TEXTS, plain[0])[0].all_domains.equal_labels is None


def test_ends_of_sentences(monkeypatch):
    settings = SplitSettings(threshold=0.5, window_characters=64, stride_characters=64)
    monkeypatch.setattr(EncodingModel, "split_settings", settings)
    reference, model = pair(random_la_canine, adapter_dim=32, language="cs")
    same, other = measure_texts({"same": reference, "other": model}, TEXTS, reference)
    assert same.all_domains.boundary_error.value == 0 and same.all_domains.equal_sentences.value == 1
    score = other.domains["code"]
    assert 0 < score.boundary_error.value < 0.5
    found = [
        [{span[4:] for span, _ in each.sentences([text], settings)} for text in TEXTS["code"]] for each in (model, reference)
    ]
    equal = sum(len(one & other) for one, other in zip(*found, strict=True))
    assert score.equal_sentences.value == pytest.approx(equal / sum(map(len, found[1])))
    assert score.equal_labels is None


def test_what_is_no_comparison():
    token, plain = pair(random_canine, head="token", labels=("O", "A"))[0], pair(random_canine)[0]
    with pytest.raises(UsageError, match="--reference: head is none there and token in m; compare models of one kind"):
        measure_texts({"m": token}, TEXTS, plain)
    with pytest.raises(UsageError, match="--reference: model_type is la_canine there and canine in m"):
        measure_texts({"m": plain}, TEXTS, pair(random_la_canine)[0])
    with pytest.raises(UsageError, match="no text to compare models on"):
        measure_texts({"m": plain}, {"a": []}, plain)


def test_texts_that_a_model_does_not_read_are_left_out():
    models = [pair(random_canine)[0], pair(random_la_canine)[0]]
    assert readable(models, [b"a", b"abcd", b"a" * 255, b""]) == [b"abcd"]
