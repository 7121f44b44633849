"""Byte Latent Transformers on the command line: bits by part, and what is refused by name."""

import json
import sys

import pytest
from blt_cases import blt_folder, random_blt

from marlin_cli import cli, load
from marlin_cli.models.blt_config import StackConfig

NETWORK = random_blt(encoder=StackConfig(32, 64, 2, 1))  # of sizes that every format packs


@pytest.fixture
def marlin(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    blt_folder(tmp_path / "model", NETWORK)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["marlin", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capfd.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    return run


def formats_of(folder):
    """The bits of each packed layer, by path; of one that is not packed none."""
    network = load(folder, device="cpu").network
    return {path: getattr(module, "bits", None) for path, module in network.named_modules() if path.endswith("_proj")}


def test_bits_by_part(marlin):
    code, _, error = marlin("quantize", "model", "-o", "out")
    assert code == 0, error
    bits = formats_of("out")
    assert bits["patcher.layers.0.ffn.up_proj"] == bits["byte_encoder.layers.0.attention.q_proj"] == 8
    assert bits["byte_decoder.layers.1.ffn.up_proj"] == bits["byte_decoder.readers.0.v_proj"] == 8
    assert bits["patches.layers.0.ffn.up_proj"] == 4
    assert bits["byte_decoder.readers.0.q_proj"] is bits["byte_encoder.patch_proj"] is None
    assert marlin("quantize", "model", "-o", "out", "--bits", "4", "--overwrite")[0] == 0
    bits = formats_of("out")
    assert bits["patcher.layers.0.ffn.up_proj"] == 8 and bits["byte_encoder.layers.0.attention.q_proj"] == 4
    given = ("--decoder-bits", "4", "--encoder-bits", "16", "--patcher-bits", "16", "--global-bits", "8")
    assert marlin("quantize", "model", "-o", "out", *given, "--overwrite")[0] == 0
    bits = formats_of("out")
    assert bits["byte_decoder.layers.1.ffn.up_proj"] == 4 and bits["patches.layers.0.ffn.up_proj"] == 8
    assert bits["patcher.layers.0.ffn.up_proj"] is bits["byte_encoder.layers.0.attention.q_proj"] is None


def test_statistics_by_place_and_length(marlin, tmp_path):
    (tmp_path / "few").write_bytes(b"16 bytes a line\n" * 60)
    code, _, error = marlin("calibrate", "model", "--corpus", "few", "--seq-bytes", "96", "-o", "stats.safetensors")
    assert code == 0, error
    found = json.loads(marlin("calibrate", "--show", "stats.safetensors", "--json")[1])
    by_layer = {name: each["input"]["rms_by_group"] for each in found["layers"] for name in each["layers"]}
    of_bytes, of_patches = by_layer["byte_decoder.layers.0.attention.q_proj"], by_layer["patches.layers.0.attention.q_proj"]
    assert len(of_bytes) == len(of_patches) == 8 and of_bytes[0] > 0 < of_patches[0] != of_patches[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "model", "-o", "out", "--kv-bits", "8"), "keeps no keys and values that grow"),
        (("quantize", "model", "-o", "out", "--local-bits", "8"), "--local-bits has no meaning for model, whose parts are"),
        (
            ("quantize", "model", "-o", "out", "--method", "gptq+hadamard", "--sequential", "--calibration-corpus", "few"),
            "a Byte Latent Transformer cannot be rotated: a patch takes the largest",
        ),
        (("quantize", "model", "-o", "out", "--override", "hash_embedding=int8"), "'hash_embedding' matches no layer"),
        (("generate", "model", "-p", "a", "--save-state", "state"), "a Byte Latent Transformer reads its prompts anew"),
        (("generate", "model", "-p", "a", "--chat"), "a Byte Latent Transformer has no form of chats"),
        (("generate", "model", "-p", "a", "--sentinel"), "a Byte Latent Transformer knows none"),
        (("generate", "model", "-p", "a" * 300), "255"),
    ],
)
def test_refused_by_name(arguments, message, marlin, tmp_path):
    (tmp_path / "few").write_bytes(b"16 bytes a line\n" * 24)
    code, out, error = marlin(*arguments)
    assert code in (1, 2) and not out and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
