"""`marlin bench` of models that encode texts, as a user runs it: speed by shape, a comparison, every form, what is refused."""

import csv
import io
import json
import os
import sys

import pytest
from canine_cases import random_canine, random_la_canine

from marlin_cli import EncodingModel, cli
from marlin_cli.ops.device import choose_device


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, device = tmp_path_factory.mktemp("models"), choose_device("cpu")
    model = EncodingModel(random_canine(layers=1, head="token", labels=("O", "A")), device)
    model.save(path / "model")
    model.quantize(8, 8).save(path / "packed")
    EncodingModel(random_la_canine(layers=1, adapter_dim=32, language="cs"), device).save(path / "splits")
    (path / "text").write_bytes("Příliš žluťoučký kůň. ".encode() * 20)
    (path / "binary").write_bytes(bytes(range(256)) * 2)
    return path


@pytest.fixture
def bench(folder, monkeypatch, capfd):
    """Run the program in this process, among the models: (exit code, stdout, stderr)."""
    monkeypatch.chdir(folder)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["marlin", "bench", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", open(os.devnull))
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capfd.readouterr()
        return caught.value.code, captured.out, captured.err

    return run


SHORT = ("--prompt-bytes", "8,16", "--batch", "1,2", "--repeats", "1")
COMPARED = ("--quality", "text", "--reference", "model", "--window-bytes", "100", "--max-quality-bytes", "400")


def test_speed_and_a_comparison(bench):
    code, out, err = bench("model", "packed", *SHORT, *COMPARED, "--format", "json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["quality_settings"] == {
        "corpora": ["text"], "window_bytes": 100, "max_bytes": 400, "reference": "model",
    }  # fmt: skip
    plain, packed = document["models"]
    shapes = [(speed["prompt_characters"], speed["batch_size"]) for speed in packed["speeds"]]
    assert shapes == [(8, 1), (8, 2), (16, 1), (16, 2)]
    assert plain["quality"]["all_domains"]["states_error"]["value"] == 0
    assert 0 < packed["quality"]["all_domains"]["states_error"]["value"] < 0.3
    assert packed["quality"]["all_domains"]["texts"] == 4
    assert sum(packed["stored_weight_bytes"].values()) < sum(plain["stored_weight_bytes"].values())


def test_every_form(bench, tmp_path):
    code, out, err = bench("packed", *SHORT, *COMPARED)
    assert (
        (code, err) == (0, "") and "2 x 16 characters" in out and "error of states, %" in out and "packed beside model" in out
    )
    rows = list(csv.DictReader(io.StringIO(bench("packed", *SHORT, *COMPARED, "--format", "csv")[1])))
    assert {"characters_per_second", "states_error", "states_cosine", "equal_labels"} <= {row["measure"] for row in rows}
    assert "batch 2, characters 16" in {row["part"] for row in rows}
    page, saved = tmp_path / "page.html", tmp_path / "saved.jsonl"
    code, out, _ = bench("packed", *SHORT, *COMPARED, "--format", "md", "--report", page, "--save", saved)
    assert code == 0 and out.startswith("Machine") and "| --- |" in out
    assert "Characters per second" in page.read_text() and json.loads(saved.read_text())["models"][0]["fingerprint"]
    code, out, _ = bench("--compare", saved, saved)
    assert code == 0 and "characters_per_second, batch 2, characters 16" in out


def test_windows_that_are_no_text_are_left_out(bench):
    options = ("--no-throughput", "--quality", "text", "--quality", "other=binary", "--reference", "model", "--format", "json")
    code, out, err = bench("model", *options)
    assert code == 0 and "--window-bytes 2048 is cut to 254" in err and "window(s) are left out" in err
    assert json.loads(out)["quality_settings"]["window_bytes"] == 254


def test_what_is_refused_is_one_line(bench):
    for arguments, message in (
        (("model", "--no-throughput", "--quality", "text"), "compares models that encode texts with another"),
        (("model", *SHORT, "--quality", "binary", "--reference", "model"), "--quality: no text to compare models on"),
        (("model", *SHORT, "--quality", "text", "--reference", "splits"), "--reference: model_type is la_canine there"),
        (("model", "byt5-demo"), "measure models of one kind together"),
        (("model", "--plan"), "--plan has no meaning for model, a model that encodes texts"),
        (("model", "--prompt-bytes", "1k"), "--prompt-bytes 1024: a text has 4 to 256 characters here"),
        (("model", "--language", "cs"), "--language has no meaning for model; it is for one that finds the ends"),
        (("splits", "--language", "de"), "holds the adapters of 'cs', 'de' was asked for"),
        (("model", "--no-throughput"), "leaves nothing to measure"),
    ):
        code, out, err = bench(*arguments)
        assert code in (1, 2) and out == "" and message in err.splitlines()[-1] and err.count("marlin: ") == 1, err


@pytest.mark.parametrize("limit, noisy", [(-1.0, True), (float("inf"), False)])
def test_a_noisy_machine_is_said_to_be_one(bench, monkeypatch, limit, noisy):
    monkeypatch.setattr("marlin_cli.bench.noise.NOISY", limit)
    code, _, err = bench("model", *SHORT)
    assert code == 0 and ("the machine was noisy: the middle half of the speeds spans" in err) == noisy
