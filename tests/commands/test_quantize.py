"""`marlin quantize` as a user runs it, and what its output is worth outside marlin."""

import json
import os
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
from small_networks import FIRST_DEMO

from marlin_cli import load

MARLIN = [sys.executable, "-m", "marlin_cli", "quantize"]


def run(*arguments, code=0):
    result = subprocess.run([*MARLIN, *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert result.returncode == code, result.stderr
    return result


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "demo"
    result = run(FIRST_DEMO, "-o", folder, "--global-bits", 4, "--local-bits", 8, "--kv-bits", 8, "--json")
    return folder, json.loads(result.stdout)


def test_the_report_adds_up(packed):
    folder, report = packed
    parts = {part["part"]: part for part in report["parts"]}
    assert (parts["global"]["format"], parts["local"]["format"], parts["head"]["format"]) == (
        "nvfp4",
        "mxfp8",
        "bfloat16",
    )
    assert parts["global"]["bits_per_weight"] == pytest.approx(4.5, abs=0.01)
    assert parts["local"]["bits_per_weight"] == 8.25
    assert parts["global"]["relative_error"] < 0.09 < parts["global"]["mlx_relative_error"]
    size = sum(part["bytes_after"] for part in parts.values()) + report["kept_bytes"]
    header = (folder / "model.safetensors").stat().st_size - size
    assert 0 < header < 30_000


@pytest.mark.parametrize(
    ("model", "options", "formats"),
    [
        ("megabyte-demo", ["--bits", 4], {"global": ["nvfp4"], "local": ["nvfp4"]}),
        ("megabyte-demo", ["--bits", 8, "--global-format", "int4"], {"global": ["int4"], "local": ["mxfp8"]}),
        ("byt5-demo", ["--bits", 4, "--cross-bits", 16], {"encoder": ["mxfp8", "nvfp4"], "cross": ["bfloat16"]}),
        ("byt5-demo", ["--bits", 4, "--wo-bits", 4], {"encoder": ["nvfp4"], "decoder": ["nvfp4"], "cross": ["nvfp4"]}),
    ],
)
def test_bits_are_of_every_part_that_has_none_of_its_own(model, options, formats):
    parts = json.loads(run(model, "--dry-run", "--json", *options).stdout)["parts"]
    found = {part: sorted(each["format"] for each in parts if each["part"] == part) for part in formats}
    assert found == formats


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("megabyte-demo", ["--bits", 5], "--bits: bits must be 4, 8 or 16, found 5"),
        ("megabyte-demo", ["--local-bits", 3], "--local-bits: bits must be 4, 8 or 16, found 3"),
        ("byt5-demo", ["--global-bits", 4], "; it has --encoder-bits, --decoder-bits, --cross-bits, --wo-bits"),
        ("megabyte-demo", ["--cross-bits", 4], "; it has --global-bits, --local-bits"),
    ],
)
def test_bits_that_cannot_be_name_the_option_and_those_to_take(model, options, message):
    err = run(model, "--dry-run", *options, code=2).stderr
    assert message in err and len(err.splitlines()) == 1


def test_the_folder_loads_in_marlin_with_its_cache_bits(packed, first_demo):
    model = load(packed[0])
    assert (model.cache_bits.keys, model.cache_bits.values) == (8, 8)
    data = b"The quick brown fox jumps over the lazy dog. " * 4
    assert abs(model.bits_per_byte(data) - first_demo.bits_per_byte(data)) < 0.3


def test_the_folder_loads_in_plain_mlx(packed):
    """mx.load and mx.quantized_matmul, with config.json's table in mlx-lm's convention and the scale of nvfp4."""
    folder, _ = packed
    table = json.loads((folder / "config.json").read_text())["quantization"]
    arrays = mx.load(str(folder / "model.safetensors"))
    source = load(FIRST_DEMO).network
    from marlin_cli.models import linear_layers

    for path, layer in linear_layers(source).items():
        settings = table.get(path, {key: table[key] for key in ("group_size", "bits", "mode")})
        if settings is False:
            assert f"{path}.scales" not in arrays
            continue
        x = mx.random.normal((2, layer.weight.shape[1]))
        y = mx.quantized_matmul(x, arrays[f"{path}.weight"], arrays[f"{path}.scales"], **settings)
        y = y * arrays.get(f"{path}.global_scale", mx.array(1.0))
        exact = x @ layer.weight.T
        assert (mx.abs(y - exact).mean() / mx.abs(exact).mean()).item() < 0.12, path


def test_what_is_not_packed_is_not_unpacked():
    assert "megabyte-demo: no layer of the model is packed" in run("megabyte-demo", "--dequantize", "--dry-run", code=1).stderr


def test_dequantize_gives_the_same_logits_back(packed, tmp_path):
    run(packed[0], "-o", tmp_path / "plain", "--dequantize")
    plain, model = load(tmp_path / "plain"), load(packed[0])
    data = b"0123456789" * 4
    # bfloat16 holds the decoded 4- and 8-bit values exactly, up to the group's scale.
    assert mx.abs(plain.logits(data) - model.logits(data)).max().item() < 0.05
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization" not in config and "marlin" not in config


def test_a_dry_run_shows_sizes_and_writes_nothing(packed, tmp_path):
    report = json.loads(run(FIRST_DEMO, "--dry-run", "--json").stdout)
    assert {p["part"]: p["bytes_after"] for p in report["parts"]} == pytest.approx(
        {p["part"]: p["bytes_after"] for p in packed[1]["parts"]}, rel=0.001
    )
    assert report["output"] is None and not list(tmp_path.iterdir())


def test_a_recipe_and_options_and_overrides_combine(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("global_format: mxfp4\nlocal_format: int8\noverrides: {'o_proj$': mxfp8}\n")
    report = json.loads(
        run("megabyte-demo", "--dry-run", "--json", "--recipe", recipe, "--local-bits", 4,
            "--override", r"global\.layers\.0\.=int4").stdout
    )  # fmt: skip
    found = {(part["part"], part["format"]): part["layers"] for part in report["parts"]}
    assert found == {
        ("global", "mxfp4"): 2 + 6 * 6, ("global", "int4"): 7, ("global", "mxfp8"): 6,
        ("local", "nvfp4"): 3 * 6, ("local", "mxfp8"): 3, ("head", "float16"): 1,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["balanced", "smallest", "careful"])
def test_every_shipped_recipe_fits_the_demo(name):
    run("megabyte-demo", "--dry-run", "--recipe", name)


def test_killed_half_way_leaves_nothing_under_the_final_name(tmp_path):
    target = tmp_path / "out"
    for delay in (0.3, 1.0, 1.6, 2.2):
        job = subprocess.Popen([*MARLIN, FIRST_DEMO, "-o", str(target)], stderr=subprocess.DEVNULL)
        time.sleep(delay)
        os.kill(job.pid, signal.SIGKILL)
        job.wait()
        if target.exists():  # it was quicker: then it is whole
            load(target)
            break
    run(FIRST_DEMO, "-o", target, "--overwrite")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    first = (target / "model.safetensors").read_bytes()
    run(FIRST_DEMO, "-o", target, "--overwrite")
    assert (target / "model.safetensors").read_bytes() == first
    assert np.frombuffer(first, dtype=np.uint8).any()


def test_the_python_interface_quantizes_and_saves(demo, tmp_path):
    model = demo.quantize(global_bits=4, local_bits=8, kv_bits=4)
    assert (model.cache_bits.keys, demo.quantization) == (4, None)
    model.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert again.generate(b"abc", max_bytes=8) == model.generate(b"abc", max_bytes=8)
