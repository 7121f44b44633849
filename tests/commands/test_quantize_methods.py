"""`marlin calibrate --hessian` and `marlin quantize --method` as a user runs them."""

import json
import subprocess
import sys

import pytest

from marlin_cli import load
from marlin_cli.api import MegaByteModel
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops.device import choose_device

MARLIN = [sys.executable, "-m", "marlin_cli"]


def run(*arguments, code=0):
    result = subprocess.run([*MARLIN, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert result.returncode == code, result.stderr
    return result


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small model, a corpus of two domains, and statistics with Hessians."""
    import mlx.core as mx

    folder = tmp_path_factory.mktemp("methods")
    mx.random.seed(1)
    from marlin_cli.models.megabyte import MegaByte

    config = MegaByteConfig(
        patch_size=4, max_bytes=96, global_layers=1, global_dim=64, global_heads=2, global_ffn_dim=128,
        local_layers=1, local_dim=64, local_heads=2, local_ffn_dim=128,
    )  # fmt: skip
    MegaByteModel(MegaByte(config), choose_device("cpu")).save(folder / "model")
    for name in ("code", "binary"):
        (folder / name).write_bytes(bytes(range(256)) * 4)
    corpora = [part for name in ("code", "binary") for part in ("--corpus", f"{name}={folder / name}")]
    stats = folder / "stats.safetensors"
    result = run("calibrate", folder / "model", *corpora, "--seq-bytes", 96, "--hessian", "-o", stats)
    assert "Hessians of 2 domain(s): " in result.stderr
    return folder, stats, corpora


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq"])
def test_each_method_packs_and_reports_its_worst_layers(method, files, tmp_path):
    folder, stats, _ = files
    result = run(
        "quantize", folder / "model", "-o", tmp_path / "out", "--method", method, "--stats", stats,
        "--domain-weight", "binary=0.2", "--domain-weight", "code=0.8", "--local-bits", 4, "--json",
    )  # fmt: skip
    worst = json.loads(result.stdout)["worst_layers"]
    assert len(worst) == 10
    found = [layer["output_error"] for layer in worst]
    assert found == sorted(found, reverse=True)
    for layer in worst:
        if method == "rtn":
            assert layer["output_error"] == pytest.approx(layer["mlx_output_error"])
        if method == "gptq":
            assert layer["output_error"] < layer["mlx_output_error"]
    marlin = json.loads((tmp_path / "out" / "config.json").read_text())["marlin"]
    assert marlin["method"].startswith(method)
    assert marlin["domain_weights"] == {"binary": 0.2, "code": 0.8}
    assert load(tmp_path / "out").logits(b"some bytes").shape == (10, 256)


@pytest.mark.parametrize("how", ["rtn", "mse", "awq", "gptq", "sequential", "gptq+hadamard", "distilled"])
def test_two_runs_give_identical_files(how, files, tmp_path):
    folder, stats, corpora = files
    options = ["--method", how, "--stats", stats]
    if how in ("sequential", "gptq+hadamard"):
        options = ["--method", "gptq" if how == "sequential" else how, "--sequential"]
        options += [part.replace("--corpus", "--calibration-corpus") for part in corpora]
    if how == "distilled":
        options = ["--distill-steps", 2, *[part.replace("--corpus", "--distill-corpus") for part in corpora]]
    for name in ("a", "b"):
        run("quantize", folder / "model", "-o", tmp_path / name, *options)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_packing_layer_after_layer(files, tmp_path):
    folder, _, corpora = files
    corpora = [part.replace("--corpus", "--calibration-corpus") for part in corpora]
    options = ["--method", "gptq", "--sequential", "--sequential-bytes", "4k", "--domain-weight", "code=1", *corpora]
    document = json.loads(run("quantize", folder / "model", "-o", tmp_path / "out", *options, "--json").stdout)
    assert len(document["worst_layers"]) == 10
    marlin = json.loads((tmp_path / "out" / "config.json").read_text())["marlin"]
    assert marlin["method"].startswith("gptq, sequential on ") and marlin["domain_weights"] == {"code": 1.0}
    assert load(tmp_path / "out").logits(b"some bytes").shape == (10, 256)


def test_a_budget_chooses_formats_and_writes_a_recipe_that_gives_the_same_files(files, tmp_path):
    folder, stats, corpora = files
    corpora = [part.replace("--corpus", "--calibration-corpus") for part in corpora]
    options = ["--method", "gptq", "--stats", stats]
    run("quantize", folder / "model", "-o", tmp_path / "a", *options, "--target-bpw", 6, *corpora)
    recipe = tmp_path / "a.recipe.yaml"
    assert "--target-bpw 6: gptq" in recipe.read_text() and "nvfp4* " in recipe.read_text()
    run("quantize", folder / "model", "-o", tmp_path / "b", *options, "--recipe", recipe)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_statistics_of_other_weights_are_taken_and_said(files, tmp_path):
    folder, stats, _ = files
    MegaByteModel.from_config(load(folder / "model").config, seed=2).save(tmp_path / "other")
    result = run("quantize", tmp_path / "other", "-o", tmp_path / "out", "--method", "awq", "--stats", stats)
    assert [line for line in result.stderr.splitlines() if f"{stats}: measured on other weights than those of" in line]
    result = run("quantize", folder / "model", "-o", tmp_path / "own", "--method", "awq", "--stats", stats)
    assert "other weights" not in result.stderr


def test_distilling(files, tmp_path):
    folder, stats, corpora = files
    corpora = [part.replace("--corpus", "--distill-corpus") for part in corpora]
    result = run("quantize", folder / "model", "-o", tmp_path / "out", "--distill-steps", 2, *corpora)
    assert "KL divergence at the first step" in result.stderr and "(2 steps)" in result.stderr
    marlin = json.loads((tmp_path / "out" / "config.json").read_text())["marlin"]
    assert marlin["method"] == "mse; distilled, 2 steps of 8 x 96 bytes"


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (["--method", "gtpq"], "unknown method 'gtpq'; did you mean 'gptq'", 1),
        (["--method", "gptq"], "'gptq' needs statistics", 2),
        (["--method", "gptq+hadamard", "--stats", "STATS"], "add --sequential", 2),
        (["--domain-weight", "binary=0.2"], "--domain-weight needs --stats or --sequential", 2),
        (["--method", "gtpq", "--sequential"], "unknown method 'gtpq'; did you mean 'gptq'", 1),
        (["--method", "awq", "--sequential"], "leave out --method awq", 2),
        (["--method", "awq+gptq", "--sequential"], "leave out --method awq+gptq", 2),
        (["--stats", "STATS", "--sequential"], "--stats has no meaning beside --sequential", 2),
        (["--target-bpw", "4", "--calibration-corpus", "default"], "4 bits a weight are too few", 1),
        (["--stats", "STATS", "--domain-weight", "binary"], "is not DOMAIN=SHARE", 2),
        (["--stats", "STATS", "--domain-weight", "binary=-1"], "is not DOMAIN=SHARE", 2),
        (["--stats", "STATS", "--domain-weight", "binry=1"], "no domain 'binry'", 1),
    ],
)
def test_impossible_options(options, message, code, files, tmp_path):
    folder, stats, _ = files
    options = [str(stats) if option == "STATS" else option for option in options]
    result = run("quantize", folder / "model", "-o", tmp_path / "out", *options, code=code)
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_errors_of_outputs_come_first_and_few_rows_are_said(files, tmp_path):
    folder, stats, corpora = files
    said = run("quantize", folder / "model", "-o", tmp_path / "a", "--method", "gptq", "--stats", stats).stderr
    assert "bytes after  error of outputs" in said and "MLX's encoder" in said  # of the table of layers
    few = tmp_path / "few.safetensors"
    run("calibrate", folder / "model", *corpora, "--max-bytes", "96", "--seq-bytes", "32", "--hessian", "-o", few)
    said = run("quantize", folder / "model", "-o", tmp_path / "b", "--method", "gptq", "--stats", few).stderr
    assert "fewer than 4 rows a channel" in said and "calibrate on more bytes" in said
    said = run("quantize", folder / "model", "-o", tmp_path / "c", "--method", "mse", "--stats", few).stderr
    assert "rows a channel" not in said


def test_a_target_that_the_head_exceeds_is_explained(files, tmp_path):
    folder, _, corpora = files
    options = [part.replace("--corpus", "--calibration-corpus") for part in corpora]
    said = run("quantize", folder / "model", "-o", tmp_path / "a", "--target-bpw", 6, *options).stderr
    assert (
        "--target-bpw 6 is of the layers that a format is chosen for; with those that stay as they are (the head) it is" in said
    )
