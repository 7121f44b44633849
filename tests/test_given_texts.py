"""What Python callers give in place of bytes: one line that says what to do, from every method of every kind of model."""

import pytest
from canine_cases import random_canine, random_la_canine

from marlin_cli import AnsweringModel, ByT5Config, ContinuingModel, EncodingModel, MegaByteConfig
from marlin_cli.errors import CheckpointError, UsageError
from marlin_cli.ops.device import choose_device

HEADS = {"classify": "sequence", "label": "token", "tag_many": "token", "answer": "answer", "choose": "choice"}


STAGES = {f"{stage}_{name}": size for stage in ("global", "local") for name, size in (("dim", 32), ("layers", 1), ("heads", 1))}


def encoding(method):
    head = HEADS.get(method, "none")
    labels = {"labels": ("x", "y")} if head in ("sequence", "token") else {}
    network = random_la_canine(adapter_dim=32, language="cs") if method == "sentences" else random_canine(head=head, **labels)
    return EncodingModel(network, choose_device("cpu"))


def answering(method):
    sizes = {"d_model": 32, "ffn_dim": 32, "heads": 1, "head_dim": 32, "encoder_layers": 1}
    alone = {"labels": ("x", "y"), "decoder_layers": 0} if method in ("label", "tag_many") else {"decoder_layers": 1}
    return AnsweringModel.from_config(ByT5Config(**sizes, **alone), device="cpu")


def continuing(method):
    return ContinuingModel.from_config(MegaByteConfig(**STAGES), device="cpu")


# (kind of model, method) -> the method for many, or None; those of several texts are told of the one for one.
ONE = {
    (encoding, "encode"): "encode_many",
    (encoding, "pooled"): "pooled_many",
    (encoding, "classify"): "classify_many",
    (encoding, "label"): "label_many",
    (encoding, "places"): None,
    (encoding, "check"): None,
    (answering, "encode"): "encode_many",
    (answering, "pooled"): "pooled_many",
    (answering, "label"): "tag_many",
    (answering, "generate"): "answers",
    (answering, "places"): None,
    (continuing, "logits"): None,
    (continuing, "bits_per_byte"): None,
    (continuing, "generate"): "pieces",
}
MANY = {
    (encoding, "encode_many"): "encode",
    (encoding, "pooled_many"): "pooled",
    (encoding, "tag_many"): "label",
    (answering, "encode_many"): "encode",
    (answering, "pooled_many"): "pooled",
    (answering, "tag_many"): "label",
    (answering, "answers"): "generate",
}


@pytest.mark.parametrize("given", ["a str", [b"two", b"texts"], ["two", "texts"], None, 5])
@pytest.mark.parametrize(("kind", "method"), ONE)
def test_one_text_that_is_none(kind, method, given):
    many = ONE[kind, method]
    with pytest.raises(UsageError, match="^a text is bytes, found ") as caught:
        getattr(kind(method), method)(given)
    said = str(caught.value)
    assert (": call .encode()" in said) is isinstance(given, str)
    assert said.endswith(f"; for several texts `{many}`") if many else "several" not in said


@pytest.mark.parametrize("given", ["a str", b"bytes"])
@pytest.mark.parametrize(("kind", "method"), MANY)
def test_several_texts_that_are_one(kind, method, given):
    with pytest.raises(UsageError, match=f"^several texts are a list of bytes, found .*; for one text `{MANY[kind, method]}`$"):
        getattr(kind(method), method)(given)


@pytest.mark.parametrize(("kind", "method"), MANY)
def test_several_texts_of_which_one_is_none(kind, method):
    with pytest.raises(UsageError, match=r"^a text is bytes, found str 'b\w*': call .encode\(\)$"):
        getattr(kind(method), method)([b"abcd", "b"])


SIDES = {
    "answer": (encoding, lambda model: model.answer("question", b"context")),
    "choose": (encoding, lambda model: model.choose(b"a text", "choices")),
    "sentences": (encoding, lambda model: model.sentences("a text")),
    "bits": (answering, lambda model: model.bits(b"input", "answer")),
    "bits_per_byte": (answering, lambda model: model.bits_per_byte("input", b"answer")),
    "logits": (answering, lambda model: model.logits(b"input", "answer")),
    "generate_stream": (answering, lambda model: next(model.generate_stream("input"))),
}


@pytest.mark.parametrize("method", SIDES)
def test_a_side_that_is_none(method):
    kind, call = SIDES[method]
    with pytest.raises(UsageError, match="bytes, found str "):
        call(kind(method))


def test_a_tuple_is_a_pair():
    with pytest.raises(UsageError, match="^a tuple is a pair, of two texts, found 3; for several texts `pooled_many`$"):
        encoding("pooled").pooled((b"one", b"two", b"three"))
    with pytest.raises(UsageError, match="^a text is bytes, found str 'two': call"):
        encoding("pooled").pooled((b"one", "two"))


def test_what_holds_bytes_is_bytes():
    for kind in (encoding, answering):
        model = kind("encode")
        assert (
            model.encode(bytearray(b"abcd")).tolist()
            == model.encode(memoryview(b"abcd")).tolist()
            == model.encode(b"abcd").tolist()
        )


def test_what_examples_import_is_there():
    from marlin_cli import ImportOptions, load

    with pytest.raises(CheckpointError, match="option language has no meaning here"):
        load("megabyte-demo", device="cpu", options=ImportOptions(language="cs"))
