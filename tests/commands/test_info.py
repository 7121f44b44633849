"""`marlin info` as a user runs it, and completion of commands."""

import json
import os
import subprocess
import sys

import pytest

from marlin_cli.files import shipped

MARLIN = [sys.executable, "-m", "marlin_cli"]
DEMO = "megabyte-demo"


def run(*arguments, code=0, **variables):
    environment = {**os.environ, **variables}
    result = subprocess.run([*MARLIN, *map(str, arguments)], capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == code, result.stderr
    return result


def test_the_installation():
    lines = run("info").stdout.splitlines()
    assert lines[0].startswith("This installation")
    assert [line.split("  ")[0] for line in lines[1:]] == [
        "marlin", "mlx, python", "machine", "device", "kernels", "cache", "not installed",
    ]  # fmt: skip


def test_kernels_that_are_not_built_are_not_built_by_it(tmp_path):
    result = run("info", "--device", "cpu", "--json", MARLIN_CACHE=str(tmp_path), MARLIN_KERNELS="auto")
    found = json.loads(result.stdout)["installation"]
    assert "not built yet" in found["kernels"] or "slower" in found["kernels"]  # the latter without a compiler
    assert found["cache"] == str(tmp_path) and "building" not in result.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_without_kernels_it_says_why():
    found = json.loads(run("info", "--device", "cpu", "--json", MARLIN_KERNELS="reference").stdout)["installation"]
    assert (found["kernels"], found["kernels_reason"]) == ("MLX's", "MARLIN_KERNELS=reference")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    target = tmp_path_factory.mktemp("info") / "packed"
    run("quantize", DEMO, "-o", target, "--method", "rtn")
    return target


def test_models_plain_and_packed(packed):
    document = json.loads(run("info", DEMO, packed, "--device", "cpu", "--json").stdout)
    plain, small = document["described"]
    assert plain["kind"] == "model" and plain["commands"] == ["calibrate", "quantize", "generate", "serve", "bench"]
    by_part = {part["part"]: part for part in plain["parts"]}
    assert by_part["global"]["formats"] == ["bfloat16"] and by_part["global"]["bits_per_weight"] == 16
    assert by_part["global"]["loaded_bytes"] == 2 * by_part["global"]["stored_bytes"]  # float32 on a CPU
    packed_part = {part["part"]: part for part in small["parts"]}
    assert packed_part["global"]["formats"] == ["nvfp4"] and 4.5 <= packed_part["global"]["bits_per_weight"] < 4.6
    assert packed_part["local"]["formats"] == ["mxfp8"]
    assert packed_part["global"]["weights"] == by_part["global"]["weights"]
    assert small["disk_bytes"] == sum(file.stat().st_size for file in packed.iterdir() if file.suffix != ".md")
    assert small["fingerprint"] is None and small["marlin"]["method"].startswith("rtn")


def test_statistics_name_the_model_they_are_of(tmp_path):
    stats = tmp_path / "stats.safetensors"
    (tmp_path / "text").write_bytes(b"some words of a text, and others " * 40)
    run("calibrate", DEMO, "--corpus", f"code={tmp_path / 'text'}", "--seq-bytes", 512, "-o", stats)
    model, found = json.loads(run("info", DEMO, stats, "--fingerprint", "--json").stdout)["described"]
    assert (found["kind"], found["hessians"]) == ("statistics", False)
    assert found["summary"]["model"] == model["fingerprint"]
    table = run("info", stats).stdout
    assert "statistics of marlin calibrate" in table and model["fingerprint"][:12] in table


def test_tables_are_of_what_was_named():
    lines = run("info", DEMO).stdout.splitlines()
    assert lines[0].strip() == str(shipped("configs/models") / DEMO)
    assert any(line.split() == ["is", "MegaByte,", "native", "layout"] for line in lines)
    assert lines[-1].startswith("all") and "This installation" not in lines[0]


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["nonsense"], "nonsense: no such file, folder or shipped model", 1),
        (["--fingerprint"], "--fingerprint needs MODEL|FILE", 2),
        ([DEMO, "--import", "heads=auto"], "heads=auto tries numbers", 2),
    ],
)
def test_refusals_are_a_line(arguments, message, code):
    result = run("info", *arguments, code=code)
    assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1 and not result.stdout


def test_a_shell_completes_commands():
    script = "import sys; sys.argv = ['marlin']; from marlin_cli.cli import main; main()"
    wanted = {"_MARLIN_COMPLETE": "complete_bash", "COMP_WORDS": "marlin gen", "COMP_CWORD": "1"}
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **wanted})
    assert found.stdout.split() == ["generate"]
