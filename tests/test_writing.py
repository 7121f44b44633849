"""Files and folders that are written in one step, also after a process that was killed and beside one that still runs."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from marlin_cli.errors import OutputError
from marlin_cli.writing import check_output_file, claimed, writing, writing_folder

# Starts a folder, says so, and waits for its stdin to end.
WRITER = """
import sys
from pathlib import Path
from marlin_cli.writing import writing_folder
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


# The same for a file.
FILE_WRITER = """
import sys
from pathlib import Path
from marlin_cli.writing import writing
with writing(Path(sys.argv[1])) as file:
    file.write_bytes(b"half")
    print("started", flush=True)
    sys.stdin.read()
"""


def test_half_a_file_goes_with_the_next_unless_it_is_still_written(tmp_path):
    target = tmp_path / "statistics.safetensors"
    command = [sys.executable, "-c", FILE_WRITER, str(target)]
    (tmp_path / ".statistics.safetensors.mine.safetensors").touch()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"started\n"
        for left in (3, 2):  # beside a process that runs, and after it was killed
            with writing(target) as file:
                file.write_bytes(b"whole")
            assert target.read_bytes() == b"whole" and len(list(tmp_path.iterdir())) == left
            process.kill()
            process.wait()


def test_a_pipe_is_written_into_and_stays_one(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_output_file(pipe)
    found = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    with writing(pipe) as file:
        file.write_bytes(b"data")
    reader.join()
    assert found == [b"data"] and pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="the system has no /dev/full")
def test_a_device_takes_what_it_can(tmp_path):
    link = tmp_path / "link"
    link.symlink_to("/dev/full")
    with pytest.raises(OutputError, match="link: cannot write: No space left"), writing(link) as file:
        file.write_bytes(b"data")
    assert link.is_symlink() and Path("/dev/full").is_char_device()


def test_a_link_is_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    link, target = tmp_path / "link", tmp_path / "folder/target"
    link.symlink_to(target)
    for data in (b"old", b"new"):  # where the target is missing, and where it is not
        with writing(link) as file:
            file.write_bytes(data)
        assert link.is_symlink() and target.read_bytes() == data
    assert list(target.parent.iterdir()) == [target]


@pytest.fixture(params=[True, False], ids=["swapped in one step", "renamed twice"])
def renaming(request, monkeypatch):
    """With and without the system's calls that POSIX does not have."""
    if not request.param:
        monkeypatch.setattr("marlin_cli.writing._renamed", lambda *_: False)


def model(path, weights=b"old"):
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(weights)


def names_below(path):
    return sorted(each.relative_to(path).as_posix() for each in path.rglob("*"))


def test_a_model_takes_the_place_of_another(renaming, tmp_path):
    model(tmp_path / "model")
    with writing_folder(tmp_path / "model", overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert names_below(tmp_path) == ["model", "model/config.json"]
    assert (tmp_path / "model/config.json").read_text() == "new"


def test_a_linked_model_is_replaced_where_it_lies(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    model(tmp_path / "elsewhere/model")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere/model")
    with writing_folder(tmp_path / "link", overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert names_below(tmp_path / "elsewhere") == ["model", "model/config.json"]


@pytest.mark.parametrize("foreign", ["notes.txt", ".git/", "weights/", "model.pt", "config.json~", "link.safetensors@"])
def test_what_is_no_model_is_not_replaced(foreign, tmp_path):
    model(tmp_path / "model")
    path = tmp_path / "model" / foreign.rstrip("/@")
    if foreign.endswith("/"):
        path.mkdir()
    elif foreign.endswith("@"):
        path.symlink_to(tmp_path / "model/model.safetensors")
    else:
        path.touch()
    before = names_below(tmp_path)
    with (
        pytest.raises(OutputError, match=f"model: --overwrite replaces a model folder, and '{path.name}' there"),
        writing_folder(tmp_path / "model", overwrite=True),
    ):
        raise AssertionError("begun all the same")
    assert names_below(tmp_path) == before


@pytest.mark.parametrize("path", ["model", "model/"])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_of_two_runs_the_second_does_not_replace_the_first(renaming, kind, path, tmp_path):
    with pytest.raises(OutputError, match="another run wrote it|already exists"):
        with writing_folder(tmp_path / path) as folder:
            (folder / "config.json").write_text("late")
            if kind == "folder":
                model(tmp_path / "model")
            else:
                (tmp_path / "model").write_text("first")
    assert names_below(tmp_path) == (
        ["model", "model/config.json", "model/model.safetensors"] if kind == "folder" else ["model"]
    )
    assert (tmp_path / "model/config.json" if kind == "folder" else tmp_path / "model").read_text() != "late"


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_of_two_runs_that_end_at_once_one_fails(renaming, kind, tmp_path, monkeypatch):
    """The other's folder comes between the last look and the renaming."""
    flush, theirs = Path.chmod, tmp_path / "model"

    def chmod(path, mode):
        flush(path, mode)
        monkeypatch.setattr("marlin_cli.writing.check_output_folder", lambda *_, **__: None)
        monkeypatch.setattr(Path, "exists", lambda path: False)
        model(theirs) if kind == "folder" else theirs.write_text("first")

    with pytest.raises(OutputError, match="another run wrote it"), writing_folder(theirs) as folder:
        (folder / "config.json").write_text("late")
        monkeypatch.setattr(Path, "chmod", chmod)
    assert len(os.listdir(tmp_path)) == 1


def test_what_could_not_be_replaced_stays(tmp_path, monkeypatch):
    model(tmp_path / "model")
    rename = Path.rename

    def refused(self, target):
        if self.name.endswith(".unfinished"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    monkeypatch.setattr("marlin_cli.writing._renamed", lambda *_: False)
    with pytest.raises(OutputError, match="model: cannot write"), writing_folder(tmp_path / "model", overwrite=True):
        pass
    assert names_below(tmp_path) == ["model", "model/config.json", "model/model.safetensors"]


# Says that it has claimed a path, and waits for its stdin to end.
CLAIMER = """
import sys
from pathlib import Path
from marlin_cli.writing import claimed
with claimed(Path(sys.argv[1])):
    print("claimed", flush=True)
    sys.stdin.read()
"""


def test_two_processes_do_not_write_under_one_name(tmp_path):
    path = tmp_path / "statistics.safetensors"
    command = [sys.executable, "-c", CLAIMER, str(path)]
    for kill in (True, False):  # what a killed one left is no claim
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "claimed\n"
            with pytest.raises(OutputError, match="safetensors: another run is writing it"), claimed(path):
                raise AssertionError("claimed twice")
            if kill:
                process.kill()
    with claimed(path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_link_to_itself_is_named(tmp_path):
    link = tmp_path / "link.json"
    link.symlink_to(link)
    with pytest.raises(OutputError, match=r"link\.json: cannot write: "), writing(link):
        pass
    with pytest.raises(OutputError, match=r"link\.json: cannot write: "), writing_folder(link):
        pass
    assert os.listdir(tmp_path) == ["link.json"]


@pytest.mark.parametrize("name", [".", "../model"])
def test_the_folder_marlin_stands_in_is_replaced_too(name, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path / "model")
    with writing_folder(Path(name), overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert os.listdir(tmp_path) == ["model"]
    assert (tmp_path / "model" / "config.json").read_text() == "new"


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take UTF-8 alone")
def test_a_name_that_mlx_does_not_take_is_refused_before_the_work(tmp_path):
    with pytest.raises(OutputError, match="the path is not UTF-8"), writing_folder(tmp_path / os.fsdecode(b"\xff")):
        pytest.fail("it has begun")
