"""Folders that are written in one step, also after a process that was killed and beside one that still runs."""

import subprocess
import sys

import pytest

from marlin_cli.files import writing_folder

# Starts a folder, says so, and waits for its stdin to end.
WRITER = """
import sys
from pathlib import Path
from marlin_cli.files import writing_folder
with writing_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_bytes(b"x")
    print("started", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_writer(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "model")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "started\n"
    yield process
    process.kill()
    process.communicate()


def test_what_a_killed_process_left_goes_with_the_next(other_writer, tmp_path):
    (tmp_path / ".model.mine").mkdir()
    other_writer.kill()
    other_writer.wait()
    assert len(list(tmp_path.iterdir())) == 2
    with writing_folder(tmp_path / "model") as folder:
        (folder / "whole").write_bytes(b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model.mine", "model"]
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["whole"]


def test_a_folder_that_is_still_written_stays(other_writer, tmp_path):
    with writing_folder(tmp_path / "model") as folder:
        (folder / "mine").write_bytes(b"x")
    assert len(list(tmp_path.iterdir())) == 2


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="half way"), writing_folder(tmp_path / "model") as folder:
        (folder / "half").write_bytes(b"x")
        raise RuntimeError("half way")
    assert not list(tmp_path.iterdir())
