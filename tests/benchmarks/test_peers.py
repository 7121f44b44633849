"""`make peers`: parts are measured once, rows outlive a stop, and the table stands where README has its place."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

GOOD = """
import sys
from measured import Row, add_rows_option, report
import argparse, os, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--count", type=pathlib.Path)
add_rows_option(parser)
given = parser.parse_args()
given.count.write_text(given.count.read_text() + "x" if given.count.exists() else "x")
report(Row("a | b", "1 ms", os.environ.get("CT2_FORCE_CPU_ISA", "its 2 ms"), "2x", "the same"), given.rows_file)
"""


@pytest.fixture
def peers(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS))
    import peers

    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text(GOOD + "raise SystemExit(3)\n")
    count = ["--count", str(tmp_path / "runs")]
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    monkeypatch.setattr(peers, "PARTS", {"one": peers.Part("good", count), "two": peers.Part("bad", count, threads=1)})
    monkeypatch.setattr(peers, "PACKAGES", ("mlx",))
    monkeypatch.setattr(peers, "processor_class", {"native": "amx", "x86-64-v3": "avx2"}.__getitem__)
    return peers


def run(peers, monkeypatch, tmp_path, *options):
    results = ["--results", str(tmp_path / "results.jsonl")]
    monkeypatch.setattr(sys, "argv", ["peers.py", *results, *options])
    with pytest.raises(SystemExit) as ended:
        peers.main()
    return ended.value.code, len((tmp_path / "runs").read_text())


def test_a_part_is_measured_once_and_a_failed_one_again(peers, tmp_path, monkeypatch, capfd):
    page = tmp_path / "page.md"
    page.write_text("before\n" + peers.MARKERS[0] + "old\n" + peers.MARKERS[1] + "after\n")
    assert run(peers, monkeypatch, tmp_path, "--only", "one", "--markdown", str(page)) == (0, 1)
    assert run(peers, monkeypatch, tmp_path, "--markdown", str(page)) == (1, 2)
    assert run(peers, monkeypatch, tmp_path) == (1, 3)
    assert run(peers, monkeypatch, tmp_path, "--only", "one", "--again")[1] == 4
    text = page.read_text()
    assert text.startswith("before\n" + peers.MARKERS[0]) and text.endswith(peers.MARKERS[1] + "after\n")
    assert "old" not in text
    assert text.count("| a \\| b | 1 ms | its 2 ms | 2x | the same | amx | `good.py` |") == 1
    assert "| two | failed with status 3 |" in text
    assert "[2/2] two" in capfd.readouterr().err


def test_each_class_of_processor_has_rows_of_its_own(peers, tmp_path, monkeypatch, capfd):
    assert run(peers, monkeypatch, tmp_path, "--only", "one") == (0, 1)
    assert run(peers, monkeypatch, tmp_path, "--only", "one", "--march", "native,x86-64-v3") == (0, 2)
    rows = [line for line in capfd.readouterr().out.splitlines() if "good.py" in line]
    assert [row.split(" | ")[-2] for row in rows[-2:]] == ["amx", "avx2"]


def test_peers_are_held_to_the_class_of_the_kernels(peers, tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("CT2_FORCE_CPU_ISA", raising=False)
    assert run(peers, monkeypatch, tmp_path, "--only", "one", "--march", "native,x86-64-v3") == (0, 2)
    out = capfd.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("|") and "good.py" in line]
    assert [row.split(" | ")[2] for row in rows] == ["its 2 ms", "AVX2"]
    assert "Beside kernels of avx2 the peers are held to it too" in out and "`CT2_FORCE_CPU_ISA=AVX2`" in out
    assert "Beside kernels of amx" not in out


def test_a_page_without_the_place_is_named(peers, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    code, _ = run(peers, monkeypatch, tmp_path, "--only", "one", "--markdown", str(page))
    assert str(page) in code
