"""`marlin quantize` on a ByT5 by every method that runs calibration bytes through it, as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time

import byt5_cases
import pytest

from marlin_cli import ByT5Model, cli, load
from marlin_cli.errors import UsageError
from marlin_cli.ops.device import choose_device

WAYS = {
    "sequential on pairs": ["--method", "gptq", "--sequential", "--calibration-pairs", "PAIRS"],
    "sequential on spans": ["--method", "gptq", "--sequential", "--calibration-corpus", "code=CORPUS"],
    "gptq+hadamard": ["--method", "gptq+hadamard", "--sequential", "--calibration-pairs", "PAIRS"],
    "distilled on pairs": ["--distill-steps", "2", "--distill-pairs", "PAIRS"],
    "distilled on spans": ["--distill-steps", "2", "--distill-corpus", "code=CORPUS"],
    "auto": ["--target-bpw", "6", "--calibration-pairs", "PAIRS"],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, an encoder alone, pairs and a corpus: what PAIRS and CORPUS stand for."""
    folder = tmp_path_factory.mktemp("byt5")
    device = choose_device("cpu")
    ByT5Model(byt5_cases.random_byt5(), device).save(folder / "model")
    ByT5Model(byt5_cases.random_byt5(decoder_layers=0), device).save(folder / "encoder")
    pairs = [{"source_hex": each.source.hex(), "target_hex": each.target.hex()} for each in byt5_cases.examples(1)]
    (folder / "PAIRS.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (folder / "CORPUS").write_bytes(bytes(range(256)) * 24)
    return folder


@pytest.fixture
def quantize(files, monkeypatch, capsys):
    """Run `marlin quantize` in this process, which spares its start: (exit code, stdout, stderr)."""

    def run(model, *options):
        named = [
            str(each).replace("PAIRS", str(files / "PAIRS.jsonl")).replace("CORPUS", str(files / "CORPUS")) for each in options
        ]
        monkeypatch.setattr(sys, "argv", ["marlin", "quantize", str(files / model), *named])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return run


@pytest.mark.parametrize("way", WAYS)
def test_every_way_packs_and_two_runs_give_identical_files(way, quantize, tmp_path):
    for name in ("a", "b"):
        code, _, err = quantize("model", "-o", tmp_path / name, *WAYS[way])
        assert code == 0, err
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    packed = load(tmp_path / "a", device="cpu")
    assert packed.quantization and packed.logits(b"in", b"out").shape == (4, 384)


def test_the_folder_says_how_it_was_packed(quantize, tmp_path):
    size = sum(each.size_bytes for each in byt5_cases.examples(1))
    options = [*WAYS["sequential on pairs"], "--distill-steps", 3, "--distill-pairs", "PAIRS"]
    _, _, err = quantize("model", "-o", tmp_path / "out", *options)
    assert "KL divergence at the first step" in err and "(3 steps)" in err  # a pass over the pairs is one
    method = json.loads((tmp_path / "out/config.json").read_text())["marlin"]["method"]
    assert method == f"gptq, sequential on {size:,} bytes; distilled, 3 steps of at most 8192 ids of pairs"


def test_a_recipe_of_auto_gives_the_same_files(quantize, tmp_path):
    assert quantize("model", "-o", tmp_path / "a", *WAYS["auto"])[0] == 0
    recipe = tmp_path / "a.recipe.yaml"
    assert "nvfp4* " in recipe.read_text() and "mxfp8* " in recipe.read_text()
    assert quantize("model", "-o", tmp_path / "b", "--recipe", recipe)[0] == 0
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_what_an_export_cannot_hold_names_the_option_that_chose_it(quantize, tmp_path):
    for options, remedy in (
        (["--decoder-bits", 4], "choose --wo-bits 4"),
        (["--encoder-bits", 8], "16 bits for the encoder part"),
    ):
        code, _, err = quantize("model", "-o", tmp_path / "exported", "--export", "compressed-tensors", *options)
        assert code == 2 and remedy in err


def test_rotated_states_are_not_given_out(quantize, tmp_path):
    assert quantize("model", "-o", tmp_path / "packed", *WAYS["gptq+hadamard"])[0] == 0
    assert quantize(tmp_path / "packed", "--dequantize", "-o", tmp_path / "plain")[0] == 0
    export = ["--wo-bits", 4, "--export", "compressed-tensors"]
    code, _, err = quantize("model", "-o", tmp_path / "exported", *WAYS["gptq+hadamard"], *export)
    assert code == 0, err
    for name in ("packed", "plain", "exported"):
        with pytest.raises(UsageError, match=r"gptq\+hadamard has rotated"):
            load(tmp_path / name, device="cpu").encode(b"abc")
        assert len(load(tmp_path / name, device="cpu").generate(b"abc", max_length=3)) <= 3


@pytest.mark.parametrize(
    ("model", "options", "message", "code"),
    [
        ("model", [*WAYS["sequential on pairs"], "--balance-keys"], "--balance-keys needs --stats", 2),
        (
            "model",
            [*WAYS["sequential on pairs"], "--calibration-corpus", "default"],
            "--calibration-corpus has no meaning beside --calibration-pairs",
            2,
        ),
        ("model", ["--distill-steps", "1", "--distill-pairs", "nowhere.tsv"], "no such file of pairs", 1),
        ("model", ["--target-bpw", "4", "--calibration-pairs", "PAIRS"], "4 bits a weight are too few", 1),
        ("encoder", ["--distill-steps", "1"], "an encoder alone", 2),
        ("encoder", ["--target-bpw", "6", "--calibration-corpus", "code=CORPUS"], "an encoder alone", 2),
        ("encoder", ["--method", "gptq+hadamard", "--sequential", "--calibration-corpus", "code=CORPUS"], "encoder alone", 1),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(model, options, message, code, quantize, tmp_path):
    found, out, err = quantize(model, "-o", tmp_path / "out", *options)
    assert (found, out) == (code, "") and message in err and len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_pairs_are_no_option_of_a_megabyte(files, tmp_path, monkeypatch, capsys):
    pairs = str(files / "PAIRS.jsonl")
    for options in (["--sequential", "--calibration-pairs", pairs], ["--distill-steps", "1", "--distill-pairs", pairs]):
        monkeypatch.setattr(sys, "argv", ["marlin", "quantize", "megabyte-demo", "-o", str(tmp_path / "out"), *options])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 2 and "-pairs has no meaning for megabyte-demo, a model that" in capsys.readouterr().err


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_run_that_is_cut_short_leaves_nothing_under_the_final_name(sent, code, files, tmp_path):
    options = ["--distill-steps", "100000", "--distill-pairs", str(files / "PAIRS.jsonl")]
    command = [sys.executable, "-m", "marlin_cli", "quantize", str(files / "model"), "-o", str(tmp_path / "out"), *options]
    restored = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=restored) as job:
        time.sleep(6)
        os.kill(job.pid, sent)
        assert job.wait(timeout=60) == code
    assert not (tmp_path / "out").exists()


def test_what_it_costs_is_refused_before_packing_where_no_pairs_are_there(quantize, tmp_path):
    code, _, err = quantize("model", "-o", tmp_path / "out", "--measure")
    assert code == 2 and "--measure scores answers, and " in err and "comes with no pairs; put pairs.jsonl" in err
    assert not (tmp_path / "out").exists()
