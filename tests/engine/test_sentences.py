"""Sentences of a stream: those of wtpsplit 2.2.2, whatever the pieces, in memory that has a bound."""

import json
import tracemalloc

import mlx.core as mx
import numpy as np
import pytest
from canine_cases import DATA, LA_LANGUAGES, golden_la_network, random_la_canine, sample_text

from marlin_cli.engine.sentences import WHITESPACE, SplitSettings, boundary_scores, ids_of_pieces, sentences
from marlin_cli.errors import CheckpointError, InputError, UsageError

SMALL = SplitSettings(threshold=0.735, window_characters=64, stride_characters=16, windows_at_once=3)
TEXT = "Žluťoučký kůň. Úpěl ďábelské ódy!   A co dál?\n\nNic 𝔘𝔫𝔦. 東京は大きい。そうです。".encode() * 4


@pytest.fixture(scope="module")
def network():
    return random_la_canine(rows=2)


@pytest.mark.parametrize(
    "language", [pytest.param(code, marks=[] if code == "th" else pytest.mark.peers) for code in LA_LANGUAGES]
)
def test_the_sentences_of_wtpsplit_in_ten_languages(language, tmp_path):
    golden = json.loads((DATA / "la_canine_golden.json").read_text())["languages"][language]
    network = golden_la_network(tmp_path / language, "on", language)
    text = sample_text(LA_LANGUAGES[language]).encode()
    pieces = (text[start : start + 1000] for start in range(0, len(text), 1000))
    found = list(sentences(network, pieces, SplitSettings(threshold=golden["threshold"])))
    assert [span.end_byte for span, _ in found] == golden["ends"]


def test_pieces_do_not_matter(network):
    whole = list(sentences(network, [TEXT], SMALL))
    assert len(whole) > 5
    for size in (1, 65, 1000):
        pieces = [TEXT[start : start + size] for start in range(0, len(TEXT), size)]
        found = list(sentences(network, pieces, SMALL))
        assert [span[2:] for span, _ in found] == [span[2:] for span, _ in whole]


def test_all_together_are_the_text(network):
    text, byte, character = TEXT.decode(), 0, 0
    for span, data in sentences(network, [TEXT], SMALL):
        assert (span.first_byte, span.first_character) == (byte, character)
        assert data == TEXT[span.first_byte : span.end_byte] == text[span.first_character : span.end_character].encode()
        assert not data.decode()[0].isspace() or span.first_byte == 0
        byte, character = span.end_byte, span.end_character
    assert byte == len(TEXT)


def test_scores_are_those_of_all_windows_by_themselves(network):
    """Each character's mean over the windows that hold it, the last of which ends with the text."""
    ids = np.concatenate(list(ids_of_pieces([TEXT])))[:149]
    found = np.concatenate([scores for _, scores in boundary_scores(network, [ids], SMALL)])
    starts = [*range(0, 149 - 64, 16), 149 - 64]
    sums, counts = np.zeros(149), np.zeros(149)
    for start in starts:
        ((_, alone),) = boundary_scores(network, [ids[start : start + 64]], SMALL)
        sums[start : start + 64] += np.log(alone) - np.log1p(-alone)
        counts[start : start + 64] += 1
    assert np.abs(found - 1 / (1 + np.exp(-sums / counts))).max() < 2e-3  # sums are of 16 bits


@pytest.mark.parametrize("text", ["", " ", "\n\n", "a", "ab.", " a", "a" * 200, "　" * 100])
def test_texts_at_the_edge(network, text):
    data = text.encode()
    found = list(sentences(network, [data], SMALL))
    assert b"".join(part for _, part in found) == data
    if not text.strip():
        assert len(found) == (1 if text else 0)


def test_a_long_sentence_is_cut(network):
    settings = SplitSettings(threshold=1.0, window_characters=64, stride_characters=64, most_characters=100)
    found = list(sentences(network, [TEXT], settings))
    assert all(span.end_character - span.first_character == 100 for span, _ in found[:-1])
    assert b"".join(part for _, part in found) == TEXT


def test_memory_has_a_bound(network):
    """Six times the text takes no more of Python's memory."""
    settings = SplitSettings(threshold=0.735, window_characters=64, stride_characters=64, windows_at_once=8)
    peaks = []
    for repeats in (2, 12):
        tracemalloc.start()
        for _ in sentences(network, (TEXT for _ in range(repeats)), settings):
            pass
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_white_space_is_that_of_python():
    assert WHITESPACE.tolist() == [value for value in range(0x110000) if chr(value).isspace()]


@pytest.mark.parametrize(
    ("pieces", "place"),
    [
        ([b"abc\xff"], 3),
        ([b"ab", b"\xc3", b"x"], 2),
        ([b"ab\xe2\x82"], 2),
        ([b"a\xed\xa0\x80"], 1),
        ([b"ok", b"", b"\xc3\xa9\x80"], 4),
    ],
)
def test_bytes_that_are_no_text_are_named(network, pieces, place):
    with pytest.raises(InputError, match=rf"is not UTF-8 .* at byte {place}\)"):
        list(sentences(network, pieces, SMALL))


def test_scores_beyond_a_probability_warn_of_nothing():
    network = random_la_canine()
    network.output.bias = mx.array([-200.0])
    assert [data for _, data in sentences(network, [TEXT], SMALL)] == [TEXT]
    network.output.bias = mx.array([-60000.0])
    with pytest.raises(CheckpointError, match="not finite"):
        list(sentences(network, [TEXT], SMALL))


def test_settings_out_of_range():
    for changes, message in (
        ({"threshold": 1.5}, "threshold"),
        ({"stride_characters": 0}, "stride"),
        ({"stride_characters": 600}, "stride"),
        ({"windows_at_once": 0}, "windows_at_once must"),
        ({"most_characters": 0}, "longest sentence must be at least 1 character, found 0"),
    ):
        with pytest.raises(UsageError, match=message):
            SplitSettings(**changes)


@pytest.mark.parametrize("window", [62, 1024])
def test_a_window_that_the_network_cannot_read(network, window):
    with pytest.raises(UsageError, match="multiple of 4 and at most 256"):
        list(sentences(network, [TEXT], SplitSettings(window_characters=window, stride_characters=16)))
