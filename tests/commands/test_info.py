"""`marlin info` as a user runs it, and completion of commands."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import save_file
from small_networks import CONTINUING
from typer.testing import CliRunner

from marlin_cli import ByT5Config
from marlin_cli.checkpoints.writer import write_model
from marlin_cli.cli import app
from marlin_cli.errors import CheckpointError
from marlin_cli.files import shipped
from marlin_cli.models import config_as_mapping

MARLIN = [sys.executable, "-m", "marlin_cli"]
DEMO = "megabyte-demo"


def run(*arguments, code=0, **variables):
    environment = {**os.environ, **variables}
    result = subprocess.run([*MARLIN, *map(str, arguments)], capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == code, result.stderr
    return result


def invoke(*arguments):
    return CliRunner().invoke(app, ["info", *map(str, arguments)])


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
    assert by_part["global"]["formats"] == ["float16"] and by_part["global"]["bits_per_weight"] == 16
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


@pytest.mark.parametrize("form", ["preset", "file", "folder"])
def test_a_configuration_without_weights(form, tmp_path):
    preset = shipped("configs/models") / "evabyte.json"
    if form == "folder":
        (tmp_path / "config.json").write_bytes(preset.read_bytes())
    name = {"preset": "evabyte", "file": preset, "folder": tmp_path}[form]
    result = invoke(name)
    assert f"{name}\nis  EvaByte, a configuration without weights" in re.sub(" {2,}", "  ", result.stdout)
    assert result.stdout.splitlines()[-1].split() == ["all", "6,488,330,240", "12,976,660,480"]
    document = json.loads(invoke(name, "--json").stdout)["described"][0]
    assert (document["kind"], document["architecture"]) == ("configuration", "EvaByte")


def test_configurations_of_other_layouts(tmp_path):
    canine = {"model_type": "canine", "hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(canine))
    assert "CANINE, a configuration without weights" in invoke(tmp_path).stdout


@pytest.mark.parametrize(("labels", "expected"), [((), ["encode"]), (("O", "PER"), ["label", "encode"])])
def test_an_encoder_alone_answers_nothing(labels, expected, tmp_path):
    config = ByT5Config(d_model=32, ffn_dim=64, heads=1, head_dim=32, encoder_layers=1, decoder_layers=0, labels=labels)
    (tmp_path / "config.json").write_text(json.dumps(config_as_mapping(config)))
    found = json.loads(invoke(tmp_path, "--json").stdout)["described"][0]
    assert found["commands"] == ["calibrate", "quantize", *expected, "bench"]


def test_the_state_of_a_prompt(tmp_path):
    facts = {"format": "marlin state", "prompt_ids": "24", "model": "ab" * 32, "sha256": "0"}
    save_file({"ids": np.zeros(24, np.int32)}, tmp_path / "state", facts)
    lines = [line.split() for line in invoke(tmp_path / "state").stdout.splitlines()]
    assert ["prompt", "ids", "24"] in lines and ["model", "abababababab"] in lines
    document = json.loads(invoke(tmp_path / "state", "--json").stdout)["described"][0]
    assert document["kind"] == "state" and "sha256" not in document["facts"]


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "is empty"), (b'{"a": 1}', "is JSON"), (b"some words", "is text"), (b"\x1f\x8b\x08\0", "is compressed by gzip")],
)
@pytest.mark.parametrize("name", ["file", "file.safetensors"])
def test_a_file_of_another_kind_is_named_for_what_it_is(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert f"{tmp_path / name}: {said}; marlin info takes" in str(invoke(tmp_path / name).exception)


def test_json_that_is_no_configuration(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert "a.json: is JSON without a model_type" in str(invoke(tmp_path / "a.json").exception)


def test_tables_are_of_what_was_named():
    lines = run("info", DEMO).stdout.splitlines()
    assert lines[0].strip() == str(shipped("configs/models") / DEMO)
    assert any(line.split() == ["is", "MegaByte,", "native", "layout"] for line in lines)
    assert lines[-1].startswith("all") and "This installation" not in lines[0]


def test_weights_are_looked_at_where_all_bytes_are_read(random_network, tmp_path):
    network = random_network(CONTINUING["megabyte"])
    network.output.weight = network.output.weight * np.nan
    write_model(tmp_path / "model", config_as_mapping(network.config), dict(tree_flatten(network.parameters())), None, None)
    assert invoke(tmp_path / "model").exit_code == 0
    refusal = invoke(tmp_path / "model", "--fingerprint").exception
    assert isinstance(refusal, CheckpointError) and "'output.weight' holds NaN or infinity" in str(refusal)


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
