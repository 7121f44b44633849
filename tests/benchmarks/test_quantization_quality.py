"""The table of methods: what is measured is kept, a loss stands beside MLX's own on the same windows, machines are named."""

import json
import sys

import pytest
import quantization_quality as quality
from published import machine

from marlin_cli.models.megabyte_config import MegaByteConfig

SMALL = MegaByteConfig(
    patch_size=4, max_bytes=96, global_layers=1, global_dim=64, global_heads=2, local_layers=1, local_dim=32, local_heads=2
)


@pytest.fixture
def heldout(tmp_path):
    for domain, first in (("code", 0), ("text", 1)):
        folder = tmp_path / "heldout" / domain
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(bytes([first]) * 2048 * 2)
    return tmp_path / "heldout"


def row(key, bits, where):
    return json.dumps({"key": key, "bits": bits, "machine": where}) + "\n"


def run(monkeypatch, heldout, results, *options):
    given = ["--heldout", str(heldout), "--results", str(results), *options]
    monkeypatch.setattr(sys, "argv", ["quantization_quality.py", *given])
    quality.main()


def test_losses_and_shares_are_of_the_same_windows_and_format(tmp_path, heldout, monkeypatch):
    results, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    keys = [
        (["megabyte-demo", 32, "16-bit"], [1.0, 2.0, 3.0, 4.0], "here"),
        (["megabyte-demo", "plain", 32, "nvfp4", "nvfp4", "rtn"], [1.2, 2.4, 3.2, 4.4], "here"),
        (["megabyte-demo", "plain", 32, "nvfp4", "nvfp4", "gptq"], [1.1, 2.1, 3.1, 4.1], "here"),
        (["megabyte-demo", "plain", 32, "nvfp4", "mxfp8", "gptq"], [1.0, 2.0, 3.0, 4.06], "there"),
        (["megabyte-demo", "auto 4.75", 32, "nvfp4", "nvfp4", "mse"], [1.15, 2.15, 3.15, 4.15], "here"),
        (["megabyte-demo", "plain", 32, "int4", "int4", "sequential+distill 7"], [1.1, 2.3, 3.1, 4.3], "here"),
        (["megabyte-demo", 16, "16-bit"], [2.0, 2.0, 2.0, 2.0], "here"),
        (["megabyte-demo", "outliers", 16, "nvfp4", "nvfp4", "rtn"], [4.0, 4.0, 4.0, 4.0], "here"),
        (["megabyte-demo", "outliers", 16, "nvfp4", "nvfp4", "awq+gptq"], [2.5, 2.5, 2.5, 2.5], "here"),
    ]
    results.write_text("".join(row(*each) for each in keys))
    page.write_text("before\n" + "".join(quality.MARKERS) + "after\n")
    options = ["--table-only", "--target-bpw", "4.75", "--distill-steps", "7", "--markdown", str(page)]
    run(monkeypatch, heldout, results, *options)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "4 windows, 2.500 bits per byte in 16 bits; 4 windows, 2.000 bits per byte" in text
    assert "Measured on here; ¹ there." in text
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows == [
        "| all layers alike | rtn (MLX's own) | 0.3000 ± 0.0577 |  |  |  |",
        "| all layers alike | gptq | 0.1000 ± 0.0000 (33%) |  |  |  |",
        "| all layers alike | gptq, sequential, 7 steps of distillation |  |  | 0.2000 ± 0.0577 |  |",
        "| global as named, local mxfp8 | gptq | 0.0150 ± 0.0150 (5%)¹ |  |  |  |",
        "| auto, 4.75 bits a weight | mse | 0.1500 ± 0.0000 (50%) |  |  |  |",
        "| channels up to 100 times larger | rtn (MLX's own) | 2.0000 ± 0.0000 |  |  |  |",
        "| channels up to 100 times larger | awq+gptq | 0.5000 ± 0.0000 (25%) |  |  |  |",
    ]


def test_a_row_is_measured_once(tmp_path, heldout, monkeypatch, random_network, capsys):
    results, made = tmp_path / "results.jsonl", []
    network = random_network(SMALL)
    monkeypatch.setattr(quality, "load", lambda model, device: type("Model", (), {"network": network}))
    monkeypatch.setattr(quality.Packing, "unpacked", lambda self, name, method: made.append((name, method)) or network)
    monkeypatch.setattr("paired_losses.bits_of", lambda network, window, _: window * 2.0)
    options = ["--only", "alike,auto", "--formats", "nvfp4,int4", "--methods", "rtn,mse"]
    run(monkeypatch, heldout, results, *options)
    assert made == [("nvfp4", "rtn"), ("nvfp4", "mse"), ("int4", "rtn"), ("int4", "mse"), ("nvfp4", "rtn"), ("nvfp4", "mse")]
    assert "4 windows of 2048 bytes, 1.00000 bits per byte in 16 bits" in capsys.readouterr().out
    run(monkeypatch, heldout, results, *options, "--methods", "rtn,mse")
    assert len(made) == 6
    assert all(json.loads(line)["machine"] == machine() for line in results.read_text().splitlines())
    run(monkeypatch, heldout, results, "--only", "alike", "--formats", "nvfp4", "--methods", "gptq")
    assert made[6:] == [("nvfp4", "gptq")]


def test_a_misspelt_name_is_said(tmp_path, heldout, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, heldout, tmp_path / "results.jsonl", "--methods", "gqtp")
    assert "'gqtp'" in capsys.readouterr().err


@pytest.mark.parametrize("local", [None, "mxfp8"])
def test_formats_are_packed_as_the_part_says(tmp_path, monkeypatch, random_network, local):
    network = random_network(SMALL)
    monkeypatch.setattr(quality, "load", lambda model, device: type("Model", (), {"network": network}))
    options = quality.Options("tiny", "cpu", ["default"], tmp_path / "results.jsonl", 5.0, 1 << 10, 1)
    name = "alike" if local is None else "mixed"
    packed = []
    original = quality.quantize_network
    monkeypatch.setattr(quality, "quantize_network", lambda *a, **k: packed.append(original(*a, **k)) or packed[-1])
    quality.Packing(options, name).unpacked("nvfp4", "rtn")
    found = {layer.plan.part: layer.plan.format.name for layer in packed[0].layers if layer.plan.format}
    assert found == {"global": "nvfp4", "local": local or "nvfp4"}
