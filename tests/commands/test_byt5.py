"""The commands on a small random ByT5, as a user runs them: lines of a pipe, JSONL, beams, packing."""

import base64
import csv
import io
import json
import os
import pty
import subprocess
import sys
import threading
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx.utils import tree_map

from marlin_cli import ByT5Config, ByT5Model, cli, load
from marlin_cli.commands import answering_run
from marlin_cli.commands.prompts import Prompt
from marlin_cli.engine.answer_requests import AnswerLimits
from marlin_cli.engine.beams import Beams
from marlin_cli.engine.sampling import Sampling
from marlin_cli.errors import UsageError

LINES = [b"first", b"", b"\xff\x00 not text", "d\N{LATIN SMALL LETTER E WITH ACUTE}".encode()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = ByT5Config(d_model=64, ffn_dim=64, heads=2, head_dim=32, encoder_layers=2, decoder_layers=1)
    model = ByT5Model.from_config(config, device="cpu")
    mx.random.seed(1)
    model.network.update(tree_map(lambda a: mx.random.normal(a.shape) * a.shape[-1] ** -0.5 * 2, model.network.parameters()))
    path = tmp_path_factory.mktemp("byt5") / "model"
    model.save(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return load(folder, device="cpu")


def marlin(*arguments, stdin=b"", code=0):
    command = [sys.executable, "-m", "marlin_cli", *map(str, arguments)]
    result = subprocess.run(command, input=stdin, capture_output=True, timeout=120)
    assert result.returncode == code, result.stderr
    return result


@pytest.fixture
def inside(monkeypatch, capsys):
    """Run the program in this process, which spares its start: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["marlin", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return run


def test_a_pipe_is_answered_line_by_line_in_order(folder, model):
    output = marlin("generate", folder, "--max-length", 6, "--batch-size", 3, stdin=b"\n".join(LINES)).stdout
    assert output == b"".join(model.generate(line, 6) + b"\n" for line in LINES)


def test_jsonl_with_beams_and_several_answers(folder, model, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt_hex": line.hex(), "id": number}) + "\n" for number, line in enumerate(LINES)))
    output = marlin("generate", folder, "--prompts", file, "--beams", 3, "--n-best", 2, "--max-bytes", 5).stdout
    documents = [json.loads(line) for line in output.splitlines()]
    expected = [each for found in model.answers(LINES, AnswerLimits(5), None, Beams(3, 2)) for each in found]
    assert [(each["id"], each["rank"]) for each in documents] == [(n, r) for n in range(len(LINES)) for r in (0, 1)]
    assert [base64.b64decode(each["bytes_base64"]) for each in documents] == [each.data for each in expected]
    assert [each["score"] for each in documents] == pytest.approx([each.score for each in expected], abs=1e-3)


def test_packing_by_part(folder, tmp_path):
    packed = tmp_path / "packed"
    marlin("quantize", folder, "-o", packed, "--encoder-bits", 4, "--decoder-bits", 8, "--cross-bits", 16)
    table = json.loads((packed / "config.json").read_text())["quantization"]
    modes = {path: (table.get(path, table) or {}).get("mode") for path in (
        "encoder.layers.0.attention.q_proj", "encoder.layers.0.ffn.down_proj",
        "decoder.layers.0.attention.q_proj", "decoder.layers.0.cross.q_proj",
    )}  # fmt: skip
    assert list(modes.values()) == ["nvfp4", "mxfp8", "mxfp8", None]
    assert len(marlin("generate", packed, "-p", "abc", "--max-bytes", 4).stdout) <= 5


def test_options_of_the_other_kind_are_refused(folder):
    assert b"--beams" in marlin("generate", "megabyte-demo", "-p", "a", "--beams", 2, code=2).stderr
    assert b"--import" in marlin("generate", folder, "-p", "a", "--import", "heads=2", code=2).stderr


def test_calibrating_on_pairs_and_spans_then_packing_with_what_was_seen(folder, inside, tmp_path):
    pairs, corpus = tmp_path / "pairs.tsv", tmp_path / "corpus"
    pairs.write_bytes(b"".join(b"source %d\ttarget \xff\n" % number for number in range(5)) + b"s" * 99 + b"\t\n")
    corpus.write_bytes(bytes(range(256)) * 2)
    files = [tmp_path / f"{name}.safetensors" for name in ("pairs", "spans", "both")]
    code, _, err = inside("calibrate", folder, "--pairs", pairs, "--seq-bytes", 64, "--hessian", "-o", files[0])
    assert code == 0 and "1 pair(s) are left out" in err
    spans = ("--corpus", f"code={corpus}", "--seq-bytes", 128, "--span-bytes", 9)
    assert inside("calibrate", folder, *spans, "--hessian", "-o", files[1])[0] == 0
    output = inside("calibrate", "--merge", *files[:2], "-o", files[2], "--json")[1]
    assert json.loads(output)["domains"] == {"code": 512, "pairs": 5 * 16}
    assert "decoder.layers.0.cross K" in inside("calibrate", "--show", files[2])[1]
    for method in ("mse", "awq", "gptq"):
        packed = tmp_path / method
        options = ("--stats", files[2], "--method", method, "--domain-weight", "pairs=1", "-o", packed)
        assert inside("quantize", folder, *options)[0] == 0
        assert json.loads((packed / "config.json").read_text())["marlin"]["method"].startswith(method)


def test_options_of_calibrate_that_contradict(folder, inside, tmp_path):
    (tmp_path / "p.tsv").write_bytes(b"a\tb\n")
    cases = {
        "--pairs has no meaning for megabyte-demo, a model that": (
            "megabyte-demo",
            "--pairs",
            tmp_path / "p.tsv",
        ),
        "--span-bytes has no meaning for megabyte-demo": ("megabyte-demo", "--span-bytes", 3),
        "--corpus has no meaning beside --pairs": (folder, "--pairs", tmp_path / "p.tsv", "--corpus", "default"),
        "--noise-density must be": (folder, "--noise-density", 2),
        "name a .jsonl or .tsv file": (folder, "--pairs", tmp_path / "nowhere.tsv"),
    }
    for message, arguments in cases.items():
        code, out, err = inside("calibrate", *arguments, "-o", tmp_path / "s.safetensors")
        assert code in (1, 2) and out == "" and message in " ".join(err.split()), err


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"source": f"in {n}", "target": "out", "language": "ab"[n % 2]} for n in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_bench_on_pairs(folder, inside, pairs, tmp_path):
    packed = tmp_path / "packed"
    inside("quantize", folder, "-o", packed)
    quick = ("--prompt-bytes", 8, "--decode-bytes", 2, "--repeats", 1, "--device", "cpu")
    code, output, _ = inside("bench", folder, packed, *quick, "--quality", pairs, "--reference", folder, "--format", "json")
    plain, small = json.loads(output)["models"]
    assert code == 0 and [speed["batch_size"] for speed in plain["speeds"]] == [1, 8]
    assert plain["stored_weight_bytes"].keys() == {"encoder", "decoder", "cross", "embeddings", "head"}
    assert sum(small["stored_weight_bytes"].values()) < 0.6 * sum(plain["stored_weight_bytes"].values())
    assert {group: score["pairs"] for group, score in plain["quality"]["groups"].items()} == {"a": 3, "b": 3}
    model = load(folder, device="cpu")
    bits = sum(model.bits(b"in %d" % n, b"out") for n in range(6))
    assert plain["quality"]["all_pairs"]["total_bits"] == pytest.approx(bits, rel=1e-4)
    assert small["quality"]["all_pairs"]["against_reference"]["bits_per_target_byte"]["value"] != 0
    quality = ("--no-throughput", "--quality", pairs, "--device", "cpu")
    table = inside("bench", folder, *quality, "--max-quality-bytes", 25)[1]
    assert "copied" in table and " 3 " in table and "Speed" not in table
    for form, wanted in (("csv", "character_error_rate,a,"), ("md", "| group | pairs |"), ("jsonl", '"exact_match"')):
        assert wanted in inside("bench", folder, *quality, "--format", form)[1]


def test_saved_results_of_bench_compare(folder, inside, pairs, tmp_path):
    arguments = (folder, "--prompt-bytes", 8, "--decode-bytes", 2, "--repeats", 2, "--quality", pairs, "--device", "cpu")
    assert inside("bench", *arguments, "--save", tmp_path / "results")[0] == 0
    [saved] = json.loads((tmp_path / "results").read_text())["models"]
    assert len(saved["fingerprint"]) == 64
    code, output, _ = inside("bench", "--compare", tmp_path / "results", tmp_path / "results", "--format", "csv")
    assert code == 0 and output.count("within noise") == len(output.splitlines()) - 1 == 7


def test_bench_refuses_what_has_no_meaning(folder, inside, pairs):
    quality = ("--no-throughput", "--quality", pairs)
    cases = {
        "measure models of one kind": (folder, "megabyte-demo"),
        "--window-bytes has no meaning": (folder, *quality, "--window-bytes", 9),
        "raise it": (folder, *quality, "--max-quality-bytes", 1),
        "no such file of pairs": (folder, "--no-throughput", "--quality", "nowhere"),
        "leaves nothing": (folder, "--no-throughput"),
    }
    for message, arguments in cases.items():
        code, out, err = inside("bench", *arguments)
        assert code in (1, 2) and out == "" and message in " ".join(err.split()), err


def test_early_stopping_and_what_goes_before_every_input(folder, model, tmp_path):
    """The conventions that fine-tuned models follow; `tests/peers` compares them with transformers."""
    lines = b"one\ntwo\n"
    common = ("--beams", 3, "--n-best", 3, "--max-length", 5, "--length-penalty", 2.0, "--input-prefix", "<eng-us>: ")
    found = {}
    for name, value in (("true", True), ("false", False), ("never", "never")):
        output = marlin("generate", folder, *common, "--early-stopping", name, "--json", stdin=lines).stdout
        found[name] = [json.loads(line) for line in output.splitlines()]
        inputs = [b"<eng-us>: one", b"<eng-us>: two"]
        answers = [each for some in model.answers(inputs, AnswerLimits(5), None, Beams(3, 3, 2.0, value)) for each in some]
        assert [base64.b64decode(each["bytes_base64"]) for each in found[name]] == [each.data for each in answers]
        assert [each["prompt_bytes"] for each in found[name]] == [3] * 6
    assert b"--early-stopping" in marlin("generate", folder, *common, "--early-stopping", "often", code=2).stderr
    assert b"--input-prefix" in marlin("generate", "megabyte-demo", "-p", "a", "--input-prefix", "b", code=2).stderr


def test_a_page_of_a_bench(folder, inside, pairs, tmp_path):
    page = tmp_path / "page.html"
    inside("bench", folder, "--no-throughput", "--quality", pairs, "--report", page)
    assert "character error rate" in page.read_text(encoding="utf-8").lower()


def on_terminal(*arguments):
    """What a terminal is given."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "marlin_cli", *map(str, arguments)], stdout=theirs, stdin=subprocess.DEVNULL
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            block = os.read(ours, 1 << 16)
        except OSError:  # how Linux says that nobody writes any more
            break
        if not block:
            break
        shown += block
    assert process.wait() == 0
    os.close(ours)
    return shown


@pytest.mark.parametrize("way", [(), ("--beams", 2)])
def test_a_terminal_sees_whole_characters_and_no_control_codes(folder, way):
    written = ("generate", folder, "-p", "abc", "--max-bytes", 3, "--prefix", os.fsdecode(b"\x1b[31m \xc3\xa9\xff"), *way)
    shown = on_terminal(*written)
    assert shown.startswith("\ufffd[31m \xe9\ufffd".encode()) and b"\x1b" not in shown and shown.endswith(b"\n")
    assert shown.decode().encode() == shown
    assert on_terminal(*written, "--raw").startswith(b"\x1b[31m \xc3\xa9\xff")


class Written(io.BytesIO):
    """A stream that remembers each flush."""

    def __init__(self):
        super().__init__()
        self.flushed = []

    def flush(self):
        self.flushed.append(self.getvalue())


def test_one_answer_goes_out_byte_by_byte(model, monkeypatch):
    request = answering_run.Request(AnswerLimits(16, 16), Sampling(), None, b"", False, False)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(Written()))
    answering_run.run(model, request, [Prompt(b"abc")], 4)
    flushed = sys.stdout.buffer.flushed
    whole = model.answers([b"abc"], AnswerLimits(16, 16))[0][0].data
    assert flushed[-1] == whole + b"\n"
    assert flushed[:-1] == [whole[: count + 1] for count in range(len(whole))] and len(whole) > 2


def test_a_reader_who_has_enough_is_no_error(folder):
    command = f"{sys.executable} -m marlin_cli generate {folder} -p abc --max-bytes 4000 --min-length 4000 | head -c 5"
    result = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, timeout=120)
    assert (result.returncode, len(result.stdout), result.stderr) == (0, 5, b"")


def test_pairs_of_several_files_and_names_that_would_break_a_table(folder, inside, tmp_path):
    bad, shown = "cs\x1b[31m|\n2", "cs\\x1b[31m| 2"
    (tmp_path / "a.jsonl").write_text(json.dumps({"source": "a", "target": "b", "language": bad}) + "\n")
    (tmp_path / "b.tsv").write_text("a\tb\n")
    mine = f"mine={tmp_path / 'b.tsv'}"
    quality = ("--no-throughput", "--quality", tmp_path / "a.jsonl", "--quality", mine, "--device", "cpu")
    document = json.loads(inside("bench", folder, *quality, "--format", "json")[1])
    assert document["models"][0]["quality"]["groups"].keys() == {shown, "mine"}
    assert document["quality_settings"]["pairs"] == [str(tmp_path / "a.jsonl"), mine]
    for form in ("json", "jsonl", "csv", "md", "table"):
        assert "\x1b" not in inside("bench", folder, *quality, "--format", form)[1]
    text = inside("bench", folder, *quality, "--format", "md")[1]
    assert "| cs\\\\x1b\\[31m\\| 2 |" in text
    rows = [*csv.DictReader(io.StringIO(inside("bench", folder, *quality, "--format", "csv")[1]))]
    assert {row["part"] for row in rows if row["measure"] == "pairs"} == {shown, "mine", "all"}
    code, _, err = inside("bench", folder, *quality, "--quality", tmp_path / "b.tsv")
    assert code == 2 and "is named twice" in err


def test_a_line_too_long_ends_a_pipe_behind_the_answers_before_it(folder):
    """Also where both are of one batch."""
    result = marlin("generate", folder, "--max-bytes", "3", stdin=b"first\n" + b"x" * 40_000 + b"\nthird\n", code=2)
    assert result.stdout == marlin("generate", folder, "--max-bytes", "3", "-p", "first").stdout
    assert result.stderr == b"marlin: stdin: line 2: 40,000 bytes, but the model reads 32,768; give the last ones\n"


def test_input_prefixes_count(folder, inside, tmp_path):
    (tmp_path / "p.jsonl").write_text('"a"\n"' + "x" * 32_760 + '"\n')
    arguments = ("generate", folder, "--max-bytes", "1", "--prompts", tmp_path / "p.jsonl", "--input-prefix", "language: ")
    code, _, err = inside(*arguments)
    assert code == 2 and f"{tmp_path / 'p.jsonl'}: line 2: 32,760 bytes, but the model reads 32,758" in err


@pytest.mark.parametrize("kernels", [True, False])
def test_answers_go_out_in_the_order_of_their_inputs_as_they_come(model, monkeypatch, kernels):
    """The first waits for nobody; of the others some end before those in front of them; an error comes behind them all."""
    if kernels and answering_run.fuse_answers(model.network) is None:
        pytest.skip("no CPU kernels here")
    if not kernels:
        monkeypatch.setattr(answering_run, "fuse_answers", lambda network: None)
    texts = [bytes([65 + n]) * (40 if n % 3 == 0 else 1) for n in range(11)]
    out, seen, first_is_out = io.BytesIO(), [], threading.Event()
    out.flush = first_is_out.set
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=out, isatty=lambda: False))

    def inputs():
        yield Prompt(texts[0])
        seen.append(first_is_out.wait(60))  # the others come when the first is answered
        yield from map(Prompt, texts[1:])
        raise UsageError("no more")

    request = answering_run.Request(
        AnswerLimits(6), Sampling(0.9, seed=3), None, b"in: ", sentinels=False, json=False, raw=True
    )
    with pytest.raises(UsageError, match="no more"):
        answering_run.run(model, request, inputs(), batch_size=3)
    assert seen == [True]
    expected = model.answers([b"in: " + text for text in texts], AnswerLimits(6), Sampling(0.9, seed=3))
    assert out.getvalue() == b"".join(answers[0].data + b"\n" for answers in expected)
