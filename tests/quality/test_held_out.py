"""Files by domain and their windows: every byte, in sorted order, as it lies."""

import gzip

import pytest

from marlin_cli.errors import CorpusError, UsageError
from marlin_cli.quality.held_out import Window, Windowing, cut, files_by_domain


@pytest.fixture
def folder(tmp_path):
    """Two domains of no standard name, a file beside them, an empty and a hidden one."""
    for name, data in {
        "songs/b.txt": b"b" * 10, "songs/a/z.txt": b"z" * 7, "maps/0.bin": bytes(5), "readme": b"r",
        "maps/empty": b"", "maps/.hidden": b"h",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return tmp_path


def lengths(windows):
    return [(window.file.name, window.start, window.length) for window in windows]


def test_immediate_subfolders_are_domains(folder):
    domains = files_by_domain(str(folder))
    names = {domain: [file.relative_to(folder).as_posix() for file in files] for domain, files in domains.items()}
    assert names == {"maps": ["maps/0.bin"], "songs": ["songs/a/z.txt", "songs/b.txt"], "other": ["readme"]}


def test_a_folder_of_a_standard_domain_hides_no_other(folder):
    (folder / "maps").rename(folder / "binary")
    assert list(files_by_domain(str(folder))) == ["binary", "other", "songs"]


def test_a_folder_without_bytes_is_refused(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(CorpusError, match="holds no bytes"):
        files_by_domain(str(tmp_path))


def test_a_recipe_names_its_domains():
    assert list(files_by_domain("default")) == ["multilingual", "code", "binary"]


def test_a_file_is_one_domain(folder):
    assert files_by_domain(str(folder / "readme")) == {"other": [folder / "readme"]}


def test_windows_are_disjoint_and_leave_no_byte_out(folder):
    windows = cut(files_by_domain(str(folder)), Windowing(window_bytes=4))
    assert lengths(windows["songs"]) == [
        ("z.txt", 0, 4),
        ("z.txt", 4, 3),
        ("b.txt", 0, 4),
        ("b.txt", 4, 4),
        ("b.txt", 8, 2),
    ]
    assert lengths(windows["other"]) == [("readme", 0, 1)]
    assert b"".join(window.read().tobytes() for window in windows["songs"]) == b"z" * 7 + b"b" * 10
    assert [window.read().tolist() for window in windows["maps"]] == [[0, 0, 0, 0], [0]]


def test_sliding_windows_share_context_and_no_scored_byte(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(11)))
    windows = cut(files_by_domain(str(tmp_path / "a")), Windowing(window_bytes=6, stride_bytes=2))["other"]
    assert [(window.start, window.length, window.context) for window in windows] == [
        (0, 6, 0), (2, 6, 4), (4, 6, 4), (6, 5, 4),
    ]  # fmt: skip
    assert sum(window.scored for window in windows) == 11
    scored = [window.read()[window.context :].tolist() for window in windows]
    assert sum(scored, []) == list(range(11))


def test_margins_end_where_the_file_does(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(8)))
    data, before = Window(tmp_path / "a", 2, 4).read_with_margins(3)
    assert (data.tolist(), before) == ([0, 1, 2, 3, 4, 5, 6, 7], 2)
    data, before = Window(tmp_path / "a", 0, 2).read_with_margins(3)
    assert (data.tolist(), before) == ([0, 1, 2, 3, 4], 0)


def test_a_share_of_sliding_windows_is_not_exceeded(tmp_path):
    (tmp_path / "a").write_bytes(bytes(1000))
    for share in (10, 25, 100, 999):
        windows = cut(files_by_domain(str(tmp_path / "a")), Windowing(10, 3, max_bytes=share))["other"]
        assert share - 10 < sum(window.scored for window in windows) <= share


def test_only_the_first_bytes_of_each_file(folder):
    windows = cut(files_by_domain(str(folder)), Windowing(window_bytes=4, max_bytes_per_file=6))
    assert lengths(windows["songs"]) == [("z.txt", 0, 4), ("z.txt", 4, 2), ("b.txt", 0, 4), ("b.txt", 4, 2)]


def test_a_domain_beyond_its_share_gives_windows_at_even_steps(tmp_path):
    (tmp_path / "long").mkdir()
    (tmp_path / "short").mkdir()
    (tmp_path / "long/file").write_bytes(bytes(range(100)))
    (tmp_path / "short/file").write_bytes(b"abc")
    windows = cut(files_by_domain(str(tmp_path)), Windowing(window_bytes=10, max_bytes=48))
    assert [window.start for window in windows["long"]] == [20, 70]  # 24 bytes are two windows of ten
    assert lengths(windows["short"]) == [("file", 0, 3)]


@pytest.mark.parametrize("name", ["text.gz", "text.zst", "rows.jsonl", "rows.parquet"])
def test_packed_files_are_refused_where_calibrate_reads_through_them(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"bytes"))
    with pytest.raises(CorpusError, match="does not read rows or compressed files; unpack it, or"):
        files_by_domain(str(tmp_path))


def test_packed_files_are_bytes_of_the_binary_domain(tmp_path):
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary/text.gz").write_bytes(gzip.compress(b"bytes"))
    assert list(files_by_domain(str(tmp_path))) == ["binary"]


@pytest.mark.parametrize("name", ["-", "hf:owner/name"])
def test_streams_are_refused(name):
    with pytest.raises(CorpusError, match="write the bytes to a file first"):
        files_by_domain(name)


def test_a_share_below_one_window_is_refused(folder):
    with pytest.raises(UsageError, match="leaves 3 bytes for a domain, less than one window of 4"):
        cut(files_by_domain(str(folder)), Windowing(window_bytes=4, max_bytes=11))


@pytest.mark.parametrize("field", ["window_bytes", "max_bytes_per_file", "max_bytes"])
def test_sizes_start_at_one(field):
    with pytest.raises(UsageError, match="must be at least 1, found 0"):
        Windowing(**{field: 0})


def test_a_file_that_shrinks_or_goes_is_reported(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    with pytest.raises(CorpusError, match="became shorter"):
        Window(tmp_path / "file", 0, 4).read()
    with pytest.raises(CorpusError, match="cannot read: No such file"):
        Window(tmp_path / "gone", 0, 4).read()
