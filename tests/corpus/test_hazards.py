"""Corpora that go wrong quietly: odd names, cut files, odd columns, places to resume, memory. What works is elsewhere."""

import bz2
import datetime
import gzip
import io
import itertools
import json
import lzma
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from marlin_cli.corpus import Source, Window, load_recipe, open_corpus, parse_source
from marlin_cli.errors import ConfigError, CorpusError, MarlinError
from marlin_cli.files import shipped

PACKINGS = [(".gz", gzip.compress), (".zst", zstandard.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
LINE = "a line of text that is longer than the shortest window, which has sixty-four bytes"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, data: bytes) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(data)
    return name


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def contents(*names: str, **options) -> list[bytes]:
    return [window.bytes.tobytes() for window in open_corpus(names, **{"sequence_bytes": 128, **options})]


def same(one: list[Window], other: list[Window]) -> bool:
    return [(w.domain, w.index, w.bytes.tobytes()) for w in one] == [(w.domain, w.index, w.bytes.tobytes()) for w in other]


@pytest.mark.parametrize(
    ("text", "domain", "weight", "file"),
    [
        ("plain", "other", 1.0, "plain"),
        ("code=plain", "code", 1.0, "plain"),
        ("my_9=plain:2.5", "my_9", 2.5, "plain"),
        ("plain:1e-2", "other", 0.01, "plain"),
        ("x=y", "other", 1.0, "x=y"),
        ("a:2", "other", 1.0, "a:2"),
        ("code=a:2", "code", 1.0, "a:2"),
        ("code=a:2:3", "code", 3.0, "a:2"),
        ("default", "multilingual", 0.5, None),
        ("./default", "other", 1.0, "default"),
    ],
)
def test_a_name_stands_for_its_file(text, domain, weight, file):
    for name in ("plain", "x=y", "a:2", "default"):
        write(name, noise(100))
    source = parse_source(text)[0]
    assert (source.domain, source.weight) == (domain, weight)
    if file is not None:
        assert source.files == (Path(file),)


@pytest.mark.parametrize(
    ("text", "hub"), [("hf:a", "a"), ("hf:a/b:2", "a/b"), ("hf:a/b/c@train", "a/b/c@train"), ("web=hf:a/b@x", "a/b@x")]
)
def test_hub_names_keep_their_parts(text, hub):
    (source,) = parse_source(text)
    assert source.hub == hub and not source.files


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("plain:0", "weight must be above 0"),
        ("plain:-1", "weight must be above 0"),
        ("plain:1e999", "weight must be above 0 and finite"),
        ("Code=plain", "a domain is named with a-z, 0-9 and _"),
        ("~no_such_user/x", "no such file"),
        ("n" * 5000, "no such file"),
        ("nul\0", "no such file"),
        ("pipe", "is not a regular file; pipe its bytes in"),
        ("dangling", "no such file|holds no bytes"),
        ("folder-of-hidden", "holds no bytes"),
        ("hf:", "is not hf:name"),
        ("hf:a/b/c/d", "is not hf:name"),
        ("nowhere.yaml", "no such recipe"),
    ],
)
def test_names_for_nothing_are_refused_in_one_line(text, message):
    write("plain", noise(100))
    write("folder-of-hidden/.x", noise(100))
    write("folder-of-hidden/.git/x", noise(100))
    os.mkfifo("pipe")
    os.symlink("gone", "dangling")
    with pytest.raises(CorpusError, match=message) as caught:
        parse_source(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_bytes": 0}, "max_bytes of a corpus must be at least 1"),
        ({"sequence_bytes": 0}, "sequence_bytes of a corpus must be at least 1"),
        ({"max_bytes": 1 << 63}, "max_bytes of a corpus must be at least 1 and at most 9223372036854775807"),
        ({"max_bytes": 10**5000}, "max_bytes of a corpus must be .*, found <a whole number of 16,610 bits>"),
        ({"sequence_bytes": 1 << 40}, "sequence_bytes of a corpus must be at least 1 and at most 1073741824"),
        ({"names": []}, "no corpus is named"),
        ({"names": ["-", "code=-"]}, "stdin can be read once"),
        ({"names": ["a=plain:10000", "b=plain"]}, "within 1000 times"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    write("plain", noise(100))
    with pytest.raises(CorpusError, match=message):
        open_corpus(options.pop("names", ["plain"]), **options)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_refused_before_anything_is_read():
    write("folder/file", noise(100))
    Path("folder/file").chmod(0)
    with pytest.raises(CorpusError, match="folder/file: no permission to read"):
        parse_source("folder")


def test_a_file_that_goes_away_is_named():
    corpus = open_corpus([write("going", noise(200))])
    Path("going").unlink()
    with pytest.raises(CorpusError, match="going: no such file"):
        list(corpus)


@pytest.mark.parametrize("left", [10, 3000, -1], ids=["header", "half", "all but a byte"])
@pytest.mark.parametrize(("suffix", "pack"), PACKINGS)
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_a_truncated_compressed_file_is_never_taken_for_a_whole_one(kind, suffix, pack, left):
    rows = "\n".join(json.dumps({"text": noise(300, seed).hex()}) for seed in range(20)).encode()
    name = write(f"cut{kind}{suffix}", pack(rows)[:left])
    with pytest.raises(CorpusError, match=f"{name}: damaged compressed file") as caught:
        contents(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("suffix", "pack"), PACKINGS)
def test_compressed_files_of_several_parts_are_read_to_the_end(suffix, pack):
    name = write(f"parts.txt{suffix}", pack(b"a" * 1000) + pack(b"b" * 1000))
    assert b"".join(contents(name)) == b"a" * 1000 + b"b" * 1000


DATES = [f"2020-01-{day:02d}T00:00:00Z" * 4 for day in range(1, 9)]


@pytest.mark.filterwarnings("ignore:.*rows without are left out")
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"text": "2020-01-01T00:00:00"}], []),  # shorter than a window, and no date on the way
        ([{"text": day} for day in DATES], [day.encode() for day in DATES]),
        ([{"text": None, "id": LINE}, {"text": LINE, "id": "1"}], [LINE.encode()]),
        ([{"content": LINE, "text": "no"}], [LINE.encode()]),
        ([{"only": LINE, "number": 1}], [LINE.encode()]),
        ([{"text": LINE}, {"other": LINE}, {"text": LINE}], [LINE.encode()] * 2),
        ([{"text": "\ud800" + LINE}], [b"\xed\xa0\x80" + LINE.encode()]),
        ([{"text": "é\x00" * 40}], ["é\x00".encode() * 40]),
    ],
    ids=["short", "dates", "first null", "preference", "only column", "missing key", "lone surrogate", "zero bytes"],
)
def test_text_of_json_lines_is_its_utf_8(rows, expected):
    name = write("rows.jsonl", b"\n\n".join(json.dumps(row).encode() for row in rows))
    corpus = open_corpus([name, write("more", noise(64))])
    assert [w.bytes.tobytes() for w in corpus if w.bytes.tobytes() != noise(64)] == expected


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b'{"text": "x"}\n{{{', "line 2: is not JSON"),
        (b"[" * 100_000, "line 1: is not JSON"),
        (b"3\n", "line 1 is not a JSON object"),
        (b'{"text": "x"}\n{"text": 5}', "line 2: 'text' is int, expected text"),
        (b'{"a": "x", "b": "y"}', "which column holds the bytes\\? Found 'a', 'b'; name it text"),
        (b'{"a": 1}', "no column holds text or bytes; found 'a' \\(int\\)"),
        (b"{}", "found no columns"),
    ],
)
def test_json_lines_without_text_are_refused_by_line(lines, message):
    with pytest.raises(CorpusError, match=f"rows.jsonl: .*{message}|rows.jsonl: {message}"):
        contents(write("rows.jsonl", lines))


@pytest.mark.filterwarnings("ignore:.*rows without are left out")
@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([LINE, None]),
        pyarrow.array([LINE, None], pyarrow.large_string()),
        pyarrow.array([LINE, None], pyarrow.string_view()),
        pyarrow.array([LINE.encode(), None], pyarrow.large_binary()),
        pyarrow.array([LINE.encode(), None], pyarrow.binary_view()),
        pyarrow.array([LINE.encode()], pyarrow.binary(len(LINE))),
        pyarrow.array([LINE, None, LINE]).dictionary_encode(),
    ],
    ids=lambda column: str(column.type)[:20],
)
def test_every_kind_of_text_and_binary_column_is_read(column):
    days = pyarrow.array([datetime.date(2020, 1, 1)] * len(column))
    pyarrow.parquet.write_table(pyarrow.table({"day": days, "column": column}), "rows.parquet")
    assert contents("rows.parquet") == [LINE.encode()] * (len(column) - column.null_count)


@pytest.mark.parametrize("damage", ["header", "cut", "page"])
def test_a_damaged_parquet_file_is_named(damage):
    column = pyarrow.array([noise(500, seed) for seed in range(200)])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), "rows.parquet")
    data = Path("rows.parquet").read_bytes()
    damaged = {"header": b"PAR1" + noise(500), "cut": data[:-100], "page": data[:4] + b"\xff" * 60 + data[64:]}
    write("rows.parquet", damaged[damage])
    with pytest.raises(CorpusError, match="rows.parquet: damaged parquet file") as caught:
        contents("rows.parquet")
    assert "\n" not in str(caught.value)


def test_the_hub_without_a_network_is_one_line(monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(CorpusError, match="hf:owner/name@test: the hub did not give it") as caught:
        contents("hf:owner/name@test")
    assert "\n" not in str(caught.value)


@pytest.fixture
def mixture(here):
    """Names of sources of every kind that run out at different times."""
    for number, size in enumerate((700, 64, 63, 1500)):
        write(f"code/{number}", noise(size, number))
    write("code/packed.gz", gzip.compress(noise(900, 7)))
    write("rows.jsonl", "\n".join(json.dumps({"text": LINE * size}) for size in (1, 2, 5)).encode())
    write("short", noise(200, 9))
    # Whole paths: streams that a test leaves early still read ahead when it is over and the folder has changed.
    return [f"code={here}/code:3", f"rows={here}/rows.jsonl", f"binary={here}/short:2"]


def test_a_run_cut_at_any_window_goes_on_bit_for_bit(mixture):
    options = {"sequence_bytes": 128, "seed": 3, "max_bytes": 3500}
    whole = list(open_corpus(mixture, **options))
    assert len(whole) > 25 and {window.domain for window in whole} == {"code", "rows", "binary"}
    for done in range(len(whole) + 1):
        corpus = open_corpus(mixture, **options)
        first = list(itertools.islice(corpus, done))
        later = open_corpus(mixture, **options)
        later.resume(json.loads(json.dumps(corpus.state())))
        # Cut once more, after each resume: states of resumed streams are as good.
        second = list(itertools.islice(later, 2))
        last = open_corpus(mixture, **options)
        last.resume(json.loads(json.dumps(later.state())))
        assert same(first + second + list(last), whole)


def test_a_second_loop_goes_on_where_the_first_one_stopped(mixture):
    whole = list(open_corpus(mixture, sequence_bytes=128))
    corpus = open_corpus(mixture, sequence_bytes=128)
    assert same(list(itertools.islice(corpus, 5)) + list(corpus), whole)
    assert list(corpus) == []


def test_no_window_is_repeated_when_a_source_runs_out(mixture):
    windows = [window for window in open_corpus(mixture, sequence_bytes=128) if window.domain != "rows"]
    assert len({window.bytes.tobytes() for window in windows}) == len(windows)
    sizes = {"code": 700 - 700 % 128 + 64 + 1500 + 900 - 900 % 128, "binary": 200}
    # 700 leaves 60 and 900 leaves 4, which is too short; 1500 leaves 92, 200 leaves 72.
    for domain, size in sizes.items():
        assert sum(len(window.bytes) for window in windows if window.domain == domain) == size


@pytest.mark.parametrize("change", ["content", "weight", "name", "domain", "seed", "sequence_bytes", "max_bytes", "moved"])
def test_the_fingerprint_changes_with_what_decides_the_windows(change):
    def fingerprint(name: str, **options) -> str:
        return open_corpus([name], **{"sequence_bytes": 128, "seed": 0, **options}).fingerprint()

    write("one/a", noise(300))
    write("one/b/c", noise(200))
    before = fingerprint("code=one")
    if change == "moved":
        Path("one").rename("two")
        assert fingerprint("code=two") == fingerprint(f"code={Path('two').resolve()}") == before
        return
    if change == "content":
        write("one/b/c", noise(201))
    if change == "name":
        Path("one/a").rename("one/d")
    name = {"weight": "code=one:2", "domain": "binary=one"}.get(change, "code=one")
    options = {change: 100} if change in ("seed", "sequence_bytes", "max_bytes") else {}
    assert fingerprint(name, **options) != before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: {**state, "corpus": "0" * 64}, "of another corpus or other settings"),
        (lambda state: {}, "damaged"),
        (lambda state: [state], "damaged"),
        (lambda state: {**state, "windows": "1"}, "damaged"),
        (lambda state: {**state, "bytes": -1}, "damaged"),
        (lambda state: {**state, "bytes": None}, "damaged"),
        (lambda state: {**state, "stream": {}}, "damaged"),
        (lambda state: {**state, "stream": {**state["stream"], "examples_iterable": None}}, "damaged"),
        (lambda state: {**state, "stream": {**state["stream"], "epoch": "x"}}, "damaged"),
        (lambda state: {**state, "stream": {**state["stream"], "epoch": 1 << 63}}, "damaged"),
    ],
)
def test_a_place_in_another_corpus_is_refused(mixture, damage, message):
    corpus = open_corpus(mixture)
    next(iter(corpus))
    with pytest.raises(CorpusError, match=message):
        open_corpus(mixture).resume(damage(corpus.state()))


def test_stdin_cannot_be_resumed():
    with pytest.raises(CorpusError, match="stdin cannot be resumed"):
        open_corpus(["-"]).resume({})


def test_no_more_of_stdin_is_read_than_the_limit():
    script = (
        "import sys; from marlin_cli.corpus import open_corpus;"
        "print(sum(len(w.bytes) for w in open_corpus(['-'], sequence_bytes=64, max_bytes=128)))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.write(bytes(128))
    process.stdin.flush()  # and the pipe stays open
    try:
        assert process.wait(timeout=30) == 0 and process.stdout.read() == b"128\n"
    finally:
        process.kill()
        process.stdin.close()
        process.stdout.close()


@pytest.mark.parametrize(("stdin", "message"), [(None, "stdin is closed"), (b"", "holds no window")])
def test_an_empty_or_closed_stdin_is_refused(monkeypatch, stdin, message):
    monkeypatch.setattr(sys, "stdin", None if stdin is None else types.SimpleNamespace(buffer=io.BytesIO(stdin)))
    with pytest.raises(CorpusError, match=message):
        contents("-")


def test_stdin_among_other_sources_loses_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(noise(1280))))
    windows = list(open_corpus(["code=-", write("file", noise(640, 1))], sequence_bytes=128))
    assert b"".join(w.bytes.tobytes() for w in windows if w.domain == "code") == noise(1280)
    assert b"".join(w.bytes.tobytes() for w in windows if w.domain == "other") == noise(640, 1)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("sources: [{domain: My Code, path: x}]", ConfigError, "'My Code' is not a name of a-z"),
        ("sources: [{domain: code, path: x, weight: .inf}]", ConfigError, "expected a finite number"),
        ("sources: [{domain: code, path: 'hf:'}]", CorpusError, "is not hf:name"),
        ("max_bytes: 0\nsources: [{domain: code, path: x}]", ConfigError, "max_bytes must be at least 1"),
        ("checksums: SUMS\nsources: [{domain: code, path: x}]", CorpusError, "x: is not listed in SUMS"),
        ("checksums: odd\nsources: [{domain: code, path: x}]", CorpusError, "line 1 is not a checksum"),
        ("checksums: gone\nsources: [{domain: code, path: x}]", CorpusError, "gone.bin: is missing"),
        ("3", ConfigError, "expected a table"),
    ],
)
def test_recipes_that_would_go_wrong_later_are_refused(text, error, message):
    write("x", noise(100))
    write("SUMS", b"")
    write("odd", b"hello\n")
    write("gone", b"0" * 64 + b"  gone.bin\n")
    with pytest.raises(error, match=message) as caught:
        parse_source(write("mine.yaml", text.encode()))
    assert isinstance(caught.value, MarlinError) and "\n" not in str(caught.value)


def test_the_sizes_of_a_recipe_hold_where_the_caller_names_none():
    write("x", noise(1000))
    text = b"{max_bytes: 500, seq_bytes: 100, sources: [{domain: code, path: x}, {domain: web, path: 'hf:a/b'}]}"
    name = write("mine.yaml", text)
    recipe = load_recipe(name)
    assert (recipe.max_bytes, recipe.seq_bytes, recipe.sources[1].path) == (500, 100, "hf:a/b")
    assert parse_source(name)[1] == Source("web", 1.0, hub="a/b")
    corpus, other = open_corpus([name]), open_corpus([name], sequence_bytes=64, max_bytes=128)
    assert (corpus.sequence_bytes, corpus.max_bytes, other.sequence_bytes, other.max_bytes) == (100, 500, 64, 128)
    assert load_recipe("default").max_bytes is None


def test_every_file_of_the_sample_is_listed_and_has_a_licence_entry():
    sample = shipped("calibration/sample")
    listed = [line.split("  ", 1)[1] for line in (sample / "SHA256SUMS").read_text().splitlines()]
    files = [file for file in sample.rglob("*") if file.is_file() and file.name != "SHA256SUMS"]
    assert sorted(listed) == sorted(str(file.relative_to(sample)) for file in files)
    provenance = (sample.parent / "PROVENANCE.md").read_text()
    parts = {name if name.startswith("code/") else name.split("/")[1] for name in listed if not name.startswith("mult")}
    assert [part for part in sorted(parts) if part not in provenance] == []


def test_total_bytes_is_what_the_windows_hold(mixture):
    raw = ["binary=code", "code=short"]
    corpus = open_corpus(raw, sequence_bytes=128)
    assert corpus.total_bytes == sum(len(window.bytes) for window in corpus)
    assert open_corpus(mixture).total_bytes is None and open_corpus(mixture, max_bytes=9).total_bytes == 9


def test_nothing_is_printed_or_left_behind_and_no_home_is_needed(mixture):
    before = sorted(Path().rglob("*"))
    script = "import sys; from marlin_cli.corpus import open_corpus; list(open_corpus(sys.argv[1:]))"
    environment = {**os.environ, "HF_HOME": "/dev/null/none", "HOME": "/dev/null/none"}
    done = subprocess.run([sys.executable, "-c", script, *mixture], capture_output=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert sorted(Path().rglob("*")) == before


def test_importing_the_package_does_not_import_datasets():
    script = "import sys, marlin_cli.corpus; print({'datasets', 'pyarrow', 'torch', 'yaml'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout == b"set()\n"


MEASURE = """
import sys, itertools
from marlin_cli.corpus import open_corpus
count = sum(len(window.bytes) for window in itertools.islice(open_corpus(sys.argv[1:]), 4000))
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(count, peak)
"""


# VmHWM: the resource module's maximum counts the parent's memory too, from before the exec, and would hide all.
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_a_file_of_four_gigabytes_takes_no_more_memory_than_one_of_a_megabyte():
    peaks = []
    for name, size in (("small", 1 << 20), ("huge", 4 << 30)):
        with open(name, "wb") as file:
            file.truncate(size)
        output = subprocess.run([sys.executable, "-c", MEASURE, f"binary={name}"], capture_output=True, check=True).stdout
        count, peak_kilobytes = map(int, output.split())
        assert count == min(size, 4000 * 16384)
        peaks.append(peak_kilobytes)
    assert peaks[1] < peaks[0] + 16 * 1024
