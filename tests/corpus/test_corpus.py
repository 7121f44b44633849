"""Corpora: names, raw windows, mixing, resuming, bounded memory, the shipped sample, and what is refused."""

import bz2
import gzip
import io
import json
import lzma
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from marlin_cli.corpus import open_corpus, parse_source
from marlin_cli.corpus.tables import TABLE_SUFFIXES
from marlin_cli.errors import CorpusError, MarlinError

TEXT = "naïve café — 文字 \x00 ".encode() * 40


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for domain in ("multilingual", "code", "binary"):
        (tmp_path / domain).mkdir()
        for number in range(4):
            (tmp_path / domain / f"{number}.bin").write_bytes(rng.bytes(700 + 100 * number))
    (tmp_path / "code" / ".hidden").write_bytes(b"h" * 500)
    return tmp_path


def read(*names, **options):
    return list(open_corpus(names, **{"sequence_bytes": 128, **options}))


def joined(windows):
    return b"".join(window.bytes.tobytes() for window in windows)


def test_every_window_comes_once_and_bytes_are_as_they_lie(folder):
    windows = read(str(folder))
    assert [window.index for window in windows] == list(range(len(windows)))
    for domain in ("multilingual", "code", "binary"):
        expected = set()
        for file in (folder / domain).glob("[0-9]*"):
            data = file.read_bytes()
            cuts = [data[start : start + 128] for start in range(0, len(data), 128)]
            expected |= {cut for cut in cuts if len(cut) >= 64}
        found = [window.bytes.tobytes() for window in windows if window.domain == domain]
        assert len(found) == len(expected) and set(found) == expected


def test_the_seed_decides_the_order_and_nothing_else_does(folder):
    first, again, other = (joined(read(str(folder), seed=seed)) for seed in (1, 1, 2))
    assert first == again != other and sorted(first) == sorted(other)


def test_weights_decide_how_often_a_source_is_drawn(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * 128 * 400)
    windows = read(f"one={tmp_path}/a:3", f"two={tmp_path}/b:1", max_bytes=128 * 400)
    share = sum(window.domain == "one" for window in windows) / len(windows)
    assert 0.65 < share < 0.85


@pytest.mark.parametrize("done", [1, 5, 17])
def test_a_resumed_stream_goes_on_at_the_next_window(folder, done):
    whole = read(str(folder), max_bytes=5000)
    corpus = open_corpus([str(folder)], sequence_bytes=128, max_bytes=5000)
    stream = iter(corpus)
    first = [next(stream) for _ in range(done)]
    state = json.loads(json.dumps(corpus.state()))
    later = open_corpus([str(folder)], sequence_bytes=128, max_bytes=5000)
    later.resume(state)
    rest = list(later)
    assert joined(first + rest) == joined(whole)
    assert [window.index for window in first + rest] == [window.index for window in whole]


def test_the_last_window_is_cut_at_the_limit(folder):
    assert sum(len(window.bytes) for window in read(str(folder), max_bytes=1000)) == 1000


def test_compressed_text_is_read_through_and_compressed_binaries_are_kept(tmp_path):
    plain, zipped, zstd = tmp_path / "x.txt", tmp_path / "x.txt.gz", tmp_path / "x.txt.zst"
    plain.write_bytes(TEXT)
    zipped.write_bytes(gzip.compress(TEXT))
    zstd.write_bytes(zstandard.compress(TEXT))
    for file in (plain, zipped, zstd):
        assert joined(read(f"multilingual={file}", sequence_bytes=len(TEXT))) == TEXT
    kept = zipped.read_bytes()
    assert joined(read(f"binary={zipped}", sequence_bytes=len(kept))) == kept


@pytest.mark.parametrize("suffix", TABLE_SUFFIXES)
def test_rows_of_tables_stand_for_their_bytes(tmp_path, suffix):
    file = tmp_path / f"rows{suffix}"
    rows = [{"id": number, "text": TEXT.decode() + str(number)} for number in range(3)]
    lines = "\n".join(json.dumps(row) for row in rows).encode()
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        packings = {".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
        pack = packings.get(file.suffix, bytes)
        file.write_bytes(pack(lines))
    expected = [row["text"].encode() for row in rows]
    assert [window.bytes.tobytes() for window in read(str(file), sequence_bytes=1 << 16)] == expected


def test_binary_columns_are_taken_as_they_are(tmp_path):
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"bytes": b"\x00\xff" * 100, "text": "no"}]), file)
    assert joined(read(str(file), sequence_bytes=1000)) == b"\x00\xff" * 100


def test_stdin_is_a_corpus(monkeypatch):
    class Pipe:
        buffer = io.BytesIO(TEXT)

    monkeypatch.setattr(sys, "stdin", Pipe())
    corpus = open_corpus(["code=-"], sequence_bytes=100)
    windows = list(corpus)
    assert len(TEXT) == 1040 and joined(windows) == TEXT[:1000]  # the rest is shorter than a window may be
    assert {window.domain for window in windows} == {"code"}
    with pytest.raises(CorpusError, match="stdin cannot be resumed"):
        corpus.state()


def test_names_are_split_where_no_such_file_lies(tmp_path):
    odd = tmp_path / "a=b:2"
    odd.write_bytes(TEXT)
    (tmp_path / "plain").write_bytes(TEXT)
    assert parse_source(str(odd))[0].files == (odd,)
    (source,) = parse_source(f"code={tmp_path}/plain:0.5")
    assert (source.domain, source.weight) == ("code", 0.5)
    assert parse_source(f"{tmp_path}/pl*")[0].domain == "other"
    assert [source.hub for source in parse_source("web=hf:owner/name/config@train:2")] == ["owner/name/config@train"]


def test_the_shipped_recipe_has_three_domains_and_right_checksums():
    corpus = open_corpus(["default"], sequence_bytes=4096)
    assert corpus.domains == ["multilingual", "code", "binary"]
    assert 2e6 < corpus.total_bytes < 4.2e6
    scripts = joined(window for window in corpus if window.domain == "multilingual").decode("utf-8", "ignore")
    for script in "Ж", "ß", "文", "の", "한", "א", "ع", "ก", "अ", "அ", "క", "ქ", "ខ", "α", "հ":
        assert script in scripts


def test_a_changed_sample_is_noticed(tmp_path):
    (tmp_path / "x").write_bytes(TEXT)
    (tmp_path / "SUMS").write_text("0" * 64 + "  x\n")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("checksums: SUMS\nsources: [{domain: code, path: x}]\n")
    with pytest.raises(CorpusError, match="its SHA-256 is not the one in SUMS"):
        parse_source(str(recipe))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: []", "names no sources"),
        ("sources: [{domain: code, path: nowhere}]", "nowhere: no such file"),
        ("sources: [{domain: code, path: x, wait: 1}]", "did you mean 'weight'"),
        ("sources: [{domain: code, path: x, weight: 0}]", "must be above 0"),
        ("checksums: SUMS\nsources: [{domain: code, path: x}]", "SUMS: no such file"),
        ("a: [", "cannot read as YAML"),
    ],
)
def test_bad_recipes_are_refused(tmp_path, text, message):
    (tmp_path / "x").write_bytes(TEXT)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text)
    with pytest.raises(MarlinError, match=message) as caught:
        parse_source(str(recipe))
    assert "\n" not in str(caught.value)


def test_bad_corpora_are_refused(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "short").write_bytes(b"x" * 10)
    (tmp_path / "cut.gz").write_bytes(gzip.compress(np.random.default_rng(0).bytes(5000))[:2000])
    (tmp_path / "cut.zst").write_bytes(b"\x28\xb5\x2f\xfd" + b"\xff" * 100)
    (tmp_path / "columns.jsonl").write_text('{"a": "x", "b": "y"}\n')
    (tmp_path / "broken.jsonl").write_text("{{{\n")
    for name, message in {
        "empty": "holds no bytes",
        "short": "holds no window",
        "cut.gz": "cut.gz: damaged compressed file",
        "cut.zst": "cut.zst: damaged compressed file",
        "columns.jsonl": "which column holds the bytes",
        "broken.jsonl": "broken.jsonl",
        "nothing": "no such file, folder, pattern or shipped recipe",
        "x.yaml": "no such recipe",
    }.items():
        with pytest.raises(CorpusError, match=message) as caught:
            read(str(tmp_path / name))
        assert "\n" not in str(caught.value)
