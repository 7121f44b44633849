"""Files of results: a line is added whole, after a whole line."""

import json
import os
from types import SimpleNamespace

import pytest

from marlin_cli.reports import results
from marlin_cli.reports.results import append_result


@pytest.fixture
def appended(monkeypatch):
    monkeypatch.setattr(results, "to_json", lambda report: json.dumps({"format_version": 1, "models": [], "n": report.number}))
    return lambda path, number: append_result(path, SimpleNamespace(number=number), [], {})


def numbers(path):
    return [json.loads(line)["n"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("left", [1, 5, 20, 60, -1])
def test_a_line_that_a_kill_cut_short_is_removed(left, appended, tmp_path, capsys):
    file = tmp_path / "results"
    appended(file, 1)
    whole = file.read_bytes()
    appended(file, 2)
    file.write_bytes(file.read_bytes()[: len(whole) + left] if left > 0 else file.read_bytes()[:-1])
    appended(file, 3)
    assert numbers(file) == ([1, 3] if left > 0 else [1, 2, 3])  # but for its end, the last one was there
    assert ("was cut short by a run that was killed" in capsys.readouterr().err.replace("\n", " ")) == (left > 0)


def test_a_cut_line_alone_in_its_file(appended, tmp_path):
    (tmp_path / "results").write_bytes(b'{"format_ver')
    appended(tmp_path / "results", 1)
    assert numbers(tmp_path / "results") == [1]


def test_what_others_wrote_stays(appended, tmp_path):
    (tmp_path / "notes").write_bytes(b"my notes")
    appended(tmp_path / "notes", 1)
    assert (tmp_path / "notes").read_bytes().startswith(b'my notes\n{"format_version": 1')


def test_an_interrupt_between_writes_leaves_the_file_as_it_was(appended, tmp_path, monkeypatch):
    file = tmp_path / "results"
    appended(file, 1)
    before, write = file.read_bytes(), os.write

    def interrupted(descriptor, data):
        write(descriptor, data[:30])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(results.os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            appended(file, 2)
    assert file.read_bytes() == before
