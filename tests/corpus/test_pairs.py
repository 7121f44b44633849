"""Inputs with answers: what files are read, what is refused, span corruption, and streams that go on where they stopped."""

import gzip
import json
import os

import numpy as np
import pytest

from marlin_cli.corpus import CorruptedCorpus, Pair, PairCorpus, SpanCorruption, open_corpus, open_pairs, read_pairs
from marlin_cli.corpus.pairs import locate_pairs
from marlin_cli.corpus.spans import corrupt
from marlin_cli.errors import CorpusError

DATA = np.random.default_rng(5).integers(0, 100, 4000, dtype=np.uint8).tobytes()  # no byte of it is a mark


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_shipped_pairs_are_read():
    found = open_pairs(["byt5-demo"], sequence_bytes=1024)
    assert len(list(found)) == 312 and found.domains == ["pairs"]


def test_jsonl_of_every_kind(tmp_path):
    rows = [
        {"source": "a\u010d", "target": "b", "language": "cs"},
        {"input": "x", "output": ""},
        {"source_hex": "00 ff", "target_base64": "/wA=", "group": 7},
        {"input": "text", "output_hex": "80"},
    ]
    assert read_pairs(write(tmp_path / "p.jsonl", *rows)) == [
        Pair("a\u010d".encode(), b"b", "cs"), Pair(b"x", b""), Pair(b"\x00\xff", b"\xff\x00", "7"), Pair(b"text", b"\x80"),
    ]  # fmt: skip


def test_tsv_is_raw_bytes(tmp_path):
    path = tmp_path / "p.tsv"
    path.write_bytes(b"\xff\x00\tb\n\nsource\ttarget\tgroup\r\n\t\n")
    assert read_pairs(path) == [Pair(b"\xff\x00", b"b"), Pair(b"source", b"target", "group")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"source": "a"}', "line 1: needs one of target, target_base64, target_hex"),
        ('{"text": "a"}', "found 'text'"),
        ('{"a\\u001b[31m": "a"}', r"found 'a\\x1b\[31m'"),
        ('{"source": "a", "target": "b", "language": ["cs"]}', "'language' is list, expected text"),
        ("\ufeff\n\n[", "line 3: is not JSON"),
        ("[1]", "not a JSON object"),
        ("{", "line 1: is not JSON"),
        ('{"source": 3, "target": ""}', "'source' is int, expected text"),
        ('{"source_hex": "zz", "target": ""}', "'source_hex' is not hex"),
        ('{"source": "a", "source_hex": "61", "target": ""}', "needs one of source"),
        ("\n \n", "holds no pairs"),
    ],
)
def test_what_is_no_pair_is_refused_with_its_line(text, message, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(CorpusError, match=message):
        read_pairs(path)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "p.txt").write_text("a\tb")
    (tmp_path / "p.tsv").write_text("a\n")
    with pytest.raises(CorpusError, match="jsonl or .tsv"):
        read_pairs(tmp_path / "p.txt")
    with pytest.raises(CorpusError, match="line 1: 1 columns"):
        read_pairs(tmp_path / "p.tsv")
    with pytest.raises(CorpusError, match="no such file"):
        open_pairs(["nowhere.jsonl"], sequence_bytes=9)
    with pytest.raises(CorpusError, match="raise --seq-bytes"):
        open_pairs([str(write(tmp_path / "p.jsonl", {"source": "abc", "target": ""}))], sequence_bytes=2)


def test_pairs_are_drawn_once_cut_off_and_resumed(tmp_path):
    path = write(tmp_path / "p.jsonl", *({"source": "s" * size, "target": str(size)} for size in range(1, 40)))

    def corpus(**changes):
        return open_pairs([f"code={path}"], **{"sequence_bytes": 30, "seed": 1, **changes})

    whole = corpus()
    examples = list(whole)
    assert whole.left_out == 9 and len(examples) == 30 and {each.domain for each in examples} == {"code"}
    assert sorted(len(each.source) for each in examples) == list(range(1, 31))
    assert whole.total_bytes == sum(each.size_bytes for each in examples)
    assert [each.source for each in corpus(seed=2)] != [each.source for each in examples]
    assert sum(each.size_bytes for each in corpus(max_bytes=100)) in range(100, 133)
    first = corpus()
    begun = [example for _, example in zip(range(7), first, strict=False)]
    second = corpus()
    second.resume(json.loads(json.dumps(first.state())))
    assert begun + list(second) == examples
    with pytest.raises(CorpusError, match="other pairs"):
        corpus(seed=2).resume(first.state())
    with pytest.raises(CorpusError, match="damaged"):
        corpus().resume({**first.state(), "examples": 31})


@pytest.mark.parametrize("size", [2, 3, 64, 150, 600])
@pytest.mark.parametrize("settings", [SpanCorruption(), SpanCorruption(0.5, 3.0), SpanCorruption(0.9, 1.0)], ids=str)
def test_the_answer_fills_the_gaps(size, settings):
    source, target = corrupt(DATA[:size], settings, np.random.default_rng(size))
    # A gap is a byte of 100 or more; marks count down from 0xFF in both.
    marks = [byte for byte in source if byte >= 100]
    assert marks == [0xFF - index for index in range(len(marks))] == [byte for byte in target if byte >= 100]
    filled = source
    for mark in marks:
        gap = target.partition(bytes([mark]))[2]
        end = next((index for index, byte in enumerate(gap) if byte >= 100), len(gap))
        assert end > 0
        filled = filled.replace(bytes([mark]), gap[:end])
    assert filled == DATA[:size]
    lost = len(target) - len(marks)
    assert lost == min(max(round(size * settings.noise_density), 1), size - 1)


def test_density_and_length_of_spans():
    source, target = corrupt(DATA, SpanCorruption(), np.random.default_rng(0))
    marks = len(source) + len(target) - len(DATA)
    assert marks == 2 * 30  # 600 bytes lost in spans of 20
    spans = {corrupt(DATA[:200], SpanCorruption(), np.random.default_rng(seed)) for seed in range(20)}
    assert len(spans) == 20
    assert corrupt(b"a", SpanCorruption(), np.random.default_rng(0)) == (b"a", b"")


@pytest.mark.parametrize("wrong", [(0.0, 3.0), (1.0, 3.0), (0.1, 0.5), (float("nan"), 3.0), (0.1, float("inf"))])
def test_impossible_corruption(wrong):
    with pytest.raises(CorpusError, match="--noise-density|--span-bytes"):
        SpanCorruption(*wrong)


def test_a_corrupted_corpus_goes_on_and_is_its_own(tmp_path):
    (tmp_path / "data").write_bytes(DATA)

    def corpus(settings=None):
        return CorruptedCorpus(open_corpus([f"code={tmp_path / 'data'}"], sequence_bytes=256), settings)

    examples = list(corpus())
    assert sum(each.size_bytes for each in examples) == 4000 and examples[0].source != examples[1].source
    first, second = corpus(), corpus()
    begun = [example for _, example in zip(range(5), first, strict=False)]
    second.resume(first.state())
    assert begun + list(second) == examples
    assert corpus().fingerprint() == corpus().fingerprint() != corpus(SpanCorruption(0.2)).fingerprint()


def test_sizes_below_one_are_refused():
    with pytest.raises(CorpusError, match="max_bytes"):
        PairCorpus([("a", Pair(b"", b""))], sequence_bytes=1, max_bytes=0)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"target\tsource\nb\ta\n", [Pair(b"a", b"b")]),
        (b"\xef\xbb\xbfSource\tTarget\tLang\r\na\tb\tcs\r\n", [Pair(b"a", b"b", "cs")]),
        (b"lang\toutput\tinput\ncs\tb\ta", [Pair(b"a", b"b", "cs")]),
        (b"\xef\xbb\xbfa\tb\n", [Pair(b"a", b"b")]),
        (b'"a ""b"""\t"c"\n', [Pair(b'"a ""b"""', b'"c"')]),
        (b"a\tb\tc\x1b[31m" + b"x" * 200, [Pair(b"a", b"b", "c\\x1b[31m" + "x" * 68 + "...")]),
    ],
    ids=["order of a header", "marks and carriage returns", "group first", "mark alone", "quotes", "codes in a group"],
)
def test_lines_of_a_table_of_pairs(data, expected, tmp_path):
    (tmp_path / "p.tsv").write_bytes(data)
    assert read_pairs(tmp_path / "p.tsv") == expected


def test_files_of_pairs_that_have_no_end_or_another_form(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.tsv")
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress(b"{}"))
    (tmp_path / "wide.tsv").write_bytes("a\tb\n".encode("utf-16"))
    (tmp_path / "header.tsv").write_bytes(b"lang\tsource\ttarget\na\tb\n")
    for name, message in {
        "pipe.tsv": "pipe.tsv: is a pipe, expected a file",
        "packed.jsonl": "packed.jsonl: holds .gz data",
        "wide.tsv": "wide.tsv: is UTF-16",
        "header.tsv": "line 2: 2 columns, where the first line names more",
        "n" * 5000: "no such file of pairs",
        "a\x1b\n": "no such file of pairs",
    }.items():
        with pytest.raises(CorpusError, match=message) as caught:
            open_pairs([str(tmp_path / name)], sequence_bytes=9)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 400
    monkeypatch.setattr("marlin_cli.corpus.pairs.MOST_PAIRS", 2)
    with pytest.raises(CorpusError, match="holds more than 2 pairs"):
        read_pairs(write(tmp_path / "p.jsonl", *[{"source": "a", "target": "b"}] * 3))
    monkeypatch.setattr("marlin_cli.corpus.pairs.MOST_PAIRS_BYTES", 20)
    with pytest.raises(CorpusError, match="is larger than 20 bytes"):
        read_pairs(tmp_path / "p.jsonl")


def test_a_folder_is_no_file_of_pairs(tmp_path):
    for read in (lambda: locate_pairs(str(tmp_path)), lambda: read_pairs(tmp_path)):
        with pytest.raises(CorpusError, match=r": is a folder, expected a file of pairs \(.jsonl or .tsv\)$"):
            read()
