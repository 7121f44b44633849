"""`EncodingModel` on small random networks: every method by itself and of many, packing, saving, what is refused."""

import mlx.core as mx
import numpy as np
import pytest
from canine_cases import random_canine, random_la_canine

from marlin_cli import ByT5Model, EncodingModel, load
from marlin_cli.engine import characters
from marlin_cli.engine.sentences import sentences
from marlin_cli.errors import CheckpointError, InputError, UsageError
from marlin_cli.ops.device import choose_device

TEXT = "Kůň a pes. 東京は大きい! Third sentence, of many letters".encode()
TEXTS = [TEXT, b"abcd", "Dva\u00a0texty.".encode()]
FORMATS = ("mxfp8", "nvfp4", "int4", "int8")


def canine(**changes):
    return EncodingModel(random_canine(**changes), choose_device("cpu"))


def la_canine(**changes):
    return EncodingModel(random_la_canine(**{"adapter_dim": 32, "language": "cs", **changes}), choose_device("cpu"))


@pytest.mark.parametrize("make", [canine, la_canine])
def test_states_by_themselves_and_of_many(make):
    model = make()
    marks = 2 if model.config.marks else 0
    together = model.encode_many(TEXTS)
    for text, rows in zip(TEXTS, together, strict=True):
        assert rows.shape == (len(text.decode()) + marks, 32) and rows.dtype == mx.float32
        assert mx.allclose(model.encode(text), rows, atol=1e-5)
        assert mx.allclose(model.encode([*map(ord, text.decode())]), rows, atol=1e-5)
    padded = model.encode(TEXT, pad_to=120)
    assert padded.shape == together[0].shape
    # An LA-CANINE's last molecule is full either way, here: it has filler to read in both.
    assert mx.allclose(padded, together[0], atol=1e-3).item() is (marks == 0)


def test_states_of_an_la_canine_are_those_that_its_scores_come_from():
    model = la_canine()
    ids = [*map(ord, TEXT.decode())]
    assert len(ids) % 4
    filled = mx.array([[*ids, *[-1] * (-len(ids) % 4)]])
    scores = model.network(filled, mx.array([len(ids)]))[0, : len(ids)]
    assert mx.allclose(model.network.output(model.encode(TEXT)), scores, atol=1e-5)


def test_vectors():
    model = canine()
    assert mx.array_equal(model.pooled(TEXT, pad_to=120), model.pooled_many(TEXTS, pad_to=120)[0])
    assert model.pooled((b"one", b"two")).shape == (32,)
    assert np.abs(np.array(model.pooled(TEXT))).max() <= 1


def test_what_heads_do():
    model = canine(head="sequence", labels=("x", "y", "z"))
    best = model.classify(TEXT)[0]
    (span,) = model.label(TEXT)
    assert span == (best.label, best.score, 0, len(TEXT), 0, len(TEXT.decode()))
    assert [found[0].label for found in model.classify_many(TEXTS)] == [found[0].label for found in model.label_many(TEXTS)]
    model = canine(head="token", labels=("O", "A", "B"))
    assert model.label_many(TEXTS) == characters.label(model.network, TEXTS)
    whole = model.tag_many([TEXT], outside=())[0]
    assert (whole[0].first_byte, whole[-1].end_byte, whole[-1].end_character) == (0, len(TEXT), len(TEXT.decode()))
    model = canine(head="answer")
    (found,) = model.answer(b"where?", TEXT)
    assert 0 <= found.first_byte < found.end_byte <= len(TEXT)
    assert canine(head="choice").choose(TEXT, [b"one", b"two"]).sum() == pytest.approx(1)


def test_sentences_of_a_stream_and_of_a_text():
    model = la_canine()
    found = list(model.sentences([TEXT[:2], TEXT[2:]]))  # cut within a character
    assert b"".join(data for _, data in found) == TEXT
    assert found == list(sentences(model.network, [TEXT], model.split_settings))
    assert model.label_many([TEXT, b"abcd"])[0] == [span for span, _ in found]
    assert model.split_settings.window_characters == 256 and model.config.longest == 256


@pytest.mark.parametrize("make", [lambda: canine(head="token", labels=("O", "A")), la_canine])
def test_saving_packing_and_loading(make, tmp_path):
    model = make()
    model.save(tmp_path / "plain")
    plain = load(tmp_path / "plain", device="cpu")
    assert isinstance(plain, EncodingModel) and plain.config == model.config
    assert mx.array_equal(plain.encode(TEXT), model.encode(TEXT))
    packed = model.quantize(4, 8)
    kinds = {path: packed.quantization.get(path, packed.quantization)["mode"] for path in
             ("layers.1.ffn.up_proj", "local.down.conv", "local.last.attention.q_proj")}  # fmt: skip
    assert kinds == dict(zip(kinds, ["nvfp4", "mxfp8", "mxfp8"], strict=True))
    assert packed.quantization["output"] is False and "pooler" not in packed.quantization
    packed.save(tmp_path / "packed")
    again = load(tmp_path / "packed", device="cpu")
    assert again.config == model.config
    assert mx.array_equal(again.encode(TEXT), packed.encode(TEXT))
    rough = load(tmp_path / "packed", device="cpu", activation_bits=8)
    error = [mx.square(each.encode(TEXT) - model.encode(TEXT)).mean().item() for each in (again, rough)]
    assert 0 < error[0] < 0.3 and error[1] < 0.4


def test_every_format_is_read_again(tmp_path):
    from marlin_cli.quantization.plan import QuantizationSettings

    model = canine()
    for name in FORMATS:
        packed = model.quantize(settings=QuantizationSettings(name, name))
        packed.save(tmp_path / name)
        assert mx.array_equal(load(tmp_path / name, device="cpu").pooled(TEXT), packed.pooled(TEXT))


REFUSED = {
    "no UTF-8": (canine, lambda model: model.encode(b"ab\xff"), InputError, "is not UTF-8"),
    "too short": (canine, lambda model: model.encode(b"a"), InputError, "CANINE needs 4; pad it"),
    "nothing": (la_canine, lambda model: model.encode(b""), InputError, "LA-CANINE needs 4"),
    "too long": (canine, lambda model: model.encode(b"a" * 255), InputError, "257 positions .*, and the model reads 256"),
    "no code point": (canine, lambda model: model.encode([97, 0x110000]), InputError, "1114112 is no code point"),
    "padding within a molecule": (la_canine, lambda model: model.encode(TEXT, pad_to=121), UsageError, "a multiple of 4"),
    "no head": (canine, lambda model: model.label(TEXT), UsageError, "has no head and encodes"),
    "another head": (canine, lambda model: model.answer(TEXT, TEXT), UsageError, "one that answers questions"),
    "vectors": (la_canine, lambda model: model.pooled(TEXT), UsageError, "LA-CANINE has no pooler"),
    "labels of texts": (la_canine, lambda model: model.classify(TEXT), UsageError, "finds the ends of sentences"),
    "a pair": (la_canine, lambda model: model.encode((TEXT, TEXT)), UsageError, "reads one text at a time"),
    "padding of sentences": (la_canine, lambda model: model.label(TEXT, pad_to=120), UsageError, "pad_to has no meaning"),
    "sentences": (canine, lambda model: model.sentences([TEXT]), UsageError, "does not cut texts into sentences"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind):
    make, ask, error, words = REFUSED[kind]
    with pytest.raises(error, match=words) as caught:
        ask(make())
    assert "\n" not in str(caught.value)


def test_what_loading_refuses(tmp_path):
    canine().save(tmp_path / "model")
    with pytest.raises(UsageError, match="this CANINE keeps no keys and values"):
        load(tmp_path / "model", device="cpu", kv_bits=8)
    load(tmp_path / "model", device="cpu", kv_bits=16)
    with pytest.raises(CheckpointError, match="holds a CANINE, which encodes"):
        ByT5Model.from_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="holds a MegaByte, which continues"):
        EncodingModel.from_pretrained("megabyte-demo")


def test_answering_models_encode_too():
    model = load("byt5-demo", device="cpu")
    texts = [b"one", b"a longer one"]
    for text, rows, vector in zip(texts, model.encode_many(texts), model.pooled_many(texts), strict=True):
        assert mx.allclose(rows, model.encode(text), atol=1e-5) and rows.shape[0] == len(text)
        all_rows = model.encode(text, marks=True)  # and that of its end
        assert mx.allclose(vector, all_rows.mean(axis=0), atol=1e-5) and all_rows.shape[0] == len(text) + 1
        assert mx.allclose(vector, model.pooled(text), atol=1e-5)
    assert model.pooled_many([]).shape == (0, model.config.d_model)
    assert mx.array_equal(model.pooled(b""), model.encode(b"", marks=True)[0])
