"""Compressed corpora and lines of JSON: what their specifications and usual writers allow is read, or named in a refusal."""

import bz2
import gzip
import io
import json
import lzma
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

import marlin_cli.corpus.lines
from marlin_cli.corpus import open_corpus
from marlin_cli.errors import CorpusError

DATA = np.random.default_rng(0).bytes(3000) + bytes(3000)
TEXT = "a line of text that is longer than the shortest window, which has sixty-four bytes"
PACKINGS = {".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name: str, data: bytes) -> str:
    Path(name).write_bytes(data)
    return name


def content(name: str) -> bytes:
    return b"".join(window.bytes.tobytes() for window in open_corpus([name], sequence_bytes=1 << 20))


def refused(name: str, message: str) -> None:
    with pytest.raises(CorpusError, match=message) as caught:
        content(name)
    assert str(caught.value).startswith(name) and str(caught.value).isprintable()


@pytest.mark.parametrize("suffix", PACKINGS)
def test_empty_parts_and_many_parts_are_one_stream(suffix):
    pack = PACKINGS[suffix]
    assert content(write(f"x{suffix}", pack(b"") + pack(DATA) + pack(b"") + pack(DATA) + pack(b""))) == DATA * 2


@pytest.mark.parametrize("suffix", PACKINGS)
def test_what_unpacks_to_much_is_read_in_parts(suffix):
    name = write(f"x{suffix}", PACKINGS[suffix](bytes(8 << 20)))
    assert Path(name).stat().st_size < 16 << 10
    windows = iter(open_corpus([name], sequence_bytes=1 << 16))
    next(windows)  # and the libraries are loaded
    tracemalloc.start()
    try:
        assert sum(len(window.bytes) for window in windows) == (8 << 20) - (1 << 16)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_zeros_after_the_end_are_padding(suffix):
    assert content(write(f"x{suffix}", PACKINGS[suffix](DATA) + bytes(512))) == DATA
    pack = PACKINGS[suffix]
    assert content(write(f"y{suffix}", pack(DATA) + bytes(512) + pack(DATA))) == DATA * 2


@pytest.mark.parametrize("suffix", PACKINGS)
def test_other_bytes_after_the_end_are_damage(suffix):
    refused(write(f"x{suffix}", PACKINGS[suffix](DATA) + b"something else"), "damaged compressed file")


@pytest.mark.parametrize("suffix", PACKINGS)
def test_a_file_that_is_not_what_its_name_says(suffix):
    refused(write(f"x{suffix}", DATA), f"is no {suffix} file, for it begins with")
    refused(write(f"y.jsonl{suffix}", json.dumps({"text": TEXT}).encode()), f"is no {suffix} file, for it begins with")
    refused(write("z.jsonl", PACKINGS[suffix](json.dumps({"text": TEXT}).encode())), f"holds {suffix} data, not lines of JSON")


def test_all_fields_of_a_gzip_header():
    body = zlib.compressobj(wbits=-15)
    packed = body.compress(DATA) + body.flush()
    header = b"\x1f\x8b\x08\x1f" + bytes(6) + struct.pack("<H", 4) + b"more" + b"name\0" + b"comment\0" + b"\0\0"
    assert content(write("x.gz", header + packed + struct.pack("<II", zlib.crc32(DATA), len(DATA)))) == DATA


def test_frames_of_zstandard():
    skipped = struct.pack("<II", 0x184D2A5F, 5) + b"hello"
    packed = zstandard.compress(DATA)
    assert content(write("skipped.zst", skipped + packed + skipped + packed + skipped)) == DATA * 2
    settings = zstandard.ZstdCompressionParameters.from_level(1, window_log=30, enable_ldm=True)
    long = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    refused(write("long.zst", long.compress(DATA) + long.flush()), "cannot unpack: it needs a window of more than 128 MiB")
    dictionary = zstandard.train_dictionary(1000, [(b"sample %d of a text " % number) * 5 for number in range(200)])
    packed = zstandard.ZstdCompressor(dict_data=dictionary).compress(b"sample 5 of a text " * 5)
    refused(write("dictionary.zst", packed), "cannot unpack: it was packed with a dictionary")


def test_an_xz_file_that_asks_for_much_memory():
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 28}]
    refused(write("big.xz", lzma.compress(DATA, filters=filters)), "cannot unpack: it needs more than 96 MiB")
    assert content(write("best.xz", lzma.compress(DATA, preset=9))) == DATA


@pytest.mark.parametrize("suffix", [".lz4", ".br", ".lzma", ".Z"])
def test_other_packings_are_named_and_kept_in_binary_data(suffix):
    refused(write(f"x.txt{suffix}", DATA), f"{suffix.lower()} files are not read through; unpack it")
    (window,) = open_corpus([f"binary=x.txt{suffix}"], sequence_bytes=1 << 20)
    assert window.bytes.tobytes() == DATA


def test_tables_under_other_names_are_named_and_kept_in_binary_data():
    table = pyarrow.table({"text": [TEXT]})
    pyarrow.parquet.write_table(table, "table.pq")
    write("table.parquet.gz", gzip.compress(Path("table.pq").read_bytes()))
    with pyarrow.ipc.new_file("table.arrow", table.schema) as sink:
        sink.write_table(table)
    with pyarrow.ipc.new_stream("stream.arrow", table.schema) as sink:
        sink.write_table(table)
    parquet, arrow = "a Parquet table", "an Arrow table"
    for name, what in (
        ("table.pq", parquet), ("table.parquet.gz", parquet), ("table.arrow", arrow), ("stream.arrow", arrow)
    ):  # fmt: skip
        refused(name, f"is {what}.*, which is read from unpacked .parquet files alone")
        (window,) = open_corpus([f"binary={name}"], sequence_bytes=1 << 20)
        assert window.bytes.tobytes() == Path(name).read_bytes()


PARQUET = {
    "another file": (DATA, "is no parquet file, for it begins with"),
    "json": (b'{"text": "x"}', "is no parquet file, for it begins with b'{\"te'"),
    "a beginning": (b"PAR1" + DATA, "damaged parquet file: it is cut short"),
    "two marks": (b"PAR1PAR1", "damaged parquet file: it is cut short"),
    "a footer too long": (b"PAR1" + DATA + b"\xff\xff\xff\x7fPAR1", "damaged parquet file: its end claims a schema"),
    "an encrypted footer": (b"PARE" + DATA + b"\x10\0\0\0PARE", "is encrypted"),
}


@pytest.mark.parametrize("kind", PARQUET)
def test_parquet_files_that_are_none(kind):
    data, message = PARQUET[kind]
    refused(write("x.parquet", data), message)


def test_a_parquet_file_without_rows():
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), "x.parquet")
    with pytest.raises(CorpusError, match="holds no window of bytes"):
        content("x.parquet")


LINES = {
    "carriage returns": b'{"text": "%s"}\r\n\r\n{"text": "%s"}\r\n',
    "a mark at the beginning": b'\xef\xbb\xbf{"text": "%s"}\n{"text": "%s"}',
    "files joined": b'{"text": "%s"}\n\xef\xbb\xbf{"text": "%s"}\n',
    "blank lines": b'\n \n{"text": "%s"}\n\t\n{"text": "%s"}\n\n',
}


@pytest.mark.parametrize("kind", LINES)
def test_lines_as_writers_end_them(kind):
    text = TEXT.encode()
    assert content(write("x.ndjson", LINES[kind] % (text, text))) == text * 2


NO_LINES = {
    "cut short": (b'{"text": "a"}\n{"text": "b', "line 2: is not JSON: Unterminated string"),
    "zeros": (b'{"text": "a"}\n' + bytes(10), "line 2: is not JSON"),
    "a list over lines": (b'[\n{"text": "a"}\n]', "line 1: begins a document over several lines"),
    "a document over lines": (b'{\n  "text": "a"\n}', "line 1: begins a document over several lines"),
    "a list in a line": (b'[{"text": "a"}]', "line 1 is a list, not a JSON object; write its entries one a line"),
    "another encoding": ('{"text": "a"}'.encode("utf-16"), "line 1: is not UTF-8"),
    "many digits": (b'{"text": "a", "n": %s}' % (b"9" * 5000), "line 1: is not JSON"),
}


@pytest.mark.parametrize("kind", NO_LINES)
@pytest.mark.parametrize("suffix", [".jsonl", ".json.gz"])
def test_lines_that_are_no_rows(kind, suffix):
    data, message = NO_LINES[kind]
    refused(write(f"x{suffix}", PACKINGS.get(Path(suffix).suffix, bytes)(data)), message)


def test_a_line_without_an_end_takes_bounded_memory(monkeypatch):
    monkeypatch.setattr(marlin_cli.corpus.lines, "MOST_LINE_BYTES", 1000)

    class Endless(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            buffer[:] = b" " * len(buffer)
            return len(buffer)

    with pytest.raises(CorpusError, match="x: line 1 is longer than 1,000 bytes"):
        list(marlin_cli.corpus.lines.lines_of(io.BufferedReader(Endless()), "x", CorpusError))
    refused(write("x.jsonl", b'{"text": "%s"}' % (b"a" * 1000)), "x.jsonl: line 1 is longer than 1,000 bytes")


def test_a_json_file_is_raw_bytes_and_says_so_where_it_looks_like_rows():
    rows = json.dumps([{"text": TEXT}]).encode()
    with pytest.warns(UserWarning, match="x.json: is read as raw bytes, as every .json is"):
        assert content(write("x.json", rows)) == rows
    assert content(write("package.json", b'{"name": "%s"}' % TEXT.encode())).startswith(b'{"name"')
