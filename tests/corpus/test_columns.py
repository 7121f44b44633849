"""The column of a table that is its text: the same whatever row, file or page comes first, and no text lost in silence."""

import itertools
import json
import warnings
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from marlin_cli.corpus import open_corpus
from marlin_cli.errors import AssumptionWarning, CorpusError

TEXT = "the body of a document that is longer than the shortest window, which has sixty-four bytes"
URL = "address-of-the-page/" + "x" * 80
OTHER = "another text of the same row, which is longer than the shortest window too, and is not wanted"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_table(name: str, *rows: dict) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), name)
    else:
        Path(name).write_text("\n".join(map(json.dumps, rows)))
    return name


def contents(*names: str) -> list[str]:
    return sorted(window.bytes.tobytes().decode() for window in open_corpus(names, sequence_bytes=4096))


def told(*names: str) -> tuple[list[str], list[str]]:
    """The texts, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AssumptionWarning)
        found = contents(*names)
    return found, [str(each.message) for each in caught if each.category is AssumptionWarning]


WITHOUT = [{"url": URL}, {"meta": URL, "url": None}, {"id": 0}, {"text": None}, {}, {"messages": [{"content": OTHER}]}]


@pytest.mark.parametrize("without", WITHOUT, ids=json.dumps)
def test_text_is_the_text_in_whatever_row_it_comes_first(without):
    rows = [without, {"text": TEXT, "url": URL}, {"text": TEXT}]
    for number, order in enumerate(itertools.permutations(rows)):
        found, warned = told(write_table(f"{number}.jsonl", *order))
        assert found == [TEXT] * 2
        line = order.index(without) + 1
        assert len(warned) == 1 and warned[0].startswith(f"{number}.jsonl: line {line}: no text")


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
@pytest.mark.parametrize("without", [{"url": URL}, {"id": 1, "text": None}, {"id": 1}])
def test_text_is_the_text_in_whatever_file_it_comes_first(without, suffix):
    for seed in range(4):
        write_table(f"{seed}/a.{suffix}", {"text": TEXT}, {"text": TEXT})
        write_table(f"{seed}/b.{suffix}", *[without] * 3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = [window.bytes.tobytes().decode() for window in open_corpus([str(seed)], sequence_bytes=4096, seed=seed)]
        assert found == [TEXT] * 2
        assert "3 of 5 rows hold no text ('text') and were left out" in str(caught[-1].message)


def test_the_only_column_of_text_is_told_by_all_rows_and_files():
    name = write_table("rows.jsonl", {"id": 1}, {"body": TEXT}, {"id": 2, "body": None}, {"body": TEXT})
    found, warned = told(name)
    assert found == [TEXT] * 2
    assert warned == [
        "rows.jsonl: line 1: no text ('body') where other rows hold some; rows without are left out",
        "other: 2 of 4 rows hold no text ('body') and were left out",
    ]
    write_table("mixed/a.parquet", {"body": TEXT})
    write_table("mixed/b.parquet", {"url": URL})
    with pytest.raises(CorpusError, match="which column holds the bytes\\? Found '(body|url)', '(body|url)'; name it text"):
        contents("mixed")


def test_a_null_in_a_parquet_file_is_told_once():
    rows = [{"text": TEXT}, {"text": None}, {"text": TEXT}, {"text": None}]
    found, warned = told(write_table("rows.parquet", *rows))
    assert found == [TEXT] * 2
    assert [each.partition(":")[0] for each in warned] == ["rows.parquet", "other"] and "row 2: no text" in warned[0]


CONFLICTS = {
    "one of two, then the other alone": ([{"content": TEXT, "text": OTHER}, {"text": TEXT}], "'text' .* beside 'content'"),
    "two, where one is null": ([{"content": TEXT, "text": OTHER}, {"content": None, "text": TEXT}], "'text' .* beside"),
    "text, then numbers": ([{"text": TEXT}, {"text": 5}], "'text' is (int|int64), expected text"),
    "text, then lists": ([{"text": TEXT}, {"text": [TEXT]}], "'text' is list.*, expected text"),
    "two unknown ones": ([{"a": TEXT}, {"b": TEXT}], "which column holds the bytes\\? Found '[ab]', '[ab]'"),
}


@pytest.mark.filterwarnings("ignore:.*rows without are left out")
@pytest.mark.parametrize("kind", CONFLICTS)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("turned", [False, True])
def test_rows_that_would_lose_text_are_refused_in_any_order(kind, suffix, turned):
    rows, message = CONFLICTS[kind]
    rows = rows[::-1] if turned else rows
    if suffix == "jsonl":
        names = [write_table("rows.jsonl", *rows)]
    else:  # the rows of a file have one type: a file each
        for number, row in enumerate(rows):
            write_table(f"rows/{number}.parquet", row)
        names = ["rows"]
    with pytest.raises(CorpusError, match=f"^rows.*: {message}") as caught:
        contents(*names)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"messages": [{"role": "user", "content": TEXT}]}, "messages"),
        ({"id": "x", "conversations": [{"value": TEXT}]}, "conversations"),
        ({"text": [TEXT]}, "text"),
        ({"document": {"text": TEXT}}, "document"),
        ({"label": TEXT, "tokens": [1, 2]}, "tokens"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_chats_and_lists_are_refused_by_column(row, column, suffix):
    name = write_table(f"rows.{suffix}", row, row)
    with pytest.raises(CorpusError, match=f"{name}.*: '{column}' holds .*, and text alone is read; have one column text"):
        contents(name)


def test_lists_beside_a_text_are_no_matter():
    assert contents(write_table("rows.jsonl", {"tags": ["a"], "text": TEXT, "meta": {"text": OTHER}})) == [TEXT]
    assert contents(write_table("rows.parquet", {"tags": ["a"], "text": TEXT, "meta": {"text": OTHER}})) == [TEXT]


def test_row_groups_pages_and_codecs_do_not_matter():
    texts = [None] * 300 + [f"{number} {TEXT}" for number in range(300)]
    for codec in ("none", "snappy", "gzip", "brotli", "zstd", "lz4"):
        for options in ({"row_group_size": 100}, {"data_page_size": 64, "use_dictionary": False, "data_page_version": "2.0"}):
            table = pyarrow.table({"url": [URL] * 600, "text": texts})
            pyarrow.parquet.write_table(table, "rows.parquet", compression=codec, **options)
            found, warned = told("rows.parquet")
            assert found == sorted(texts[300:])
            assert warned[1] == "other: 300 of 600 rows hold no text ('text') and were left out"


def test_columns_of_one_name_and_columns_with_terminal_codes():
    table = pyarrow.Table.from_arrays([pyarrow.array([TEXT]), pyarrow.array([OTHER])], names=["text", "text"])
    pyarrow.parquet.write_table(table, "twice.parquet")
    with pytest.raises(CorpusError, match="has 2 columns 'text'; leave one"):
        contents("twice.parquet")
    for name in ("codes.jsonl", "codes.parquet"):
        with pytest.raises(CorpusError, match="Found ") as caught:
            contents(write_table(name, {"a\x1b]0;title\x07": TEXT, "b\n": TEXT}))
        assert str(caught.value).isprintable()


def test_a_thousand_names_are_not_all_listed():
    with pytest.raises(CorpusError, match=r"Found 'n0', .*'n7', \.\.\.; name it text") as caught:
        contents(write_table("rows.jsonl", *({f"n{number}": TEXT} for number in range(1000))))
    assert len(str(caught.value)) < 200


class Hub:
    """What `load_dataset` gives for a dataset of the hub that declares no columns."""

    features = None

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_a_hub_dataset_without_declared_columns(monkeypatch):
    import datasets

    rows = [{"url": URL}, {"url": URL, "text": TEXT}, {"text": TEXT}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Hub(rows))
    found, warned = told("hf:a/b")
    assert found == [TEXT] * 2 and warned[0].startswith("hf:a/b: row 1: no text")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Hub([{"a\x1b": TEXT, "b": TEXT}]))
    with pytest.raises(CorpusError, match=r"hf:a/b: which column holds the bytes\? Found 'a\\x1b', 'b'"):
        contents("hf:a/b")


def test_a_hub_dataset_with_declared_columns(monkeypatch):
    import datasets

    def rows():
        yield from [{"url": URL, "text": None}, {"url": URL, "text": TEXT}]

    features = datasets.Features({"url": datasets.Value("string"), "text": datasets.Value("string")})
    info = datasets.DatasetInfo(features=features)
    examples = datasets.iterable_dataset.ExamplesIterable(lambda: enumerate(rows()), {})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset(examples, info=info))
    found, warned = told("hf:a/b")
    assert found == [TEXT] and len(warned) == 1


def test_raw_files_between_tables_are_read_too():
    noise = np.random.default_rng(0).integers(97, 123, 200, dtype=np.uint8).tobytes()
    Path("all").mkdir()
    Path("all/raw").write_bytes(noise)
    write_table("all/rows.jsonl", {"text": TEXT})
    assert contents("all") == sorted([TEXT, noise.decode()])
