"""`--speculate` as a user gives it: the same bytes, what came of drafts, and why not where there are none."""

import json
import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from marlin_cli.cli import app
from marlin_cli.commands import speculation_options
from marlin_cli.engine.speculation import Speculated
from marlin_cli.ops import cpu

HAS_KERNELS = cpu.kernels()[0] is not None


def run(*arguments, **variables):
    command = [sys.executable, "-m", "marlin_cli", *arguments]
    environment = {**{name: value for name, value in os.environ.items() if name != "MARLIN_ROWS"}, **variables}
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, env=environment)


@pytest.mark.skipif(not HAS_KERNELS, reason="no CPU kernels here")
def test_a_prediction_saves_passes_and_changes_nothing(tmp_path):
    ask = ("generate", "--device", "cpu", "-p", "def main(", "--max-bytes", "96", "--temperature", "0.8", "--json")
    plain = json.loads(run(*ask, MARLIN_ROWS="exact").stdout)
    file = tmp_path / "before"
    file.write_bytes(plain["text"].encode()[:60] + b"something else")
    result = run(*ask, "--speculate", "auto", "--prediction-file", str(file))
    found = json.loads(result.stdout)
    assert found["bytes_base64"] == plain["bytes_base64"] and "speculation" not in plain
    told = found["speculation"]
    assert told["accepted_bytes"] >= 40 and told["passes"] < 96 // 4 * 2 / 3
    assert told["passes_per_byte"] == told["passes"] / 96


def test_bench_tells_what_drafts_bring():
    result = run("bench", "--device", "cpu", "--speculate", "auto", "--decode-bytes", "40", "--repeats", "1")
    assert result.returncode == 0, result.stderr
    assert b"passes a byte" in result.stdout and b"yes" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("generate", "--speculate", "auto", "--beams", "2"), "--speculate has no meaning beside --beams"),
        (("generate", "--draft", "megabyte-demo"), "--draft needs --speculate"),
        (("generate", "--prediction-file", "x"), "--prediction-file needs --speculate"),
        (("generate", "--speculate", "often"), "--speculate is auto, off or a number from 1 to 256 of patches, found 'often'"),
        (("generate", "-p", "x", "--speculate", "off", "--draft", "m"), "--draft has no use with --speculate off"),
        (("generate", "-p", "x", "--speculate", "off", "--prediction-file", "x"), "--prediction-file has no use with"),
        (("generate", "-p", "x", "--speculate", "auto", "--sparse", "0.1"), "--speculate has no meaning beside --sparse"),
        (("generate", "-p", "x", "--speculate", "2", "--draft", "byt5-demo"), "--draft byt5-demo: it does not continue bytes"),
        (("generate", "-p", "x", "--speculate", "2", "--draft", "none"), "--draft none: no such file, folder or shipped model"),
        (("generate", "-p", "x", "--speculate", "2", "--prediction-file", "none"), "--prediction-file none: cannot read"),
        (("bench", "--speculate", "auto", "--plan"), "--speculate has no meaning beside --plan"),
    ],
)
def test_what_has_no_meaning_is_refused(arguments, reason, monkeypatch):
    monkeypatch.setenv("MARLIN_ROWS", "fast")  # which the command would set for its process
    result = CliRunner().invoke(app, list(arguments))
    assert reason in f"{result.output} {result.exception}"


def test_rows_are_kept_apart_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.delenv("MARLIN_ROWS", raising=False)
    speculation_options.keep_rows_apart("off")
    assert "MARLIN_ROWS" not in os.environ
    monkeypatch.setenv("MARLIN_ROWS", "fast")
    speculation_options.keep_rows_apart("auto")
    assert os.environ["MARLIN_ROWS"] == "fast"
    monkeypatch.setenv("MARLIN_ROWS", "")
    monkeypatch.delenv("MARLIN_ROWS")
    speculation_options.keep_rows_apart("2")
    assert os.environ["MARLIN_ROWS"] == "exact"


def test_what_came_of_drafts_is_told():
    told = Speculated(30, 20, 5)
    assert speculation_options.as_mapping(told, 50)["passes_per_byte"] == 0.1
    assert speculation_options.as_mapping(told, 0)["passes_per_byte"] is None
    assert "20 of 30 drafted bytes accepted" in speculation_options.in_words(told)
