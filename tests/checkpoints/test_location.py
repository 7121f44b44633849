"""Where models are looked for: here, among the shipped ones, and on the hub only when that is said."""

import warnings
from pathlib import Path

import pytest
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

from marlin_cli.checkpoints import location
from marlin_cli.errors import AssumptionWarning, CheckpointError


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """What the hub was asked for; it gives an empty folder."""
    found = []

    def download(repository, allow_patterns):
        found.append(repository)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return found


def test_hf_asks_the_hub_without_a_word(asked, tmp_path):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert location.locate_model("hf:owner/name") == tmp_path
        assert location.locate_model("owner/name") == location.Path("owner/name")
    assert asked == ["owner/name"]


def test_a_bare_name_asks_the_hub_after_a_line(asked, tmp_path):
    with pytest.warns(AssumptionWarning, match="'owner/name': nothing of that name here; asking .*hf:owner/name"):
        assert location.locate_model("owner/name") == tmp_path
    assert asked == ["owner/name"]


@pytest.mark.parametrize("name", ["file/name", "file/a/b"])
def test_a_path_through_a_file_asks_nobody(name, asked):
    Path("file").write_bytes(b"")
    with warnings.catch_warnings(), pytest.raises(CheckpointError, match=f"^{name}: file is a file, no folder; name a "):
        warnings.simplefilter("error")
        location.locate_model(name)
    assert not asked


@pytest.mark.parametrize("name", ["", "nul\0", "x" * 5000, "./a/b", "a/b/c", "~/a", "hf:", "hf:a/b/c", "hf:a/\x1b[31m"])
def test_names_for_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        location.locate_model(name)
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_name_for_nothing_is_told_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="^canine-s: no such file, .*; a model on the hub is hf:owner/name$"):
        location.locate_model("canine-s")


ANSWERS = {
    "nobody answers": (
        LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder. " * 5),
        "^'hf:owner/name': cannot reach the Hugging Face hub, and no copy of it lies here; name a folder that has it$",
    ),
    "sentences": (OSError(f"It is so. {'And this is told at length ' * 20}."), "did not give it: It is so.$"),
    "broken off": (HTTPError("Server disconnected."), "did not give it: Server disconnected.$"),
    "no hub": (KeyError("id"), r"did not give it: it answered as no hub does \(KeyError: 'id'\)$"),
    "one sentence": (OSError("so it is " * 100), r"did not give it: so it is .* \.\.\.$"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_what_the_hub_says_ends_where_a_sentence_ends(case, monkeypatch):
    error, says = ANSWERS[case]

    def download(repository, allow_patterns):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(CheckpointError, match=says) as caught:
        location.locate_model("hf:owner/name")
    assert len(str(caught.value)) < 300


def test_a_configuration_without_weights_is_called_so():
    with pytest.raises(CheckpointError, match="evabyte: is a configuration without weights, which marlin info"):
        location.locate_model("evabyte")
