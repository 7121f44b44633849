"""`marlin bench --import`: in every mode, of the models whose files leave something open."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from marlin_cli.api import ImportOptions, load
from marlin_cli.cli import app

FOREIGN = str(Path(__file__).parents[1] / "data" / "foreign" / "megabyte_pytorch-2-stages.pt")
SAID = ("--import", "heads=2", "--import", "max_bytes=64")
TIMED = ("--prompt-bytes", "20", "--decode-bytes", "5", "--repeats", "1", "--device", "cpu")


def invoke(*arguments, code=0):
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    assert (result.exit_code, result.exception) == (0, None) or code, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The foreign checkpoint as marlin writes it, which says all."""
    path = tmp_path_factory.mktemp("models") / "native"
    load(FOREIGN, options=ImportOptions(heads=2, max_bytes=64), device="cpu").save(path)
    return path


@pytest.fixture
def scored(tmp_path, monkeypatch):
    monkeypatch.setattr("marlin_cli.bench.run.user_cache", lambda: tmp_path / "cache")
    (tmp_path / "text").write_bytes(b"a line of some bytes\n" * 20)
    return ("--quality", tmp_path / "text", "--window-bytes", "64", "--no-throughput", "--device", "cpu", "--format", "json")


def bits(*arguments):
    models = json.loads(invoke(*arguments).stdout)["models"]
    return [model["quality"]["all_domains"]["bits_per_byte"]["value"] for model in models]


def test_a_score_is_that_of_the_folder_beside_it(folder, scored):
    foreign, native = bits(FOREIGN, folder, *SAID, *scored)
    assert foreign == native
    assert bits(FOREIGN, "--import", "heads=4", "--import", "max_bytes=64", *scored) != [foreign]


def test_the_reference_takes_them_too_and_what_is_kept_of_it_is_of_its_heads(folder, scored):
    for heads, same in (("heads=2", True), ("heads=4", False)):
        said = ("--import", heads, "--import", "max_bytes=64")
        found = json.loads(invoke(folder, "--reference", FOREIGN, *said, *scored).stdout)["models"][0]
        assert (found["quality"]["all_domains"]["against_reference"]["kl_bits_per_byte"]["value"] == 0) is same


@pytest.mark.parametrize(
    "mode",
    [TIMED, ("--plan", "--bandwidth", "50"), ("--speculate", "auto", *TIMED), ("--surprise", "text", "--top", "1")],
    ids=["speed", "plan", "speculate", "surprise"],
)
def test_every_mode_takes_them(mode, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text").write_bytes(b"some bytes\n" * 9)
    assert invoke(FOREIGN, *SAID, *mode).stdout
    said = str(invoke(FOREIGN, *SAID, "--import", "activation=relu", *mode, code=1).exception)
    assert "activation is gelu by the checkpoint, but 'relu' was given" in said


def test_results_tell_what_was_said(tmp_path):
    results = tmp_path / "results.jsonl"
    for heads in ("heads=2", "heads=4"):
        invoke(FOREIGN, "--import", heads, "--import", "max_bytes=64", *TIMED, "--save", results)
    one, other = (json.loads(line)["models"][0]["fingerprint"] for line in results.read_text().splitlines())
    assert one != other


def test_models_that_say_all_refuse_them(folder):
    found = invoke(folder, *SAID, *TIMED, code=1)
    assert "the import option heads has no meaning here, the model says all" in str(found.exception)
