"""Sizes that Parquet's page headers claim: the same as the footer's sum, for every writer's option, and bounded."""

import base64
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from marlin_cli.corpus import open_corpus, pages
from marlin_cli.errors import CorpusError

TEXTS = [np.random.default_rng(size).bytes(size).hex() if size % 7 else None for size in range(50, 350)]


def write(path: Path, **options) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"id": range(300), "text": TEXTS}), path, row_group_size=120, **options)
    return path


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "brotli", "zstd", "lz4"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("page_bytes", [64, 1 << 20])
@pytest.mark.parametrize("rich", [True, False])
def test_headers_are_read_as_they_were_written(tmp_path, codec, version, page_bytes, rich):
    options = {"use_dictionary": rich, "write_statistics": rich, "write_page_checksum": rich, "write_page_index": rich}
    path = write(tmp_path / "x", compression=codec, data_page_version=version, data_page_size=page_bytes, **options)
    metadata = pyarrow.parquet.read_metadata(path)
    with path.open("rb") as file:
        for group in range(metadata.num_row_groups):
            chunk = metadata.row_group(group).column(1)
            start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
            end, values, size, sizes = start + chunk.total_compressed_size, 0, 0, []
            while start < end:
                unpacked, packed, header, count = pages._page(file, start, path)
                start, values, size = start + header + packed, values + count, size + header + unpacked
                sizes += [unpacked, packed]
            assert (start, values, size) == (end, chunk.num_values, chunk.total_uncompressed_size)
            assert pages.largest_page(file, chunk, path) == max(sizes)


def test_a_page_that_stands_for_too_much_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a" * 100_000]}), path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 5_000
    monkeypatch.setattr(pages, "MOST_PAGE_BYTES", 99_999)
    with pytest.raises(CorpusError, match=r"x.parquet: has a page of 100,0\d\d bytes, more than 99,999"):
        list(open_corpus([str(path)]))


def test_a_header_that_is_none_and_one_that_ends_early(tmp_path):
    path = tmp_path / "x"
    for data in (b"\x15\x00\x15", b"\x15\x00\x15\x01\x15\x01\x00", b"\x00", b"", b"\x18\xff\xff\xff\xff\x0f"):
        path.write_bytes(data)
        with path.open("rb") as file, pytest.raises(CorpusError, match="x: damaged parquet file: a page with"):
            pages._page(file, 0, path)


@pytest.mark.filterwarnings("ignore:.*no text")
def test_columns_with_large_pages_are_read_row_by_row(tmp_path, monkeypatch):
    monkeypatch.setattr("marlin_cli.corpus.tables.LARGE_PAGE_BYTES", 10)
    path = write(tmp_path / "x.parquet", data_page_size=1 << 20)
    found = [window.bytes.tobytes().decode() for window in open_corpus([str(path)])]
    assert found == [text for text in TEXTS if text is not None]


@pytest.mark.parametrize(
    ("footer", "expected"),
    [
        (b"\x15\x02\x00", False),
        (b"\x15\x02\x7c\x00\x00", True),  # encryption_algorithm
        (b"\x15\x02\x39\x1c\x19\x2c\x26\x08\x00\x26\x08\x00\x00\x00", False),  # two columns with file_offset
        (b"\x15\x02\x39\x1c\x19\x2c\x26\x08\x00\x26\x08\x6c\x00\x00\x00\x00", True),  # the second one's crypto_metadata
        (b"\x15\x02\x39\x2c\x19\x1c\x26\x08\x6c\x00\x00\x00\x19\x1c\x26\x08\x00\x00\x00", True),  # the first group's
    ],
)
def test_a_plain_footer_tells_what_is_encrypted(footer, expected, tmp_path):
    assert pages.is_encrypted(footer, tmp_path) is expected


@pytest.mark.parametrize("footer", [b"", b"\x15", b"\x15\x02\x3b\x00", b"\x1c" * 100, b"\x15\x02\x39\xfc\xff\xff\xff\xff\x0f"])
def test_a_footer_that_is_none(footer, tmp_path):
    with pytest.raises(CorpusError, match="x: damaged parquet file: its schema cannot be read"):
        pages.is_encrypted(footer, tmp_path / "x")


def test_an_encrypted_file_is_named(tmp_path):
    encryption = pytest.importorskip("pyarrow.parquet.encryption")

    class Keys(encryption.KmsClient):
        def __init__(self, _):
            super().__init__()

        def wrap_key(self, key, _):
            return base64.b64encode(key)

    settings = encryption.EncryptionConfiguration(footer_key="one", column_keys={"two": ["text"]})
    factory = encryption.CryptoFactory(Keys)
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), settings)
    table = pyarrow.table({"text": TEXTS})
    path = tmp_path / "x.parquet"
    with pyarrow.parquet.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    with pytest.raises(CorpusError, match="x.parquet: is encrypted; write it without encryption"):
        list(open_corpus([str(path)]))
