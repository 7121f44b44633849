"""What CANINE makes of texts: alone and in a batch, labels, spans and answers with their places."""

import mlx.core as mx
import numpy as np
import pytest
from canine_cases import random_canine

from marlin_cli.engine.characters import AnswerSettings, _spans, answers, choose, classify, encode, label, pooled, tag
from marlin_cli.errors import InputError, UsageError
from marlin_cli.models.canine_ids import characters_of

TEXTS = ["Kůň.".encode(), b"abcd", "東京は大きい 𝔘𝔫𝔦 and a longer text".encode(), b"xyz"]


def test_states_of_a_text_alone_and_in_a_batch():
    network = random_canine()
    for pad_to in (None, 64):
        together = encode(network, TEXTS, pad_to)
        assert [rows.shape for rows in together] == [(len(text.decode()) + 2, 32) for text in TEXTS]
        for text, rows in zip(TEXTS, together, strict=True):
            assert mx.allclose(encode(network, [text], pad_to)[0], rows, atol=1e-5)
    assert not mx.allclose(encode(network, TEXTS)[1], encode(network, TEXTS, 64)[1], atol=1e-2)


def test_vectors_are_of_the_first_mark():
    network = random_canine()
    found = pooled(network, [*TEXTS, (TEXTS[0], TEXTS[1])])
    assert found.shape == (5, 32)
    assert mx.allclose(pooled(network, TEXTS[2:3])[0], found[2], atol=1e-5)
    assert pooled(network, []).shape == (0, 32)
    with pytest.raises(UsageError, match="no pooler"):
        pooled(random_canine(pooler=False), TEXTS)


def test_the_types_of_a_pair():
    ones, zeros = (pooled(random_canine(second_type=kind), [(b"first", b"second")]) for kind in (1, 0))
    assert not mx.allclose(ones, zeros, atol=1e-3)


@pytest.mark.parametrize("problem", ["one_label", "several_labels", "regression"])
def test_labels_of_texts(problem):
    network = random_canine(head="sequence", labels=("x", "y", "z"), problem=problem)
    found = classify(network, TEXTS)
    assert [len(labels) for labels in found] == [3] * len(TEXTS)
    for text, labels in zip(TEXTS, found, strict=True):
        ids = mx.array([[0xE000, *characters_of(text).ids.tolist(), 0xE001]])
        logits = network(ids)[0]
        expected = {
            "one_label": mx.softmax(logits), "several_labels": mx.sigmoid(logits), "regression": logits,
        }[problem].tolist()  # fmt: skip
        assert {label.label: label.score for label in labels} == pytest.approx(
            dict(zip("xyz", expected, strict=True)), abs=1e-5
        )
        assert [label.score for label in labels] == sorted(expected, reverse=True) or labels[0].score >= labels[-1].score


def test_a_label_is_a_span_whatever_the_head():
    network = random_canine(head="sequence", labels=("x", "y", "z"))
    for text, (span,), labels in zip(TEXTS, label(network, TEXTS), classify(network, TEXTS), strict=True):
        assert span == (*labels[0], 0, len(text), 0, len(text.decode()))
    network = random_canine(head="token", labels=("O", "A", "B"))
    assert label(network, TEXTS) == tag(network, TEXTS)
    with pytest.raises(UsageError, match="chooses between texts"):
        label(random_canine(head="choice"), TEXTS)


def test_code_points_in_place_of_bytes():
    network = random_canine()
    ids = [list(map(ord, text.decode())) for text in TEXTS]
    for one, other in zip(encode(network, TEXTS), encode(network, ids), strict=True):
        assert mx.allclose(one, other, atol=1e-5)
    assert mx.allclose(pooled(network, [(TEXTS[0], TEXTS[1])]), pooled(network, [(ids[0], TEXTS[1])]), atol=1e-5)
    assert encode(network, [[0xD800, 1]])[0].shape == (4, 32)


def test_in_sixteen_bits():
    network = random_canine()
    exact = encode(network, TEXTS, 64)
    network.set_dtype(mx.bfloat16)
    for rows, wanted in zip(encode(network, TEXTS, 64), exact, strict=True):
        assert rows.dtype == mx.float32
        assert mx.abs(rows - wanted).mean() < 0.05 * mx.abs(wanted).mean()


def one_hot(rows, count):
    return np.eye(count, dtype=np.float32)[rows] * 0.5 + 0.5 / count


def test_neighbours_of_one_label_are_one_span():
    text = characters_of("aéb東cd".encode())
    labels = ("O", "B-X", "I-X", "B-Y", "W")
    rows = [1, 2, 1, 0, 4, 4]
    found = _spans(labels, one_hot(rows, 5), text, ("O",), True)
    assert [span[:1] + span[2:] for span in found] == [("X", 0, 3, 0, 2), ("X", 3, 4, 2, 3), ("W", 7, 9, 4, 6)]
    assert found[0].score == pytest.approx(0.6)
    found = _spans(labels, one_hot(rows, 5), text, (), False)
    assert [(span.label, span.first_byte, span.end_byte) for span in found] == [
        ("B-X", 0, 1), ("I-X", 1, 3), ("B-X", 3, 4), ("O", 4, 7), ("W", 7, 8), ("W", 8, 9),
    ]  # fmt: skip
    assert _spans(labels, one_hot([2, 2], 5), characters_of(b"ab"), ("O",), True)[0].label == "X"


@pytest.mark.parametrize("marks", [True, False])
def test_tags_lie_in_the_text(marks):
    network = random_canine(head="token", labels=("O", "A", "B"))
    for text, spans in zip(TEXTS[:3], tag(network, TEXTS[:3], 64, outside=(), marks=marks), strict=True):
        assert b"".join(text[span.first_byte : span.end_byte] for span in spans) == text
        decoded = text.decode()
        assert "".join(decoded[span.first_character : span.end_character] for span in spans) == decoded
    assert tag(network, [b""], 8) == [[]]


def test_answers_are_the_likeliest_spans():
    network = random_canine(head="answer")
    question, context = b"Who?", "Jiří šel 東京 dnes.".encode()
    found = answers(network, question, context, AnswerSettings(best=500, longest=6))
    characters = len(context.decode())
    assert len(found) == sum(min(6, characters - first) for first in range(characters))
    ids = [0xE000, *question, 0xE001, *map(ord, context.decode()), 0xE001]
    types = [0] * 6 + [1] * (characters + 1)
    logits = network(mx.array([ids]), None, mx.array([types]))[0, 6 : 6 + characters]
    begins, ends = (np.array(mx.softmax(logits[:, side])) for side in (0, 1))
    for span in found:
        assert span.score == pytest.approx(begins[span.first_character] * ends[span.end_character - 1], rel=1e-4)
        assert context[span.first_byte : span.end_byte].decode() == context.decode()[span.first_character : span.end_character]
    assert [span.score for span in found] == sorted((span.score for span in found), reverse=True)
    assert answers(network, question, context, AnswerSettings(longest=6)) == found[:1]


def test_a_long_context_is_read_in_windows():
    network = random_canine(head="answer")
    context = bytes(range(97, 123)) * 10
    found = answers(network, b"Why?", context, AnswerSettings(best=3, longest=5, window_positions=64, stride_characters=32))
    best = 0.0
    for start in range(0, len(context), 32):
        alone = answers(network, b"Why?", context[start : start + 57], AnswerSettings(longest=5))[0]
        best = max(best, alone.score)
        if start + 57 >= len(context):
            break
    assert found[0].score == pytest.approx(best, rel=1e-4)
    assert len(found) == 3


@pytest.mark.parametrize("stride", [33, 128, 1 << 20])
def test_a_stride_leaves_no_character_unread(stride):
    network = random_canine(head="answer")
    settings = AnswerSettings(best=500, longest=1, window_positions=40, stride_characters=stride)
    found = answers(network, b"Why?", b"x" * 200, settings)
    assert sorted(span.first_character for span in found) == list(range(200))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"best": 0}, "best must be"), ({"longest": -1}, "longest must .* found -1"), ({"window_positions": 0}, "window must"),
     ({"stride_characters": 0}, "stride must")],
)  # fmt: skip
def test_settings_out_of_range(changes, message):
    with pytest.raises(UsageError, match=message):
        AnswerSettings(**changes)


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_bytes_in_another_container_are_utf8_too(kind):
    network = random_canine(head="sequence", labels=("x", "y"))
    text = "Kůň".encode()
    assert classify(network, [kind(text)]) == classify(network, [text])
    assert mx.array_equal(encode(network, [(kind(text), b"a")])[0], encode(network, [(text, b"a")])[0])


def test_scores_beyond_a_probability_warn_of_nothing():
    network = random_canine(head="sequence", labels=("x", "y"), problem="several_labels")
    network.output.bias = mx.array([-500.0, 500.0])
    assert [tuple(each) for each in classify(network, [b"plain"])[0]] == [("y", 1.0), ("x", 0.0)]


def test_choices_share_a_padding():
    network = random_canine(head="choice")
    found = choose(network, b"He went", [b" home.", b" away to sea."])
    assert found.sum() == pytest.approx(1)
    ids = [[0xE000, *b"He went", 0xE001, *other, 0xE001] for other in (b" home.", b" away to sea.")]
    lengths = [len(row) for row in ids]
    padded = mx.array([row + [0] * (max(lengths) - len(row)) for row in ids])
    types = mx.array([[0] * 9 + [1] * (n - 9) + [0] * (max(lengths) - n) for n in lengths])
    assert np.allclose(found, np.array(mx.softmax(network(padded, mx.array(lengths), types)[:, 0])), atol=1e-5)
    assert choose(network, b"x", []).shape == (0,)


def test_what_cannot_be_read_is_one_line():
    network = random_canine(head="token", labels=("O", "A"))
    for call, error, message in (
        (lambda: encode(network, [b"a\xff"]), InputError, "is not UTF-8"),
        (lambda: encode(network, [[65, 0x110000]]), InputError, "1114112 is no code point"),
        (lambda: pooled(network, [(b"a", [-1])]), InputError, "the second text: -1 is no code point"),
        (lambda: encode(network, [b"a"]), InputError, "takes 3 positions with its marks, CANINE needs 4; pad"),
        (lambda: encode(network, [b""]), InputError, "CANINE needs 4"),
        (
            lambda: encode(network, [b"a" * 255]),
            InputError,
            "257 positions with its marks, and the model reads 256",
        ),
        (lambda: encode(network, [b"a" * 20], 8), InputError, r"and pad_to \(--pad-to\) is 8; raise it"),
        (lambda: encode(network, [b"a" * 300], 8), InputError, "302 positions with its marks, and the model reads 256"),
        (lambda: encode(network, [b"a"], 3), UsageError, "must be from 4"),
        (lambda: encode(network, [b"a"], 1000), UsageError, "must be from 4 to 256"),
        (lambda: classify(network, [b"abc"]), UsageError, "labels characters; what was asked for needs one that classifies"),
        (lambda: answers(network, b"a", b"b"), UsageError, "one that answers questions"),
        (lambda: answers(random_canine(head="answer"), b"abc", b""), InputError, "context is empty"),
        (lambda: answers(random_canine(head="answer"), b"a" * 300, b"abc"), UsageError, "no room for the context"),
        (lambda: tag(random_canine(), [b"abc"]), UsageError, "has no head and encodes"),
        (lambda: AnswerSettings(best=0), UsageError, "at least 1"),
    ):
        with pytest.raises(error, match=message) as found:
            call()
        assert "\n" not in str(found.value)
    assert encode(network, [b"a"], 4)[0].shape == (3, 32)
