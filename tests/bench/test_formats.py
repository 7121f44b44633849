"""`marlin bench --formats`: one model packed in memory in several formats, a row each."""

import csv
import io
import json

import pytest
from typer.testing import CliRunner

from marlin_cli.api import AnsweringModel, ContinuingModel, EncodingModel
from marlin_cli.cli import app
from marlin_cli.errors import ConfigError, CorpusError, UsageError
from marlin_cli.ops.device import choose_device
from marlin_cli.quantization.plan import settings_named
from tests.small_networks import ANSWERING, CONTINUING, ENCODING, random_weights

QUICK = ["--prompt-bytes", "20", "--decode-bytes", "5", "--repeats", "1", "--device", "cpu"]


def saved(folder, kind, config):
    kind(random_weights(config), choose_device("cpu")).save(folder / "model")
    return str(folder / "model")


@pytest.fixture
def model(tmp_path):
    return saved(tmp_path, ContinuingModel, CONTINUING["megabyte"])


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "text").write_bytes(b"to be or not to be, that is the question. " * 9)
    return str(tmp_path / "corpus" / "text")


def invoke(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def rows_of(*arguments):
    result = invoke(*arguments, "--format", "json")
    assert result.exit_code == 0, (result.output, result.exception)
    return {row["format"]: row for row in json.loads(result.stdout)["rows"]}


def test_a_row_a_format_and_the_model_as_it_is_first(model, corpus, tmp_path):
    rows = rows_of(model, "--formats", "nvfp4,mxfp8,4/8", "--quality", corpus, "--window-bytes", "64", *QUICK)
    assert list(rows) == ["as it is", "nvfp4", "mxfp8", "4/8"]
    assert rows["nvfp4"]["bytes"] < rows["4/8"]["bytes"] < rows["mxfp8"]["bytes"] < rows["as it is"]["bytes"]
    kl = {name: row["measures"].get("kl_bits_per_byte", {}).get("value") for name, row in rows.items()}
    assert kl["as it is"] is None and 0 < kl["mxfp8"] < kl["nvfp4"]  # the model is not compared with itself
    assert all(row["bytes_per_second"] > 0 for row in rows.values())
    packed = CliRunner().invoke(app, ["quantize", model, "-o", str(tmp_path / "packed"), "--json"])
    written = json.loads(packed.stdout)
    assert rows["4/8"]["bytes"] == written["kept_bytes"] + sum(part["bytes_after"] for part in written["parts"])


def test_one_table_and_its_other_forms(model, corpus):
    asked = [model, "--formats", "nvfp4", "--quality", corpus, "--no-throughput"]
    table = invoke(*asked).stdout.splitlines()
    assert table[0].startswith(f"{model} in formats, on 378 bytes of {corpus}")
    assert table[1].split() == "format bits/weight bytes bits/byte more s.e. KL s.e. same guess, %".split()
    assert [line.split()[0] for line in table[2:]] == ["as", "nvfp4"]
    found = list(csv.DictReader(io.StringIO(invoke(*asked, "--format", "csv").stdout)))
    assert [row["format"] for row in found] == ["as it is", "nvfp4"] and float(found[1]["kl_bits_per_byte"]) > 0
    assert len(invoke(*asked, "--format", "jsonl").stdout.splitlines()) == 2
    assert "| nvfp4 |" in invoke(*asked, "--format", "md").stdout


def test_a_model_that_answers_is_scored_on_pairs(tmp_path):
    model = saved(tmp_path, AnsweringModel, ANSWERING["byt5"])
    (tmp_path / "pairs.tsv").write_text("a\tA\nbc\tBC\n")
    rows = rows_of(model, "--formats", "4/8", "--quality", tmp_path / "pairs.tsv", *QUICK)
    assert rows["4/8"]["measures"]["bits_per_byte_difference"]["value"] != 0
    assert rows["4/8"]["measures"]["exact_match"]["value"] == 0
    refused = invoke(model, "--formats", "4/8", "--no-throughput")
    assert isinstance(refused.exception, UsageError) and "comes with no pairs; give --quality" in str(refused.exception)
    (tmp_path / "model" / "pairs.jsonl").write_text('{"source": "a", "target": "A"}\n')
    assert "on 1 pairs of" in invoke(model, "--formats", "4/8", "--no-throughput").stdout


def test_what_cannot_be_read_is_said_before_anything_is_packed(model, monkeypatch):
    monkeypatch.setattr(ContinuingModel, "quantize", lambda *_, **__: pytest.fail("packed"))
    refused = invoke(model, "--formats", "4/8", "--no-throughput", "--quality", "nothing")
    assert isinstance(refused.exception, CorpusError)


def test_a_model_that_encodes_texts_is_compared_by_its_states(tmp_path, corpus):
    name, config = next(iter(ENCODING.items()))
    model = saved(tmp_path, EncodingModel, config)
    rows = rows_of(model, "--formats", "mxfp8,nvfp4", "--quality", corpus, "--no-throughput")
    errors = {name: row["measures"].get("states_error", {}).get("value") for name, row in rows.items()}
    assert errors["as it is"] is None and 0 < errors["mxfp8"] < errors["nvfp4"]


def test_a_format_that_a_width_does_not_take_is_left_out(tmp_path, corpus):
    from dataclasses import replace

    config = replace(CONTINUING["megabyte"], local_ffn_dim=48)
    model = saved(tmp_path, ContinuingModel, config)
    result = invoke(model, "--formats", "nvfp4,mxfp4", "--quality", corpus, "--no-throughput")
    assert "mxfp4 is left out: " in result.stderr and "48 input channels" in result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()[2:]] == ["as", "nvfp4"]


def test_what_a_foreign_file_does_not_say_is_taken(model, corpus):
    said = invoke(model, "--formats", "nvfp4", "--quality", corpus, "--no-throughput", "--import", "heads=1")
    assert "the import option heads has no meaning here" in str(said.exception)  # marlin's own layout says it itself


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["a", "b", "--formats", "nvfp4"], "one model, found 2"),
        (["--formats", "nvfp5"], "unknown format 'nvfp5'; did you mean 'nvfp4'?"),
        (["--formats", "nvfp4", "--roofline"], "--roofline"),
        (["--formats", "nvfp4", "--reference", "megabyte-demo", "--quality", "default"], "--reference"),
        (["--details"], "--quality"),
    ],
)
def test_what_has_no_meaning_is_refused(arguments, said, model):
    result = invoke(*[model if each in ("a", "b") else each for each in arguments])
    assert isinstance(result.exception, UsageError) and said in str(result.exception)


def test_a_packed_model_is_refused(model, tmp_path, corpus):
    CliRunner().invoke(app, ["quantize", model, "-o", str(tmp_path / "packed")])
    result = invoke(tmp_path / "packed", "--formats", "nvfp4", "--quality", corpus)
    assert isinstance(result.exception, UsageError) and "is packed already; name the model" in str(result.exception)


def test_short_names_of_settings():
    mixed = settings_named("4/8")
    assert (mixed.global_format, mixed.local_format, mixed.encoder_format, mixed.wo_format) == (
        "nvfp4",
        "mxfp8",
        "nvfp4",
        "mxfp8",
    )
    same = settings_named("int4")
    assert {same.global_format, same.local_format, same.cross_format, same.wo_format} == {"int4"}
    with pytest.raises(ConfigError, match="unknown format '16'"):
        settings_named("4/16")
