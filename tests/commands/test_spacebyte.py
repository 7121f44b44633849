"""SpaceByte on the command line: a checkpoint of its authors' layout through every command, and what is refused by name."""

import json
import sys

import pytest
from spacebyte_cases import random_spacebyte, spacebyte_file

from marlin_cli import cli, load

NETWORK = random_spacebyte()
TEXT = b"A line of words, and more. " * 40


@pytest.fixture
def marlin(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    spacebyte_file(tmp_path / "ckpt.pt", NETWORK)
    (tmp_path / "few").write_bytes(TEXT)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["marlin", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capfd.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    return run


def test_calibrate_quantize_generate(marlin):
    code, _, error = marlin("calibrate", "ckpt.pt", "--corpus", "few", "--seq-bytes", "96", "-o", "stats.safetensors")
    assert code == 0, error
    found = json.loads(marlin("calibrate", "--show", "stats.safetensors", "--json")[1])
    by_layer = {name: each["input"]["rms_by_group"] for each in found["layers"] for name in each["layers"]}
    assert len(by_layer["final.layers.0.attention.q_proj"]) == 8
    code, _, error = marlin("quantize", "ckpt.pt", "-o", "out", "--method", "awq", "--stats", "stats.safetensors")
    assert code == 0, error
    layers = dict(load("out", device="cpu").network.named_modules())
    assert layers["initial.layers.0.ffn.up_proj"].bits == layers["final.layers.1.attention.v_proj"].bits == 8
    assert layers["global.layers.0.ffn.up_proj"].bits == 4
    code, out, error = marlin("generate", "out", "-p", "Words ", "--max-bytes", "12", "--json")
    assert code == 0 and json.loads(out)["prompt_bytes"] == 6, error


def test_sequential_methods(marlin):
    how = ("--method", "gptq", "--sequential", "--calibration-corpus", "few", "--sequential-bytes", "192")
    code, _, error = marlin("quantize", "ckpt.pt", "-o", "out", *how)
    assert code == 0, error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "ckpt.pt", "-o", "out", "--kv-bits", "8"), "keeps no keys and values that grow"),
        (("quantize", "ckpt.pt", "-o", "out", "--decoder-bits", "8"), "--decoder-bits has no meaning for ckpt.pt"),
        (
            ("quantize", "ckpt.pt", "-o", "out", "--method", "gptq+hadamard", "--sequential", "--calibration-corpus", "few"),
            "a SpaceByte cannot be rotated",
        ),
        (("generate", "ckpt.pt", "-p", "a", "--save-state", "state"), "a SpaceByte reads its prompts anew"),
        (("generate", "ckpt.pt", "-p", "a", "--sentinel"), "a SpaceByte knows none"),
        (("generate", "ckpt.pt", "-p", "a" * 300), "127"),
    ],
)
def test_refused_by_name(arguments, message, marlin, tmp_path):
    code, out, error = marlin(*arguments)
    assert code in (1, 2) and not out and message in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()
