"""ByT5's relatives on the command line: folders as their authors write them, and one line for what does not fit."""

import base64
import json
import os
import sys

import pytest
from decoder_cases import bygpt5_folder, gbst_folder, random_bygpt5, random_gbst
from safetensors.numpy import load_file, save_file

from marlin_cli import cli, load


@pytest.fixture
def marlin(tmp_path, monkeypatch, capfd):
    """Run the program in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["marlin", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", open(os.devnull))
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capfd.readouterr()
        return caught.value.code or 0, captured.out, captured.err

    return run


def refusal(code, out, err):
    assert code in (1, 2) and out == "" and err.count("\n") == 1 and err.startswith("marlin: "), (code, out, err)
    return err


@pytest.fixture
def bygpt5(tmp_path):
    return bygpt5_folder(tmp_path / "bygpt5", random_bygpt5(head_dim=32))


def test_a_bygpt5_goes_on_from_every_prompt(bygpt5, marlin, tmp_path):
    model = load(bygpt5, device="cpu")
    (tmp_path / "prompts").write_text('"ab"\n{"prompt_hex": "ff00", "id": "b"}\n""\n')
    code, out, err = marlin("generate", bygpt5, "--prompts", "prompts", "--max-bytes", "6")
    assert (code, err) == (0, "")
    found = [base64.b64decode(json.loads(line)["bytes_base64"]) for line in out.splitlines()]
    assert found == [model.generate(prompt, 6) for prompt in (b"ab", b"\xff\0", b"")]
    code, out, _ = marlin("generate", bygpt5, "-p", "<extra_id_3>ab", "--sentinel", "--max-bytes", "6", "--json")
    assert base64.b64decode(json.loads(out)["bytes_base64"]) == model.generate(b"<extra_id_3>ab", 6, sentinels=True)
    assert model.generate(b"ab", 6) == bytes(model.generate_stream(b"ab", 6))
    packed = load(bygpt5, device="cpu", kv_bits=8)
    code, out, _ = marlin("generate", bygpt5, "-p", "ab", "--kv-bits", "8", "--max-bytes", "9", "--json")
    assert base64.b64decode(json.loads(out)["bytes_base64"]) == packed.generate(b"ab", 9)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate", "--beams", "2"), "--beams has no meaning for bygpt5, a model that continues bytes one by one"),
        (("generate", "--kv-bits", "5"), "--kv-bits must be 4, 8 or 16"),
        (("generate", "--import", "heads=2"), "the import option heads has no meaning here"),
        (("quantize", "-o", "out", "--local-bits", "4"), "--local-bits has no meaning"),
        (("quantize", "-o", "out", "--calibration-pairs", "x", "--sequential"), "--calibration-pairs has no meaning"),
        (("calibrate", "-o", "s.safetensors", "--pairs", "x"), "--pairs has no meaning"),
        (("bench", "--reference", "bygpt5", "megabyte-demo", "--quality", "default", "--no-throughput"), "cannot be compared"),
        (("bench", "byt5-demo"), "measure models of one kind together"),
    ],
)
def test_what_a_bygpt5_does_not_take(arguments, words, bygpt5, marlin):
    command, *options = arguments
    assert words in refusal(*marlin(command, "bygpt5", *options))


def test_a_tied_bygpt5_is_not_rotated(marlin, tmp_path):
    bygpt5_folder(tmp_path / "tied", random_bygpt5(tied_head=True, scaled_head=True))
    (tmp_path / "text").write_bytes(b"bytes " * 2000)
    how = ("--method", "gptq+hadamard", "--sequential", "--sequential-bytes", "2k", "--calibration-corpus", "text")
    assert "a ByGPT5 with a tied head cannot be rotated" in refusal(*marlin("quantize", "tied", "-o", "out", *how))
    bygpt5_folder(tmp_path / "free", random_bygpt5(head_dim=32))
    (tmp_path / "recipe.yaml").write_text("decoder_format: mxfp4\nwo_format: mxfp4\n")
    assert marlin("quantize", "free", "-o", "out", *how, "--recipe", "recipe.yaml")[0] == 0
    assert len(load("out", device="cpu").generate(b"ab", 3)) <= 3


# Changes of config.json, and what the line says.
CONFIGS = {
    "no layers": ({"num_decoder_layers": 0}, "no place for the tensor"),
    "layers beyond memory": ({"num_decoder_layers": 1 << 40}, "layers"),
    "a width beyond memory": ({"d_model": 1 << 40}, "d_model"),
    "another width": ({"d_ff": 48}, "has shape"),
    "pieces of words": ({"vocab_size": 32128}, "pieces of words"),
    "no number": ({"num_heads": "six"}, "num_heads"),
    "another model": ({"model_type": "gpt2"}, "gpt2"),
    "an activation of none": ({"feed_forward_proj": "gated-step"}, "step"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_bygpt5_whose_config_does_not_fit(kind, marlin, tmp_path):
    changes, words = CONFIGS[kind]
    folder = bygpt5_folder(tmp_path / "model", random_bygpt5(), **changes)
    err = refusal(*marlin("generate", folder, "-p", "a", "--max-bytes", "2"))
    assert words in err and "model" in err


def test_a_bygpt5_whose_tensors_do_not_fit(bygpt5, marlin):
    whole = load_file(bygpt5 / "model.safetensors")
    for change, words in (
        (lambda tensors: tensors.pop("decoder.block.1.layer.0.SelfAttention.k.weight"), "decoder.block.1"),
        (lambda tensors: tensors.update({"decoder.extra.weight": tensors["shared.weight"]}), "decoder.extra.weight"),
        (lambda tensors: tensors["lm_head.weight"].__setitem__((0, 0), float("nan")), "NaN"),
        (lambda tensors: tensors.clear(), "tensor"),
    ):
        tensors = {name: tensor.copy() for name, tensor in whole.items()}
        change(tensors)
        save_file(tensors, bygpt5 / "model.safetensors")
        assert words in refusal(*marlin("generate", "bygpt5", "-p", "a"))


@pytest.fixture
def gbst(tmp_path):
    return gbst_folder(tmp_path / "gbst", random_gbst(head_dim=32))


def test_a_gbst_answers_every_input(gbst, marlin, tmp_path):
    model = load(gbst, device="cpu")
    inputs = (b"ab", b"\xff\0", b"", b"a longer one than the others")
    lines = [json.dumps({"prompt_hex": each.hex()}) for each in inputs]
    (tmp_path / "prompts").write_text("\n".join(lines))
    code, out, err = marlin("generate", gbst, "--prompts", "prompts", "--max-bytes", "6")
    assert (code, err) == (0, "")
    found = [base64.b64decode(json.loads(line)["bytes_base64"]) for line in out.splitlines()]
    assert found == [model.generate(each, 6) for each in inputs]
    assert model.encode(b"seven b").shape == (3, 32) and model.logits(b"ab", b"xy").shape == (3, 384)
    code, out, _ = marlin(
        "generate", gbst, "-p", "ab", "--beams", "3", "--n-best", "2", "--kv-bits", "8", "--max-bytes", "4", "--json"
    )
    assert code == 0 and len(out.splitlines()) == 2


def test_a_gbst_is_not_rotated(gbst, marlin, tmp_path):
    (tmp_path / "pairs.tsv").write_bytes(b"source\ttarget\n" * 40)
    how = ("--method", "gptq+hadamard", "--sequential", "--sequential-bytes", "500", "--calibration-pairs", "pairs.tsv")
    assert "a GBST cannot be rotated" in refusal(*marlin("quantize", "gbst", "-o", "out", *how))
    assert "--global-bits has no meaning for gbst" in refusal(*marlin("quantize", "gbst", "-o", "out", "--global-bits", "4"))


GBST_CONFIGS = {
    "blocks that are none": ({"subword_blocks": "all"}, "subword_blocks"),
    "a block of nothing": ({"subword_blocks": [[0, 0]]}, "block_sizes"),
    "an offset beyond its block": ({"subword_blocks": [[1, 0], [2, 2]]}, "block_offsets"),
    "blocks with a multiple beyond memory": ({"subword_blocks": [[n, 0] for n in (64, 81, 125, 49)]}, "common multiple"),
    "blocks beyond memory": ({"subword_blocks": None, "max_subword_block_size": 1 << 40}, "block_sizes"),
    "another kernel": ({"subword_blocks": [[1, 0], [5, 0]]}, "has shape"),
    "more bytes in a row than in a block": ({"downsample_factor": 9}, "bytes_in_row"),
    "no bytes in a row": ({"downsample_factor": 0}, "bytes_in_row"),
    "layers beyond memory": ({"num_layers": 1 << 40}, "layers"),
    "a width beyond memory": ({"d_model": 1 << 40}, "d_model"),
    "another model": ({"model_type": "t5"}, "encoder.embed_tokens"),
}


@pytest.mark.parametrize("kind", GBST_CONFIGS)
def test_a_gbst_whose_config_does_not_fit(kind, marlin, tmp_path):
    changes, words = GBST_CONFIGS[kind]
    folder = gbst_folder(tmp_path / "model", random_gbst(), **changes)
    err = refusal(*marlin("generate", folder, "-p", "a", "--max-bytes", "2"))
    assert words in err and "model" in err


def test_a_gbst_whose_tensors_do_not_fit(gbst, marlin):
    whole = load_file(gbst / "model.safetensors")
    front = "encoder.embed_tokens"
    for change, words in (
        (lambda tensors: tensors.pop(f"{front}.cand_scoring.0.bias"), "cand_scoring"),
        (lambda tensors: tensors.update({f"{front}.cand_scoring.0.weight": tensors["shared.weight"]}), "cand_scoring"),
        (lambda tensors: tensors.update({f"{front}.embeds.weight": tensors["shared.weight"] + 1}), "the same table"),
        (lambda tensors: tensors[f"{front}.positional_convol.2.proj.bias"].__setitem__(0, float("inf")), "infinity"),
        (lambda tensors: tensors.pop("decoder.block.0.layer.1.EncDecAttention.k.weight"), "EncDecAttention"),
    ):
        tensors = {name: tensor.copy() for name, tensor in whole.items()}
        change(tensors)
        save_file(tensors, gbst / "model.safetensors")
        assert words in refusal(*marlin("generate", "gbst", "-p", "a"))
