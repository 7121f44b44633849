"""`marlin encode` on small random models: lines for positions and texts, .npy and .safetensors, what is refused."""

import json
import os
import signal
import subprocess
import sys
import threading

import mlx.core as mx
import numpy as np
import pytest
from canine_cases import random_canine, random_la_canine
from mlx.utils import tree_map
from safetensors.numpy import load_file

from marlin_cli import ByT5Config, ByT5Model, EncodingModel, cli, load
from marlin_cli.commands import encode_run
from marlin_cli.commands.json_lines import write_line
from marlin_cli.commands.prompts import Prompt
from marlin_cli.commands.texts import Text
from marlin_cli.commands.vector_files import writing_vectors
from marlin_cli.errors import CheckpointError, UsageError
from marlin_cli.ops.device import choose_device

TEXTS = ["Kůň a\N{COMBINING ACUTE ACCENT}.", "東京 𝔘𝔫𝔦\x1b[31m", "plain text"]
STDIN = "\n".join(TEXTS).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, device = tmp_path_factory.mktemp("models"), choose_device("cpu")
    EncodingModel(random_canine(), device).save(path / "characters")
    EncodingModel(random_canine(pooler=False), device).save(path / "no pooler")
    EncodingModel(random_la_canine(adapter_dim=32, language="cs"), device).save(path / "splits")
    sizes = {"d_model": 32, "ffn_dim": 32, "heads": 1, "head_dim": 32, "encoder_layers": 1}
    for name, layers in (("bytes", 0), ("answers", 1)):
        model = ByT5Model.from_config(ByT5Config(**sizes, decoder_layers=layers), device="cpu")
        mx.random.seed(1)
        model.network.update(tree_map(lambda a: mx.random.normal(a.shape) * a.shape[-1] ** -0.5, model.network.parameters()))
        model.save(path / name)
    return path


@pytest.fixture
def encode(folder, monkeypatch, capfdbinary, tmp_path):
    """Run the program in this process, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(model, *arguments, stdin=b""):
        read, write = os.pipe()
        os.write(write, stdin)
        os.close(write)
        monkeypatch.setattr(sys, "argv", ["marlin", "encode", str(folder / model), *map(str, arguments)])
        before = set(threading.enumerate())
        with open(read) as piped:
            monkeypatch.setattr(sys, "stdin", piped)
            with pytest.raises(SystemExit) as caught:
                cli.main()
            # Else one that still reads, after an error, would read the next test's pipe under the same number.
            for reader in set(threading.enumerate()) - before:
                reader.join(timeout=1)
        captured = capfdbinary.readouterr()
        return caught.value.code, captured.out, captured.err.decode()

    return run


def objects(result):
    code, out, err = result
    assert (code, err) == (0, "") and out.isascii()
    return [json.loads(line) for line in out.splitlines()]


def states_of(folder, name, text):
    model = load(folder / name, device="cpu")
    return np.array(model.encode(text, marks=True) if name in ("bytes", "answers") else model.encode(text))


@pytest.mark.parametrize("name", ["characters", "splits", "bytes", "answers"])
def test_a_line_for_each_position_says_what_it_stands_for(encode, folder, name):
    found = objects(encode(name, stdin=STDIN))
    for index, text in enumerate(TEXTS):
        data, own = text.encode(), [each for each in found if each["index"] == index]
        assert [each["position"] for each in own] == [*range(len(own))]
        assert np.allclose([each["state"] for each in own], states_of(folder, name, data), atol=1e-5)
        marks = {"characters": ["[CLS]", "[SEP]"], "splits": []}.get(name, ["</s>"])
        assert [each["mark"] for each in own if "mark" in each] == marks
        places = [each for each in own if "mark" not in each]
        assert b"".join(data[each["first_byte"] : each["end_byte"]] for each in places) == data
        for each in places:
            character = text[each["first_character"] : each["end_character"]]
            assert len(character) == 1 and data[each["first_byte"] : each["end_byte"]] in character.encode()


def test_vectors_of_texts(encode, folder):
    for name, pool in (("characters", "mean"), ("characters", "pooler"), ("splits", "mean"), ("bytes", "mean")):
        found = objects(encode(name, "--pool", pool, stdin=STDIN))
        model = load(folder / name, device="cpu")
        for text, each in zip(TEXTS, found, strict=True):
            data = text.encode()
            wanted = model.pooled(data) if pool == "pooler" or name == "bytes" else model.encode(data).mean(axis=0)
            assert np.allclose(each["vector"], np.array(wanted), atol=1e-5)
            assert (each["bytes"], each["characters"]) == (len(data), len(text))


def test_an_input_of_no_bytes_and_one_that_is_no_text(encode):
    (empty,) = objects(encode("bytes", "-p", "", "--pool", "mean"))
    assert empty["bytes"] == 0 and len(empty["vector"]) == 32  # its end has a state
    found = objects(encode("bytes", "--hex", "ff61"))
    assert [each.get("first_character") for each in found] == [None] * 3
    assert [each.get("first_byte") for each in found] == [0, 1, None]


def test_padding_and_the_type_change_states(encode, folder):
    plain, padded, rough = (
        np.array([each["state"] for each in objects(encode("characters", "-p", "abcd", *more))])
        for more in ((), ("--pad-to", "64"), ("--dtype", "bfloat16"))
    )
    assert plain.shape == padded.shape == (6, 32)
    assert np.abs(plain - padded).max() > 0.01
    assert 1e-5 < np.abs(plain - rough).max() < 0.5


def test_files_of_arrays(encode, folder):
    for size in (1, 16):
        assert encode("characters", "--pool", "pooler", "-o", "v.npy", "--batch-size", size, stdin=STDIN) == (0, b"", "")
        vectors = np.load("v.npy")
        assert encode("characters", "--pool", "pooler", "-o", "v.safetensors", stdin=STDIN)[0] == 0
        assert np.allclose(load_file("v.safetensors")["vectors"], vectors, atol=1e-5)
        assert vectors.shape == (3, 32) and vectors.dtype == np.float32
        assert encode("characters", "-o", "s.safetensors", "--batch-size", size, stdin=STDIN)[0] == 0
        states = load_file("s.safetensors")
        for index, text in enumerate(TEXTS):
            assert np.allclose(states[str(index)], states_of(folder, "characters", text.encode()), atol=1e-5)
    assert encode("bytes", "-p", TEXTS[0], "-o", "one.npy")[0] == 0
    assert np.allclose(np.load("one.npy"), states_of(folder, "bytes", TEXTS[0].encode()), atol=1e-5)
    assert sorted(os.listdir()) == ["one.npy", "s.safetensors", "v.npy", "v.safetensors"]


def test_what_is_written_is_whole_or_not_there(encode):
    for arguments, stdin, message in (
        (("-o", "s.npy"), STDIN, "s.npy: .npy holds the states of one text, and there are more"),
        (("-o", "s.safetensors"), STDIN + b"\n\xff", "stdin: line 4: is not UTF-8"),
        (("-o", "s.safetensors"), b"", "s.safetensors: there is no text to encode"),
        (("-o", "s.bin"), STDIN, "--output s.bin: arrays are written as .npy or .safetensors"),
        (("-o", "nowhere/s.npy"), STDIN, "nowhere/s.npy: the folder nowhere does not exist"),
    ):
        code, out, err = encode("characters", *arguments, stdin=stdin)
        assert code in (1, 2) and out == b"" and err.count("\n") == 1 and message in err, err
        assert os.listdir() == []


def test_what_is_refused_is_one_line(encode):
    for model, arguments, message in (
        ("bytes", ("-p", "a", "--pool", "pooler"), "--pool pooler: the model has none; its vectors are means of its states"),
        ("splits", ("-p", "a", "--pool", "pooler"), "LA-CANINE has no pooler"),
        ("no pooler", ("-p", "abcd", "--pool", "pooler"), "this CANINE has no pooler"),
        (
            "characters",
            ("-p", "a" * 20, "--pad-to", "8"),
            "22 positions with its marks, and pad_to (--pad-to) is 8",
        ),
        ("characters", ("--prompts", "nowhere"), "nowhere: cannot read"),
        ("splits", ("-p", "a", "--language", "de"), "holds the adapters of 'cs', 'de' was asked for"),
    ):
        code, out, err = encode(model, *arguments)
        assert code in (1, 2) and out == b"" and err.count("\n") == 1 and message in err, err


@pytest.mark.parametrize("pool", ["none", "mean", "pooler"])
def test_a_text_that_is_too_short_is_padded(encode, folder, pool):
    found = objects(encode("characters", "--pool", pool, stdin=b"abcd\n\na"))
    assert {each["index"]: each.get("padded_to") for each in found} == {0: None, 1: 4, 2: 4}
    model = load(folder / "characters", device="cpu")
    for index, (text, pad_to) in enumerate(((b"abcd", None), (b"", 4), (b"a", 4))):
        states = model.encode(text, pad_to=pad_to)
        own = [each for each in found if each["index"] == index]
        if pool == "none":
            assert np.allclose([each["state"] for each in own], np.array(states), atol=1e-5)
        else:
            wanted = states.mean(axis=0) if pool == "mean" else model.pooled(text, pad_to=pad_to)
            assert np.allclose(own[0]["vector"], np.array(wanted), atol=1e-5)


def test_an_empty_text_without_marks_has_no_states_and_a_row_of_vectors(encode):
    vectors = [each["vector"] for each in objects(encode("splits", "--pool", "mean", stdin=b"ab\n\nab"))]
    assert vectors[0] == vectors[2] != vectors[1] == [0.0] * 32
    assert {each["index"] for each in objects(encode("splits", stdin=b"ab\n\nab"))} == {0, 2}


def test_states_that_are_no_numbers_are_an_error(folder):
    model = load(folder / "bytes", device="cpu")
    model.network.encoder.norm.weight = mx.full((32,), float("inf"))
    with pytest.raises(CheckpointError, match="here: the states that the model gives are not finite"):
        encode_run.run(model, [Text(Prompt(b"abcd", where="here"))], encode_run.Request("mean", None, 1, None))


def test_numbers_are_written_in_digits_that_give_them_back(capfdbinary):
    numbers = np.array([0.1, 1e-30, -3.4e38, 1 / 3, 0, 16777216], dtype=np.float32)
    write_line({"a": "é"}, x=numbers)
    out = capfdbinary.readouterr().out
    assert out.isascii() and out.startswith(b'{"a": "\\u00e9", "x": [0.1, ')
    assert np.array_equal(np.array(json.loads(out)["x"], dtype=np.float32), numbers)


def test_more_arrays_than_a_file_has_names_for(monkeypatch, tmp_path):
    monkeypatch.setattr("marlin_cli.commands.vector_files.MOST_ARRAYS", 2)
    with (
        pytest.raises(UsageError, match="holds the states of 2 texts"),
        writing_vectors(tmp_path / "a.safetensors", stacked=False) as file,
    ):
        for _ in range(3):
            file.add(np.zeros((1, 2), dtype=np.float32))


def test_a_slow_pipe_has_its_answers_and_a_signal_ends_it(folder):
    command = [sys.executable, "-m", "marlin_cli", "encode", str(folder / "bytes"), "--pool", "mean"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as job:
        job.stdin.write(b"abc\n")
        job.stdin.flush()
        assert json.loads(job.stdout.readline())["bytes"] == 3
        job.send_signal(signal.SIGTERM)
        assert job.stderr.read() == b""
    assert job.returncode == 143
