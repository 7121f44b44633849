"""`marlin bench` from its options to its output, on tiny models."""

import csv
import errno
import io
import json
import os

import pytest
from typer.testing import CliRunner

from marlin_cli.api import MegaByteModel
from marlin_cli.cli import app
from marlin_cli.errors import CheckpointError, CorpusError, OutputError, UsageError
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops import cpu
from marlin_cli.ops.device import choose_device
from marlin_cli.prediction.bandwidth import Bandwidth
from marlin_cli.quality import quality

QUICK = ["--prompt-bytes", "20", "--decode-bytes", "5", "--repeats", "2", "--device", "cpu"]


@pytest.fixture
def models(tmp_path, random_network, small_sizes):
    """Two saved models whose global heads are wide enough to pack."""
    config = MegaByteConfig(**{**small_sizes, "global_heads": 1})
    for seed, name in enumerate(("first", "second")):
        MegaByteModel(random_network(config, seed), choose_device("cpu")).save(tmp_path / name)
    return str(tmp_path / "first"), str(tmp_path / "second")


@pytest.fixture
def corpus(tmp_path):
    for name, data in {"code/a": b"int main() {}\n" * 9, "code/b": b"\0", "binary/x": bytes(70)}.items():
        (tmp_path / "corpus" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "corpus" / name).write_bytes(data)
    return str(tmp_path / "corpus")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Not the user's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("marlin_cli.bench.run.user_cache", lambda: folder)
    return folder


def invoke(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def run(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def document(*arguments):
    return json.loads(run(*arguments, "--format", "json").stdout)


def test_stdout_is_one_json_document_and_nothing_else(models, corpus):
    result = document(*models, *QUICK, "--quality", corpus, "--window-bytes", "32", "--reference", models[0], "--kv-bits", "4")
    assert [model["model"] for model in result["models"]] == list(models)
    assert result["machine"]["device"] == "cpu"
    assert result["machine"]["device_reason"] == "asked for"
    assert result["throughput_settings"]["repeats"] == 2
    for model in result["models"]:
        assert model["throughput"]["decoded_bytes"] == 10
        assert len(model["throughput"]["decode_bytes_per_second"]["samples"]) == 2
        assert model["cache_bits"] == {"keys": 4, "values": 4, "window": None, "share_left": None}
        assert model["quality"]["domains"]["code"]["bytes"] == 127
        assert model["quality"]["all_domains"]["bytes"] == 197
        assert sum(model["loaded_weight_bytes"].values()) == sum(model["stored_weight_bytes"].values()) > 0
    itself, other = (model["quality"]["all_domains"]["against_reference"] for model in result["models"])
    assert itself["kl_bits_per_byte"]["value"] == 0 < other["kl_bits_per_byte"]["value"]
    assert itself["top1_agreement"]["value"] == 1 > other["top1_agreement"]["value"]


def test_stored_bytes_are_those_of_the_checkpoint():
    [demo] = document("megabyte-demo", *QUICK)["models"]
    assert sum(demo["stored_weight_bytes"].values()) == 2 * 10_050_624  # float16
    assert sum(demo["loaded_weight_bytes"].values()) == 4 * 10_050_624  # float32 on a CPU
    assert demo["quality"] is None


def test_a_reference_that_is_no_model_of_the_run_is_loaded(models, corpus):
    quality = ["--quality", corpus, "--window-bytes", "64"]
    [model] = document(models[1], "--no-throughput", *quality, "--reference", models[0])["models"]
    assert model["throughput"] is None
    assert model["quality"]["all_domains"]["against_reference"]["kl_bits_per_byte"]["value"] > 0


def test_the_same_model_twice_keeps_two_results(models):
    result = document(models[0], models[0], *QUICK)
    assert [model["model"] for model in result["models"]] == [models[0], f"{models[0]} (2)"]


def test_sizes_take_units(models, tmp_path):
    (tmp_path / "long").write_bytes(bytes(range(256)) * 5)
    arguments = ["--no-throughput", "--quality", tmp_path / "long", "--window-bytes", "64"]
    [model] = document(models[0], *arguments, "--max-bytes-per-file", "1k")["models"]
    assert model["quality"]["all_domains"]["bytes"] == 1024
    [model] = document(models[0], *arguments, "--max-quality-bytes", "0.5k")["models"]
    assert model["quality"]["all_domains"]["bytes"] == 512


def test_csv_and_json_lines_on_stdout(models):
    rows = list(csv.DictReader(io.StringIO(run(models[0], *QUICK, "--format", "csv").stdout)))
    assert {row["model"] for row in rows} == {models[0]}
    lines = run(*models, *QUICK, "--format", "jsonl").stdout.splitlines()
    assert [json.loads(line)["models"][0]["model"] for line in lines] == list(models)


def test_a_table_names_the_device_and_the_speeds(models):
    text = run(models[0], *QUICK).stdout
    for words in ("cpu (asked for)", "prefill, bytes/s", "time to first byte, ms", "global cache, bytes"):
        assert words in text


@pytest.mark.parametrize("arguments, name", [([], "out.json"), (["--format", "json"], "out.txt")])
def test_output_goes_to_a_file_and_not_to_stdout(models, tmp_path, arguments, name):
    result = run(models[0], *QUICK, *arguments, "--output", tmp_path / name)
    assert result.stdout == ""
    assert json.loads((tmp_path / name).read_text())["models"][0]["model"] == models[0]


def test_a_second_comparison_does_not_run_the_reference(models, corpus, cache, monkeypatch):
    arguments = [models[1], "--no-throughput", "--quality", corpus, "--window-bytes", "64", "--reference", models[0]]
    first = document(*arguments)["models"]
    assert sum(path.stat().st_size for path in (cache / "reference").iterdir()) > 197 * 1024
    calls = []
    original = quality.log2_probabilities
    monkeypatch.setattr(quality, "log2_probabilities", lambda *given: calls.append(1) or original(*given))
    assert document(*arguments)["models"] == first
    kept = len(calls)
    assert document(*arguments, "--reference-cache", "0")["models"] == first
    assert len(calls) - kept == 2 * kept
    other = document(models[0], *arguments[1:-1], models[1])["models"]
    assert other != first  # the other way round is another reference


def test_an_interrupted_run_goes_on_when_asked_to(models, corpus, cache, monkeypatch):
    arguments = [models[0], "--no-throughput", "--quality", corpus, "--window-bytes", "32", "--stride-bytes", "16"]
    whole = document(*arguments)["models"]
    assert whole[0]["quality"]["all_domains"]["bytes"] == 197  # each once, though windows overlap
    original = quality._measured
    calls = []

    def interrupted(*given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(quality, "_measured", interrupted)
    assert invoke(*arguments).exit_code != 0
    assert len(list((cache / "quality").iterdir())) == 1
    assert document(*arguments, "--resume")["models"] == whole
    passes = len(calls) - 3
    assert list((cache / "quality").iterdir()) == []
    document(*arguments, "--resume")
    assert len(calls) - 3 - passes == passes + 2  # nothing is left to go on with


@pytest.mark.parametrize("form", ["json", "jsonl", "csv", "md", "table"])
def test_every_form_says_what_the_bits_are_divided_by(models, corpus, form):
    asked = [models[0], "--no-throughput", "--quality", corpus, "--window-bytes", "64", "--format", form]
    text = run(*asked, "--details").stdout
    words = {"json": "bytes as they lie", "jsonl": "bytes as they lie", "csv": "over_bytes"}.get(
        form, "total bits over total bytes"
    )
    assert words in text
    assert "other ASCII" in text and ("other ASCII" in run(*asked).stdout) == (form != "table")
    assert "197" in text


def test_packed_caches_are_said_to_leave_quality_alone(models, corpus):
    arguments = [models[0], *QUICK, "--quality", corpus, "--window-bytes", "64", "--format", "json"]
    assert "scored without a cache" in run(*arguments, "--kv-bits", "4").stderr
    assert "scored without a cache" not in run(*arguments).stderr


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        pytest.param(["--no-throughput"], UsageError, "has no meaning beside --no-throughput", id="nothing to time"),
        pytest.param(["--reference", "x"], UsageError, "--reference needs --quality", id="reference alone"),
        pytest.param(["--window-bytes", "9"], UsageError, "--window-bytes needs --quality", id="windows alone"),
        pytest.param(["--stride-bytes", "9"], UsageError, "--stride-bytes needs --quality", id="strides alone"),
        pytest.param(["--resume"], UsageError, "--resume needs --quality", id="resume alone"),
        pytest.param(
            ["--quality", "no", "--window-bytes", "8", "--stride-bytes", "9"], UsageError, "leaves bytes out", id="gaps"
        ),
        pytest.param(["--prompt-bytes", "many"], UsageError, "--prompt-bytes: 'many' is not a size", id="no number"),
        pytest.param(["--prompt-bytes", "0"], UsageError, "--prompt-bytes must be at least 1", id="empty prompt"),
        pytest.param(["--prompt-bytes", "4k"], UsageError, "do not fit a context of 96 bytes", id="long prompt"),
        pytest.param(["--kv-bits", "5"], UsageError, "--kv-bits must be 4, 8 or 16", id="odd cache bits"),
        pytest.param(["--quality", "no/such"], CorpusError, "no/such: no such file", id="no corpus"),
        pytest.param(["--output", "no/such.json"], OutputError, "the folder no does not exist", id="no folder"),
        pytest.param(["--output", "table.txt"], UsageError, "add --format json, jsonl, csv or md", id="table to a file"),
        pytest.param(["no/such/model"], CheckpointError, "no/such/model: no such file", id="no model"),
    ],
)
def test_what_cannot_be_done_is_said(models, tmp_path, monkeypatch, arguments, error, words):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    quick = [] if "--prompt-bytes" in arguments else QUICK
    result = invoke(models[0], *quick, *arguments)
    assert isinstance(result.exception, error), result.output
    assert words in str(result.exception)
    assert result.stdout == ""
    assert sorted(tmp_path.iterdir()) == before


def test_long_windows_are_refused_before_anything_is_timed(models, tmp_path, monkeypatch):
    monkeypatch.setattr("marlin_cli.bench.run.measure_throughput", lambda *arguments, **options: pytest.fail("timed"))
    (tmp_path / "long").write_bytes(bytes(200))
    result = invoke(models[0], *QUICK, "--quality", tmp_path / "long")
    assert isinstance(result.exception, UsageError)
    assert "--window-bytes: 200 bytes do not fit the context of" in str(result.exception)


def test_a_plan_times_nothing_and_follows_the_bits(models):
    text = run(models[0], "--plan", "--context", "16,32", "--bandwidth", "400").stdout
    assert "attention, pairs" in text and "at 400.0 GB/s" in text and "32 bytes" in text
    weights, stream = (next(line.split()[-1] for line in text.splitlines() if f"memory, bytes: {what}" in line)
                       for what in ("weights", "a stream"))  # fmt: skip
    assert int(weights.replace(",", "")) > int(stream.replace(",", "")) > 0
    rows = {}
    for bits in ("32", "4"):
        lines = run(models[0], "--plan", "--bits", bits, "--bandwidth", "1").stdout.splitlines()
        rows[bits] = next(float(line.split()[-1].replace(",", "")) for line in lines if "read a byte: local " in line)
    assert rows["4"] == pytest.approx(rows["32"] * 4.5 / 32, rel=0.01)


@pytest.mark.skipif(cpu.kernels()[0] is None, reason=f"no CPU kernels here: {cpu.kernels()[1]}")
def test_a_plan_predicts_from_operations_of_this_machine(models, monkeypatch):
    monkeypatch.setattr("marlin_cli.prediction.bandwidth.measure_bandwidth", lambda: Bandwidth(2e12, 1e12))
    monkeypatch.setattr("marlin_cli.bench.throughput.begin", lambda *given: pytest.fail("the model was run"))
    text = run(models[0], "--plan", "--context", "16,32", "--bits", "4", "--device", "cpu").stdout
    rows = {line.split("  ")[0]: line.split()[-2:] for line in text.splitlines() if "predicted, us" in line}
    parts = [float(number.replace(",", "")) for name, (number, _) in rows.items() if not name.endswith("all")]
    assert len(parts) == 7 and sum(parts) == pytest.approx(float(rows["predicted, us: all"][0].replace(",", "")), rel=0.02)
    given = run(models[0], "--plan", "--context", "16", "--bandwidth", "400").stdout
    assert "predicted, us" not in given  # another machine's


def test_the_roofline_is_measured_where_asked_for(models, monkeypatch):
    monkeypatch.setattr("marlin_cli.prediction.roofline.measure_bandwidth", lambda *given, **named: Bandwidth(2e12, 1e12))
    speed = document(models[0], *QUICK, "--roofline")["models"][0]["throughput"]
    result = speed["roofline"]
    assert result["copy_bytes_per_second"] == 2e12 and result["matvec_bytes_per_second"] == {"dense": 1e12}
    assert 0 < result["share"] < 1 and set(result["read_bytes"]) >= {"global", "local", "global cache"}
    told_apart = cpu.kernels()[0] is not None
    if told_apart:
        assert list(result["predicted_seconds_by_part"]) == list(speed["decode_seconds_by_part"])
        assert set(result["bandwidth_reached"]) == set(result["read_bytes"])
    text = run(models[0], *QUICK, "--roofline").stdout
    assert "Roofline of" in text and ("overhead" in text) == told_apart
    rows = list(csv.DictReader(io.StringIO(run(models[0], *QUICK, "--roofline", "--format", "csv").stdout)))
    measures = {row["measure"] for row in rows if row["part"] == "local"}
    told = {"decode_seconds_by_part", "predicted_seconds_by_part", "bandwidth_reached"} if told_apart else set()
    assert measures >= {"read_seconds_by_part", *told}


def test_parts_that_are_not_told_apart_are_unknown(models, monkeypatch):
    monkeypatch.setattr("marlin_cli.prediction.roofline.measure_bandwidth", lambda *given, **named: Bandwidth(2e12, 1e12))
    monkeypatch.setattr("marlin_cli.engine.decoding.fuse", lambda network: None)
    monkeypatch.setattr("marlin_cli.prediction.prediction.kernels", lambda: (None, "none"))
    lines = run(models[0], *QUICK, "--roofline").stdout.splitlines()
    assert [line.split()[-2:] for line in lines if line.startswith("local cache ")][-1] == ["unknown", "unknown"]


def test_contexts_and_batches_are_swept(models):
    result = document(models[0], *QUICK, "--context", "8,16", "--batch", "1,2")
    points = result["models"][0]["throughput"]["sweep"]
    assert [(point["context_bytes"], point["batch"]) for point in points] == [(8, 1), (8, 2), (16, 1), (16, 2)]
    assert "Speed by context" in run(models[0], *QUICK, "--batch", "2").stdout


def test_prompts_and_lengths_of_decoding_are_swept(models):
    arguments = [models[0], "--device", "cpu", "--repeats", "1", "--prompt-bytes", "8,16", "--decode-bytes", "3,5"]
    result = document(*arguments)
    [speed] = [model["throughput"] for model in result["models"]]
    assert (result["throughput_settings"]["prompt_bytes"], speed["decoded_bytes"]) == (8, 3)
    points = [(point["context_bytes"], point["decode_bytes"], point["batch"]) for point in speed["sweep"]]
    assert points == [(8, 3, 1), (8, 5, 1), (16, 3, 1), (16, 5, 1)]
    rows = csv.DictReader(io.StringIO(run(*arguments, "--format", "csv").stdout))
    assert "context 16, decoded 5, batch 1" in {row["part"] for row in rows}


def test_energy_says_why_it_is_unknown(models):
    machine = document(models[0], *QUICK)["machine"]
    assert machine["energy"].startswith(("counted by", "unknown: "))
    assert machine["energy"] in " ".join(run(models[0], *QUICK).stdout.split())


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--roofline", "--no-throughput", "--quality", "x"], "--roofline has no meaning beside --no-throughput"),
        (["--context", "1k", "--no-throughput"], "--context has no meaning beside --no-throughput"),
        (["--batch", "1,x"], "--batch: 'x' is not a size"),
        (["--prompt-bytes", "8,16", "--context", "8"], "--prompt-bytes and --context sweep the same"),
        (["--decode-bytes", "4,0"], "--decode-bytes must be at least 1, found 0"),
        (["--plan", "--context", "1G"], "the model's context is"),
        (["--plan", "--bandwidth", "0"], "--bandwidth must be 0.001 to 1,000,000 GB/s, found 0"),
        (["--plan", "--bandwidth", "1e300"], "--bandwidth must be 0.001 to 1,000,000 GB/s, found 1e+300"),
        (["--plan", "--bits", "3"], "--bits must be 4, 8, 16 or 32, found 3"),
        (["--plan", "--kv-bits", "3"], "--kv-bits must be 4, 8 or 16, found 3"),
        (["--plan", "--k-bits", "4"], "one width for keys and values"),
        (["--against", "megabyte-demo", "--no-throughput"], "--against has no meaning beside --no-throughput"),
    ],
)
def test_options_of_the_plan_and_of_pairs_are_checked(models, arguments, words):
    result = invoke(models[0], *arguments)
    assert isinstance(result.exception, UsageError)
    assert words in str(result.exception)


def test_saved_results_add_up_and_compare(models, tmp_path):
    file = tmp_path / "results.jsonl"
    for _ in range(2):
        run(models[0], *QUICK, "--save", file)
    first, second = (json.loads(line) for line in file.read_text().splitlines())
    [one], [two] = first["models"], second["models"]
    assert len(one["fingerprint"]) == 64 and one["fingerprint"] == two["fingerprint"]
    assert first["machine"]["mlx_version"] and first["taken"]
    text = run("--compare", file, file).stdout
    assert text.count("within noise") == 3


def test_a_comparison_has_every_form(models, tmp_path):
    file = tmp_path / "results.jsonl"
    run(models[0], *QUICK, "--save", file)
    assert len(json.loads(run("--compare", file, file, "--format", "json").stdout)["changes"]) == 3
    result = run("--compare", file, file, "-o", tmp_path / "changes.csv")
    assert result.stdout == "" and (tmp_path / "changes.csv").read_text().count("within noise") == 3


def test_a_file_that_cannot_take_a_line_stays_as_it_was(models, tmp_path, monkeypatch):
    file = tmp_path / "results"
    file.write_bytes(b"{}")
    run(models[0], *QUICK, "--save", file)
    before = file.read_bytes()
    assert before.startswith(b"{}\n{") and before.endswith(b"\n")  # a line that was not ended is not gone on with
    write = os.write
    left = [100]

    def full(descriptor, data):
        """Room for 100 bytes."""
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        part = bytes(data[: left[0]])
        left[0] -= len(part)
        return write(descriptor, part)

    monkeypatch.setattr("marlin_cli.reports.results.os.write", full)
    result = invoke(models[0], *QUICK, "--save", file)
    assert isinstance(result.exception, OutputError) and "results: cannot write: No space left" in str(result.exception)
    assert left == [0] and file.read_bytes() == before
    invoke(models[0], *QUICK, "--save", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_fingerprints_tell_models_apart(models, tmp_path):
    run(*models, *QUICK, "--save", tmp_path / "results")
    first, second = json.loads((tmp_path / "results").read_text())["models"]
    assert first["fingerprint"] != second["fingerprint"]


def test_against_gives_paired_ratios(models):
    text = run(models[1], *QUICK, "--against", models[0], "--seconds", "0").stdout
    assert "median ratio of 2 runs in turn" in text and "95 % interval" in text


def test_pairs_are_timed_for_a_while_unless_told(models, monkeypatch):
    asked = []

    def told(models, settings, **named):
        asked.append(settings.seconds)
        raise UsageError("not timed")

    monkeypatch.setattr("marlin_cli.bench.run.measure_throughput", told)
    for arguments in ([], ["--against", models[0]], ["--against", models[0], "--seconds", "0.5"]):
        assert "not timed" in str(invoke(models[1], *QUICK, *arguments).exception)
    assert asked == [0.0, 15.0, 0.5]


@pytest.mark.parametrize("limit, noisy", [(-1.0, True), (float("inf"), False)])
def test_a_noisy_machine_is_said_to_be_one(models, monkeypatch, limit, noisy):
    monkeypatch.setattr("marlin_cli.bench.noise.NOISY", limit)
    assert ("the machine was noisy" in run(models[0], *QUICK).stderr) == noisy
