"""`marlin calibrate` as the program runs it: its output, its exit codes, and what it leaves behind."""

import io
import json
import sys

import numpy as np
import pytest

from marlin_cli import cli, load
from marlin_cli.api import MegaByteModel
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops.device import choose_device
from marlin_cli.statistics import load_statistics
from marlin_cli.statistics import run as run_module
from marlin_cli.statistics.collect import measure


@pytest.fixture
def marlin(monkeypatch, capsys, tmp_path):
    """Run `marlin calibrate` with arguments, in a folder with a small model and a corpus: (code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["marlin", "calibrate", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return run


@pytest.fixture(autouse=True)
def workplace(tmp_path, random_network, small_sizes):
    network = random_network(MegaByteConfig(**small_sizes))
    MegaByteModel(network, choose_device("cpu")).save(tmp_path / "model")
    rng = np.random.default_rng(0)
    for name in ("text", "data"):
        (tmp_path / name).write_bytes(rng.integers(0, 256, 500, dtype=np.uint8).tobytes())
    return tmp_path


RUN = ("model", "--corpus", "code=text:3", "--corpus", "binary=data", "-o", "s.safetensors")


def test_a_run(marlin, workplace):
    code, out, err = marlin(*RUN, "--seq-bytes", "64", "--max-bytes", "0.5k")
    assert (code, out) == (0, "")
    found = load_statistics(workplace / "s.safetensors")
    assert found.total_bytes == 512 and found.domains.keys() == {"binary", "code"}
    for name, count in found.domains.items():
        assert f"{name} {count}" in " ".join(err.split())
    assert sorted(file.name for file in workplace.iterdir()) == ["data", "model", "s.safetensors", "text"]


def test_the_statistics_are_of_this_model(marlin, workplace):
    """Another way to the same numbers: the library over the same windows, on the loaded model."""
    assert marlin("model", "--corpus", "text", "-o", "s.safetensors", "--seq-bytes", "96")[0] == 0
    network = load(workplace / "model").network
    data = np.frombuffer((workplace / "text").read_bytes(), dtype=np.uint8)
    sums = sum(
        measure(network, "other", data[start : start + 96]).inputs["output"].sum_squares[0].sum(axis=0)
        for start in range(0, 480, 96)
    )
    np.testing.assert_allclose(load_statistics(workplace / "s.safetensors").mean_square("output"), sums / 480, rtol=1e-6)


def test_json_is_one_document_on_stdout(marlin):
    code, out, _ = marlin(*RUN, "--seq-bytes", "96", "--json")
    document = json.loads(out)
    assert (code, document["file"], document["bytes"]) == (0, "s.safetensors", sum(document["domains"].values()))
    assert document["runs"][0]["sequence_bytes"] == 96
    assert {path for layer in document["layers"] for path in layer["layers"]} >= {"output", "local.layers.1.ffn.up_proj"}


def test_windows_are_as_long_as_the_recipe_says(marlin, workplace):
    recipe = workplace / "own.yaml"
    recipe.write_text("seq_bytes: 32\nsources: [{domain: code, path: text, weight: 2}]\n")
    for options, expected in (((), 32), (("--seq-bytes", "64"), 64)):
        assert marlin("model", "--corpus", recipe, "-o", f"{expected}.safetensors", *options)[0] == 0
        assert load_statistics(workplace / f"{expected}.safetensors").runs[0].sequence_bytes == expected


def test_windows_are_cut_to_the_context(marlin, workplace):
    code, _, err = marlin(*RUN)
    assert code == 0 and "--seq-bytes 16384 is cut to 96" in err
    assert load_statistics(workplace / "s.safetensors").runs[0].sequence_bytes == 96


def test_show(marlin):
    marlin(*RUN)
    code, out, err = marlin("--show", "s.safetensors")
    assert (code, err) == (0, "")
    for text in ("binary", "global.layers.0.attention.q/k/v_proj", "local.layers.1.attention K", "#####"):
        assert text in out
    code, out, err = marlin("--show", "s.safetensors", "--json")
    assert (code, err) == (0, "") and json.loads(out)["attentions"][0]["attention"] == "global.layers.0.attention"


def test_show_and_merge_run_without_mlx(marlin, monkeypatch):
    for index in (0, 1):
        marlin(*RUN[:-1], f"{index}.safetensors", "--shard", f"{index}/2")
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert marlin("--merge", "0.safetensors", "1.safetensors", "-o", "both.safetensors")[0] == 0
    assert marlin("--show", "both.safetensors")[0] == 0


def test_merged_shards_equal_the_whole(marlin, workplace):
    marlin(*RUN)
    for index in (0, 1):
        assert marlin(*RUN[:-1], f"{index}.safetensors", "--shard", f"{index}/2")[0] == 0
    code, out, _ = marlin("--merge", "0.safetensors", "1.safetensors", "-o", "both.safetensors")
    assert (code, out) == (0, "")
    whole, both = (load_statistics(workplace / f"{name}.safetensors") for name in ("s", "both"))
    assert both.domains == whole.domains
    np.testing.assert_array_equal(both.mean_square("output"), whole.mean_square("output"))


def test_ctrl_c_keeps_what_was_measured_and_resume_goes_on(marlin, workplace, monkeypatch):
    marlin(*RUN[:-1], "whole.safetensors", "--seq-bytes", "64")
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measure(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "measure", interrupted)
        code, out, err = marlin(*RUN, "--seq-bytes", "64")
    assert (code, out) == (130, "")
    assert "s.safetensors.partial has what was measured: go on with --resume" in err
    assert not (workplace / "s.safetensors").exists()
    code, _, err = marlin(*RUN, "--seq-bytes", "64")
    assert code == 1 and "an unfinished run is there; go on with --resume, or remove it" in err
    code, _, err = marlin(*RUN, "--seq-bytes", "64", "--resume", "--seed", "9")
    assert code == 1 and "seed 0, not 9" in err
    assert marlin(*RUN, "--seq-bytes", "64", "--resume")[0] == 0
    assert (workplace / "s.safetensors").read_bytes() == (workplace / "whole.safetensors").read_bytes()
    assert not (workplace / "s.safetensors.partial").exists()


def test_stdin_is_measured_but_not_resumed(marlin, workplace, monkeypatch):
    class Pipe:
        buffer = io.BytesIO(bytes(range(256)))

        def isatty(self):
            return False

    monkeypatch.setattr(sys, "stdin", Pipe())
    monkeypatch.setattr(run_module, "SAVE_EVERY_BYTES", 1)
    code, _, err = marlin("model", "--corpus", "-", "-o", "s.safetensors", "--seq-bytes", "64")
    assert code == 0, err
    assert load_statistics(workplace / "s.safetensors").total_bytes == 256


def test_what_is_there_is_replaced_only_when_it_is_said(marlin, workplace):
    small = ("--seq-bytes", "64", "--max-bytes", "128")
    assert marlin(*RUN, *small)[0] == 0
    before = (workplace / "s.safetensors").read_bytes()
    for again in ([*RUN, *small], ["--merge", "s.safetensors", "s.safetensors", "-o", "s.safetensors"]):
        code, _, err = marlin(*again)
        assert code != 0 and "s.safetensors" in err and (workplace / "s.safetensors").read_bytes() == before
    assert "already exists; name another file or pass --overwrite" in marlin(*RUN, *small)[2]
    assert marlin(*RUN, *small, "--overwrite", "--seed", "3")[0] == 0
    assert (workplace / "s.safetensors").read_bytes() != before


WRONG = {
    "no output": (["model"], 2, "--output is missing"),
    "an output of another kind": (["model", "-o", "s.json"], 2, "name the file so"),
    "two models": (["model", "other", "-o", "s.safetensors"], 2, "one model at a time, found model and other"),
    "a window below a patch": ([*RUN, "--seq-bytes", "3"], 2, "--seq-bytes 3 is less than a patch"),
    "a size in words": ([*RUN, "--max-bytes", "much"], 2, "--max-bytes: 'much' is not a size"),
    "a seed below zero": ([*RUN, "--seed", "-1"], 2, "--seed"),
    "a shard beyond the count": ([*RUN, "--shard", "2/2"], 2, "--shard '2/2'"),
    "no bytes wanted": ([*RUN, "--max-bytes", "0"], 1, "must be at least 1 and at most 9223372036854775807, found 0"),
    "a missing model": (["no/such/model", *RUN[1:]], 1, "no/such/model"),
    "a missing corpus": (["model", "--corpus", "nowhere", "-o", "s.safetensors"], 1, "nowhere: no such"),
    "a missing folder": ([*RUN[:-1], "no/s.safetensors"], 1, "the folder no does not exist"),
    "an output that is a folder": ([*RUN[:-1], "folder.safetensors"], 1, "folder.safetensors: is a folder"),
    "merging one file": (["--merge", "a.safetensors", "-o", "s.safetensors"], 2, "two statistics files or more"),
    "merging a missing file": (["--merge", "a", "b", "-o", "s.safetensors"], 1, "a: no such file"),
    "merging a model": (
        ["--merge", "model/model.safetensors", "model/model.safetensors", "-o", "s.safetensors"],
        1,
        "model/model.safetensors: holds weights of a model or other arrays, not statistics",
    ),
    "merging a file with itself": (
        ["--merge", "once.safetensors", "once.safetensors", "-o", "s.safetensors"],
        1,
        "once.safetensors: windows of the same corpus (seed 0) are counted already",
    ),
    "showing a missing file": (["--show", "a.safetensors"], 1, "a.safetensors: no such file"),
    "showing and running": (["model", "--show", "once.safetensors"], 2, "MODEL|FILE has no meaning beside --show"),
}


@pytest.mark.parametrize("hazard", WRONG)
def test_wrong_use_ends_in_one_line(hazard, marlin, workplace):
    (workplace / "folder.safetensors").mkdir()
    if "once.safetensors" in WRONG[hazard][0]:
        marlin(*RUN[:-1], "once.safetensors")
    before = sorted(file.name for file in workplace.iterdir())
    arguments, expected, message = WRONG[hazard]
    code, out, err = marlin(*arguments)
    assert (code, out) == (expected, "")
    errors = [line for line in err.splitlines() if not line.startswith("--seq-bytes 16384 is cut")]
    assert len(errors) == 1 and errors[0].startswith("marlin: ") and message in errors[0], err
    assert sorted(file.name for file in workplace.iterdir()) == before
