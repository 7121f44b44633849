"""`marlin quantize --plan`: sizes from a configuration alone."""

import json

import pytest
from typer.testing import CliRunner

from marlin_cli.api import ContinuingModel
from marlin_cli.cli import app
from marlin_cli.errors import CheckpointError, ConfigError, UsageError
from marlin_cli.ops.device import choose_device
from tests.small_networks import CONTINUING, random_weights


def invoke(*arguments):
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


def plan(*arguments):
    result = invoke(*arguments, "--plan", "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


@pytest.fixture
def model(tmp_path):
    import mlx.core as mx

    network = random_weights(CONTINUING["megabyte"])
    network.set_dtype(mx.bfloat16)
    ContinuingModel(network, choose_device("cpu")).save(tmp_path / "model")
    return tmp_path / "model"


def test_it_has_the_sizes_that_packing_gives(model, tmp_path):
    mixes = {mix["format"]: mix for mix in plan(model)["mixes"]}
    for title, options in {"4/8": [], "4": ["--bits", "4"], "8": ["--bits", "8"], "16": ["--bits", "16"]}.items():
        written = json.loads(invoke(model, "-o", tmp_path / title.replace("/", "-"), "--json", *options).stdout)
        assert mixes[title]["weight_bytes"] == written["kept_bytes"] + sum(part["bytes_after"] for part in written["parts"])


def test_a_configuration_without_weights_is_enough(model):
    whole = plan(model)
    (model / "model.safetensors").unlink()
    assert plan(model)["mixes"] == plan(model / "config.json")["mixes"] == whole["mixes"]


def test_a_preset_of_transformers_names_is_known(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "t5", "d_model": 64, "d_kv": 32, "d_ff": 128, "num_heads": 2, "num_layers": 1, "vocab_size": 384}
        )
    )
    assert plan(tmp_path)["weights"] > 0 and plan(tmp_path)["mixes"][0]["cache_bytes"] is None


def test_billions_of_weights_are_only_counted():
    table = invoke("evabyte", "--plan", "--bandwidth", "100").stdout.splitlines()
    assert table[0] == "evabyte: 6,488,330,240 weights; a plan, nothing is read or written"
    assert table[1].endswith("bytes/s at 100 GB/s")
    assert [line.split()[0] for line in table[2:]] == ["16", "8", "4/8"]  # all layers are one part, so 4/8 is 4


def test_speed_is_bandwidth_over_what_is_read(model):
    slow, fast = (plan(model, "--bandwidth", rate)["mixes"] for rate in ("1", "10"))
    assert fast[0]["bytes_per_second"] == pytest.approx(10 * slow[0]["bytes_per_second"])
    assert slow[-1]["bytes_per_second"] > slow[0]["bytes_per_second"]
    assert plan(model, "--kv-bits", "4")["mixes"][0]["cache_bytes"] < slow[0]["cache_bytes"]


@pytest.mark.parametrize(
    "arguments, error, said",
    [
        (["nothing-like-it", "--plan"], CheckpointError, "no such file, folder or shipped model"),
        (["megabyte-demo", "--plan", "--bandwidth", "0"], UsageError, "--bandwidth must be 0.001 to 1,000,000 GB/s, found 0"),
        (["byt5-xxl", "--plan", "--kv-bits", "3"], UsageError, "--kv-bits must be 4, 8 or 16, found 3"),
        (["evabyte", "--plan", "--bandwidth", "1e300"], UsageError, "--bandwidth must be 0.001 to 1,000,000 GB/s"),
        (["megabyte-demo", "--bandwidth", "5", "-o", "x"], UsageError, "--plan"),
        (["megabyte-demo", "--plan", "--bits", "4"], UsageError, "--bits"),
    ],
)
def test_what_cannot_be_planned_is_said(arguments, error, said):
    result = invoke(*arguments)
    assert isinstance(result.exception, error) and said in str(result.exception)


def test_what_is_no_configuration_is_said(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    result = invoke(tmp_path, "--plan")
    assert isinstance(result.exception, ConfigError) and "config.json: expected an object" in str(result.exception)
