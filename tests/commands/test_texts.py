"""`marlin calibrate` and `marlin quantize` on networks that encode, as a user runs them, and what a user may get wrong."""

import json
import sys

import mlx.core as mx
import pytest
from canine_cases import DATA, LA_KINDS, LA_TINY, TINY, random_canine, write_folder

from marlin_cli import EncodingModel, cli, load
from marlin_cli.checkpoints import ImportOptions
from marlin_cli.ops.device import choose_device
from marlin_cli.statistics import load_statistics

TEXT = "Kůň a pes jedou. 東京は大きい, this is English.\n".encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models as they come from elsewhere and as marlin writes them, and corpora."""
    found = tmp_path_factory.mktemp("texts")
    shapes = json.loads((DATA / "la_canine_golden.json").read_text())["shapes"]["on"]
    write_folder(found / "la", {**LA_TINY, **LA_KINDS["on"], "model_type": "la-canine"}, shapes)
    EncodingModel(random_canine(head="token", labels=("O", "A")), choose_device("cpu")).save(found / "tags")
    EncodingModel(random_canine(), choose_device("cpu")).save(found / "base")
    (found / "text.txt").write_bytes(TEXT * 60)
    (found / "none.bin").write_bytes(b"\xff\xfe\x00" * 500)
    (found / "empty").mkdir()
    (found / "empty" / "config.json").write_text(json.dumps(TINY | {"model_type": "canine"}))
    return found


@pytest.fixture
def marlin(folder, tmp_path, monkeypatch, capsys):
    """Run the program in this process: (exit code, stdout, stderr); names of the folder are its files'."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        named = [str(folder / each) if (folder / str(each)).exists() else str(each) for each in arguments]
        monkeypatch.setattr(sys, "argv", ["marlin", *named])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return run


def test_one_language_calibrated_and_packed(marlin, folder, tmp_path):
    """The statistics are those of that language, and the packed folder holds it alone."""
    czech = ("--import", "language=cs")
    code, _, err = marlin(
        "calibrate", "la", *czech, "--corpus", "text.txt", "--corpus", "none.bin", "--hessian", "-o", "s.safetensors"
    )
    assert code == 0 and "3 window(s) of the corpus are left out: they are no UTF-8" in err
    found = load_statistics(tmp_path / "s.safetensors")
    assert 0.9 * len(TEXT) * 60 < found.total_bytes <= len(TEXT) * 60 and not found.totals.keys
    options = ("--override", "adapter.*=16bit", "--local-bits", "8", "--method", "gptq", "--stats", "s.safetensors")
    assert marlin("quantize", "la", *czech, "-o", "packed", *options)[0] == 0
    packed, plain = load("packed", device="cpu"), load(folder / "la", device="cpu", options=ImportOptions(language="cs"))
    assert packed.config == plain.config and packed.config.language == "cs"
    states, wanted = packed.encode(TEXT), plain.encode(TEXT)
    assert 0 < mx.square(states - wanted).mean().item() < 0.1 * mx.square(wanted).mean().item()
    assert marlin("quantize", "packed", "-o", "again", "--dequantize")[0] == 0
    assert mx.allclose(load("again", device="cpu").encode(TEXT), states, atol=0.1)
    code, _, err = marlin("quantize", "packed", "--import", "language=de", "-o", "other")
    assert code == 1 and "holds the adapters of 'cs', 'de' was asked for" in err


WRONG = {
    "no language": (["calibrate", "la", "-o", "s.safetensors"], "holds adapters of 85 languages; name one"),
    "no such language": (["quantize", "la", "--import", "language=xx", "-o", "q"], "has no adapters of 'xx'; known: af, am"),
    "a language of none": (["quantize", "tags", "--import", "language=cs", "-o", "q"], "option language has no meaning here"),
    "no text": (["calibrate", "tags", "--corpus", "none.bin", "-o", "s.safetensors"], "the corpus has no text (UTF-8)"),
    "no text to pack on": (
        ["quantize", "tags", "-o", "q", "--method", "gptq", "--sequential", "--calibration-corpus", "none.bin"],
        "no text (UTF-8) in",
    ),
    "no text to tune on": (
        ["quantize", "tags", "-o", "q", "--distill-steps", "1", "--distill-corpus", "none.bin"], "less than one batch",
    ),
    "no weights": (["quantize", "empty", "-o", "q"], "holds none of model.safetensors"),
    "no head to tune": (
        ["quantize", "base", "-o", "q", "--distill-steps", "1", "--distill-corpus", "text.txt"], "no head and predicts nothing"
    ),
    "no head to measure": (
        ["quantize", "base", "-o", "q", "--target-bpw", "6", "--calibration-corpus", "text.txt"], "no head and predicts nothing"
    ),
    "rotation": (
        ["quantize", "base", "-o", "q", "--method", "gptq+hadamard", "--sequential", "--calibration-corpus", "text.txt"],
        "cannot be rotated: its norms follow the sums",
    ),
    "a cache": (["quantize", "base", "-o", "q", "--kv-bits", "8"], "--kv-bits has no meaning for"),
    "another's parts": (["quantize", "base", "-o", "q", "--encoder-bits", "8"], "whose parts are global, local"),
    "another form": (["quantize", "base", "-o", "q", "--export", "compressed-tensors"], "--export has no meaning for"),
    "bytes to continue": (["generate", "base", "-p", "a"], "ask marlin label and marlin encode"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_a_user_may_get_wrong(kind, marlin, tmp_path):
    arguments, words = WRONG[kind]
    code, out, err = marlin(*arguments)
    lines = [line for line in err.splitlines() if not line.startswith(("--seq-bytes", "packing", "calibrating"))]
    said = [line for line in lines if "window(s) of the corpus are left out" not in line]
    assert code in (1, 2) and out == "" and len(said) == 1 and words in said[0] and said[0].startswith("marlin: "), err
    assert not list(tmp_path.iterdir())
