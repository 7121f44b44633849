"""Byte Latent Transformers on the command line: bits by part, and what is refused by name."""

import json
import sys

import mlx.core as mx
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


@pytest.mark.parametrize("format", ["int8", "mxfp8", "16bit"])
def test_hash_tables(format, marlin, tmp_path):
    """8 bits unless told otherwise; rows are those of the table unpacked whole, and no patch ends elsewhere."""
    others = ("--global-bits", "16", "--decoder-bits", "16", "--encoder-bits", "16", "--patcher-bits", "16")
    bits = {"int8": (), "mxfp8": ("--override", "hash_embedding=mxfp8"), "16bit": ("--hash-bits", "16")}[format]
    code, _, error = marlin("quantize", "model", "-o", "out", *others, *bits)
    assert code == 0, error
    packed = load("out", device="cpu")
    table, original = packed.network.hash_embedding, NETWORK.hash_embedding
    assert type(table).__name__ == ("Table" if format == "16bit" else "PackedTable")
    rows = mx.array([[0, 5, 193], [7, 5, 1]])
    spread = mx.abs(original(rows)).max()
    worst = mx.abs(table(rows) - original(rows)).max() / spread
    assert worst == 0 if format == "16bit" else 0 < worst < {"int8": 0.006, "mxfp8": 0.07}[format]
    assert table(rows[:0]).shape == (0, 3, 32) and table(rows[0, 0]).shape == (32,)
    assert mx.array_equal(table(rows)[1, 2], table(mx.array([1]))[0])
    windows = mx.random.randint(0, 256, (1, 120), key=mx.random.key(3))
    ids = NETWORK.led(windows + 4)
    assert (packed.network.ends(packed.network.patcher(ids)) == NETWORK.ends(NETWORK.patcher(ids))).all()
    lost = mx.abs(packed.network.predictions(windows) - NETWORK.predictions(windows)).max()
    assert lost < (1e-4 if format == "16bit" else 2)
    if format != "16bit":
        assert marlin("quantize", "out", "-o", "plain", "--dequantize")[0] == 0
        plain = load("plain", device="cpu").network.hash_embedding
        assert mx.allclose(plain(rows).astype(mx.float32), table(rows), atol=0.02)


def test_hash_tables_by_every_method(marlin, tmp_path):
    (tmp_path / "few").write_bytes(b"16 bytes a line\n" * 60)
    assert marlin("calibrate", "model", "--corpus", "few", "--seq-bytes", "96", "--hessian", "-o", "s.safetensors")[0] == 0
    sequential = ("--sequential", "--calibration-corpus", "few")
    for how in (("--method", "awq", "--stats", "s.safetensors"), ("--method", "gptq", "--stats", "s.safetensors"), sequential):
        code, _, error = marlin("quantize", "model", "-o", "out", *how, "--overwrite")
        assert code == 0, error
        table = load("out", device="cpu").network.hash_embedding
        assert (table.bits, table.mode) == (8, "affine")


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
        (("quantize", "model", "-o", "out", "--override", "hash_embedding=nvfp4"), "'hash_embedding' keeps 8 bits at least"),
        (("quantize", "model", "-o", "out", "--hash-bits", "4"), "--hash-bits must be 8 or 16, found 4: rows are added up"),
        (("generate", "model", "-p", "a", "--save-state", "state"), "--save-state: states of prompts are of a MegaByte or"),
        (("generate", "model", "-p", "a", "--chat"), "a Byte Latent Transformer has no form of chats"),
        (("generate", "model", "-p", "a", "--kv-bits", "8"), "--kv-bits: this Byte Latent Transformer keeps no keys"),
        (("generate", "model", "-p", "a", "--sentinel"), "--sentinel: a Byte Latent Transformer knows none"),
        (("generate", "model", "-p", "a" * 300), "255"),
    ],
)
def test_refused_by_name(arguments, message, marlin, tmp_path):
    (tmp_path / "few").write_bytes(b"16 bytes a line\n" * 24)
    code, out, error = marlin(*arguments)
    assert code in (1, 2) and not out and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
