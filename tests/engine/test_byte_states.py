"""States and labels of ByT5's encoder: alone and in a batch, places of bytes, with front ends that join them."""

import mlx.core as mx
import numpy as np
import pytest
from decoder_cases import random_gbst
from mlx.utils import tree_map

from marlin_cli import ByT5Config, ByT5Model
from marlin_cli.engine import byte_states
from marlin_cli.engine.spans import Place
from marlin_cli.errors import ConfigError, UsageError
from marlin_cli.models.gbst import Gbst, GbstConfig

SIZES = {"d_model": 32, "ffn_dim": 32, "heads": 2, "head_dim": 16, "encoder_layers": 2, "decoder_layers": 0}
INPUTS = [b"abc", "Kůň 東京 𝔘𝔫𝔦".encode(), b"", b"\xff\x00", b"abd"]


def random_model(config):
    model = ByT5Model.from_config(config, device="cpu")
    mx.random.seed(1)
    model.network.update(tree_map(lambda a: mx.random.normal(a.shape) * a.shape[-1] ** -0.5 * 2, model.network.parameters()))
    return model


def test_states_alone_and_in_a_batch(monkeypatch):
    model = random_model(ByT5Config(**SIZES))
    together = model.encode_many(INPUTS, marks=True)
    for data, rows in zip(INPUTS, together, strict=True):
        assert rows.shape == (len(data) + 1, 32) and rows.dtype == mx.float32
        assert mx.allclose(model.encode(data, marks=True), rows, atol=1e-5)
        assert mx.allclose(model.encode(data), rows[:-1], atol=1e-5)
        assert mx.allclose(model.pooled(data), rows.mean(axis=0), atol=1e-5)
    monkeypatch.setattr(byte_states, "POSITIONS_AT_ONCE", 20)
    for one, other in zip(model.encode_many(INPUTS, marks=True), together, strict=True):
        assert mx.allclose(one, other, atol=1e-5)
    assert model.encode_many([]) == [] and model.pooled_many([]).shape == (0, 32)


def test_labels_of_bytes():
    model = random_model(ByT5Config(**SIZES, labels=("O", "B-X", "I-X")))
    together = model.tag_many(INPUTS, outside=(), merge=False)
    for data, spans in zip(INPUTS, together, strict=True):
        scores = np.array(mx.softmax(model.network.output(model.encode(data)), axis=-1))
        best = scores.argmax(axis=-1) if len(data) else []
        assert [span.label for span in spans] == [("O", "B-X", "I-X")[index] for index in best]
        assert [span.score for span in spans] == pytest.approx([*scores.max(axis=-1)] if len(data) else [], abs=1e-5)
        assert [(span.first_byte, span.end_byte) for span in spans] == [(at, at + 1) for at in range(len(data))]
    text = INPUTS[1].decode()
    for span in together[1]:
        assert INPUTS[1][span.first_byte : span.end_byte] in text[span.first_character : span.end_character].encode()
    assert all(span.label == "X" for span in model.label(INPUTS[1]))


def test_a_model_without_labels_says_what_it_does():
    with pytest.raises(UsageError, match="this ByT5 encodes; what was asked for needs one that labels bytes"):
        random_model(ByT5Config(**SIZES)).label(b"abc")
    with pytest.raises(UsageError, match="this GBST answers an input; what was asked for needs one that labels bytes"):
        byte_states.tag(random_gbst(), [b"a"])
    with pytest.raises(UsageError, match="this ByT5 answers an input; what"):
        random_model(ByT5Config(**SIZES | {"decoder_layers": 1})).label(b"abc")
    with pytest.raises(ConfigError, match="labels go with an encoder alone"):
        ByT5Config(**SIZES | {"decoder_layers": 1}, labels=("O",))
    with pytest.raises(UsageError, match="do not fit"):
        random_model(ByT5Config(**SIZES, max_bytes=3, labels=("O",))).label(b"abcd")


def test_places_of_bytes():
    network = random_model(ByT5Config(**SIZES)).network
    assert byte_states.places(network, "aů".encode()) == [
        Place(None, 0, 1, 0, 1), Place(None, 1, 2, 1, 2), Place(None, 2, 3, 1, 2), Place("</s>"),
    ]  # fmt: skip
    assert byte_states.places(network, b"") == [Place("</s>")]


def test_rows_of_several_bytes():
    mx.random.seed(0)
    network = Gbst(GbstConfig(**SIZES, block_sizes=(1, 2, 3), bytes_in_row=3))
    for data in (b"", b"ab", b"abc", b"abcdefgh"):
        found = byte_states.places(network, data)
        assert b"".join(data[place.first_byte : place.end_byte] for place in found) == data
        assert len(found) == len(next(byte_states.states(network, [data])))
        assert (found[-1].mark is None) == bool(len(data) % 3)
    with pytest.raises(ConfigError, match="labels are of bytes"):
        GbstConfig(**SIZES, labels=("O",))
