"""Bad input of every kind: one line on stderr that names it, exit 1 or 2, no traceback, nothing written."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from small_networks import FIRST_DEMO

from marlin_cli.files import shipped
from marlin_cli.statistics import Statistics, save_statistics
from marlin_cli.statistics.data import Moments, Run, Totals

DEMO = shipped("configs/models/megabyte-demo")
CONFIG = json.loads((DEMO / "config.json").read_text())


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def pickled(value: bytes) -> bytes:
    """A file of torch.save with this pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", value)
        archive.writestr("archive/version", "3")
    return file.getvalue()


class Call:
    """Pickles as a call of os.system."""

    def __reduce__(self):
        return os.system, ("touch canary",)


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
WEIGHTS = {
    "truncated": lambda: (DEMO / "model.safetensors").read_bytes()[:5_000_000],
    "header cut": lambda: (DEMO / "model.safetensors").read_bytes()[:100],
    "empty": lambda: b"",
    "wrong magic": lambda: b"GGUF" + bytes(100),
    "huge header": lambda: struct.pack("<Q", 1 << 60) + b"{}",
    "overlapping offsets": lambda: safetensors({"a": ONE, "b": {**ONE, "data_offsets": [4, 12]}}, bytes(12)),
    "offsets beyond the end": lambda: safetensors({"a": {**ONE, "data_offsets": [0, 800]}}, bytes(8)),
    "negative shape": lambda: safetensors({"a": {**ONE, "shape": [-2]}}, bytes(8)),
    "unknown dtype": lambda: safetensors({"a": {**ONE, "dtype": "Q9"}}, bytes(8)),
    "shape and offsets disagree": lambda: safetensors({"a": {**ONE, "shape": [3]}}, bytes(8)),
    "header is a list": lambda: safetensors([1, 2]),
    "header is not JSON": lambda: struct.pack("<Q", 4) + b"{{{{",
    "other tensors": lambda: safetensors({"a": ONE}, bytes(8)),
}
CONFIGS = {
    "config is not JSON": "{,}",
    "config is a list": "[1]",
    "config is empty": "",
    "unknown key": json.dumps({**CONFIG, "global_dims": 256}),
    "wrong type": json.dumps({**CONFIG, "patch_size": "8"}),
    "zero heads": json.dumps({**CONFIG, "global_heads": 0}),
    "another width": json.dumps({**CONFIG, "local_dim": 64}),
    "another architecture": json.dumps({**CONFIG, "model_type": "gpt2"}),
    "quantization is a number": json.dumps({**CONFIG, "quantization": 4}),
    "deeply nested": "[" * 100_000,
}
PICKLES = {
    "os.system": lambda: pickled(pickle.dumps({"a": Call()})),
    "builtins.eval": lambda: pickled(b"c__builtin__\neval\n(Vopen('canary','w')\ntR."),
    "inst opcode": lambda: pickled(b"(Vtouch canary\nios\nsystem\n."),
    "not a pickle": lambda: pickled(b"\x80\x04garbage"),
    "a number": lambda: pickled(pickle.dumps(7)),
    "no tensors": lambda: pickled(pickle.dumps({"a": 1})),
    "a zip without a pickle": lambda: zip_of({"x": b"y"}),
    "a bare pickle": lambda: pickle.dumps({"a": Call()}),
    "a broken zip": lambda: pickled(pickle.dumps({}))[:40],
}


def zip_of(entries):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return file.getvalue()


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*arguments, names, code=1, stdin=b""):
    before = sorted(str(path) for path in Path().rglob("*"))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "80"}
    result = subprocess.run(
        [sys.executable, "-m", "marlin_cli", *map(str, arguments)],
        input=stdin, capture_output=True, timeout=120, env=environment,
    )  # fmt: skip
    error = result.stderr.decode()
    assert result.returncode == code, error
    assert result.stdout == b"" and "Traceback" not in error
    assert error.startswith("marlin: ") and error.count("\n") == 1, error
    assert names in error, error
    assert sorted(str(path) for path in Path().rglob("*")) == before


def model(folder: Path, config: str | None = None, weights: bytes | None = None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG) if config is None else config)
    if weights is None:
        (folder / "model.safetensors").symlink_to(DEMO / "model.safetensors")
    else:
        (folder / "model.safetensors").write_bytes(weights)
    return folder


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights(workplace, kind):
    model(workplace / "bad", weights=WEIGHTS[kind]())
    refused("generate", "bad", "-p", "x", names="bad")


@pytest.mark.parametrize("kind", CONFIGS)
def test_configurations(workplace, kind):
    model(workplace / "bad", config=CONFIGS[kind])
    refused("quantize", "bad", "-o", "out", names="bad")


@pytest.mark.parametrize("kind", PICKLES)
def test_pickles(workplace, kind):
    (workplace / "bad.pt").write_bytes(PICKLES[kind]())
    refused("generate", "bad.pt", "-p", "x", names="bad.pt")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(workplace, value):
    folder = model(workplace / "bad", weights=b"")
    save_file({"output.weight": np.full((256, 128), value, dtype=np.float32)}, folder / "model.safetensors")
    refused("generate", "bad", "-p", "x", names="'output.weight' holds NaN or infinity")


@pytest.mark.parametrize(
    ("index", "names"),
    [
        ({"weight_map": {"a": "model-1.safetensors"}}, "the shard 'model-1.safetensors' is missing"),
        ({"weight_map": {"a": "../other.safetensors"}}, "lies outside the folder"),
        ({"weight_map": 3}, "no table weight_map"),
        ([], "no table weight_map"),
    ],
)
def test_shards(workplace, index, names):
    folder = model(workplace / "bad")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("generate", "bad", "-p", "x", names=names)


CASES = {
    "no such model": (["generate", "nowhere"], 1, "nowhere: no such file, folder or shipped model"),
    "a misspelt model": (["generate", "megabyte-dem"], 1, "did you mean 'megabyte-demo'?"),
    "a folder without a model": (["generate", "folder", "-p", "x"], 1, "folder: expected config.json"),
    "a missing prompt file": (["generate", "--prompt-file", "none"], 2, "none: cannot read"),
    "a folder as a prompt": (["generate", "--prompt-file", "folder"], 2, "folder: cannot read"),
    "two prompts": (["generate", "-p", "a", "--hex", "00"], 2, "--prompt has no meaning beside --hex"),
    "odd hexadecimal": (["generate", "--hex", "0"], 2, "--hex: '0' is not hexadecimal"),
    "an empty stop": (["generate", "-p", "x", "--stop", ""], 2, "a stop sequence is empty"),
    "a size that is none": (["generate", "-p", "x", "--max-bytes", "ten"], 2, "--max-bytes: 'ten' is not a size"),
    "a negative temperature": (["generate", "-p", "x", "--temperature", "-1"], 2, "temperature must be 0 or more"),
    "a negative seed": (["generate", "-p", "x", "--seed", "-1"], 2, "seed must be 0 or more and fit 64 bits"),
    "a seed beyond 64 bits": (["generate", "-p", "x", "--seed", str(1 << 64)], 2, "fit 64 bits"),
    "no group": (["quantize", "megabyte-demo", "-o", "x", "--group-size", "0"], 1, "group_size must be one of 32, 64, 128"),
    "a budget of nothing": (["quantize", "megabyte-demo", "-o", "x", "--target-bpw", "0"], 1, "a number above 0, found 0"),
    "a budget that is none": (["quantize", "megabyte-demo", "-o", "x", "--target-bpw", "nan"], 2, "finite number, found nan"),
    "a weight that rich would draw": (["calibrate", "-o", "new.safetensors", "--corpus", "x=long:-1"], 1, "x=long:-1: the w"),
    "a column of numbers": (["calibrate", "-o", "new.safetensors", "--corpus", "n.jsonl"], 1, "no column holds text"),
    "a number that is none": (["generate", "--top-k", "many"], 2, "'--top-k'"),
    "an unknown option": (["generate", "--colour"], 2, "--colour"),
    "an unknown command": (["translate"], 2, "translate"),
    "another device": (["generate", "-p", "x", "--device", "tpu"], 2, "--device 'tpu' is not one of"),
    "odd cache bits": (["generate", "-p", "x", "--kv-bits", "5"], 2, "--kv-bits must be 4, 8 or 16"),
    "a prompt beyond the context": (["generate", "--prompt-file", "long"], 2, "long: 40,000 bytes, but the model"),
    "prompts that are not JSON": (["generate", "--prompts", "long"], 2, "long: line 1: is not JSON"),
    "no prompts": (["generate", "--prompts", "empty"], 2, "empty: no prompts"),
    "an import option for marlin's own layout": (["generate", "-p", "x", "--import", "heads=4"], 1, "heads"),
    "an unknown import option": (["generate", "-p", "x", "--import", "head=4"], 2, "did you mean 'heads'?"),
    "an import option without a value": (["generate", "-p", "x", "--import", "heads"], 2, "is not NAME=VALUE"),
    "no output": (["quantize", "megabyte-demo"], 2, "--output is missing"),
    "an output that is there": (["quantize", "megabyte-demo", "-o", "folder"], 1, "folder: already exists"),
    "an output nowhere": (["quantize", "megabyte-demo", "-o", "a/b"], 1, "the folder a does not exist"),
    "an output that is a file": (["quantize", "megabyte-demo", "-o", "empty", "--overwrite"], 1, "empty: is a file"),
    "odd bits": (["quantize", "megabyte-demo", "-o", "x", "--global-bits", "3"], 2, "bits must be 4, 8 or 16"),
    "an unknown format": (["quantize", "megabyte-demo", "-o", "x", "--local-format", "nvfp5"], 1, "mean 'nvfp4'?"),
    "bits against a format": (
        ["quantize", "megabyte-demo", "-o", "x", "--global-bits", "8", "--global-format", "nvfp4"], 2, "contradict"
    ),
    "an override without a format": (["quantize", "megabyte-demo", "-o", "x", "--override", "a"], 2, "REGEX=FORMAT"),
    "an override that matches nothing": (
        ["quantize", "megabyte-demo", "-o", "x", "--override", "zzz=int4"], 1, "matches no layer"
    ),
    "an override that is no expression": (
        ["quantize", "megabyte-demo", "-o", "x", "--override", "(=int4"], 1, "not a regular expression"
    ),
    "the head in an override": (
        ["quantize", "megabyte-demo", "-o", "x", "--override", "^output$=int8"], 1, "the output head stays as it is"
    ),
    "an unknown recipe": (["quantize", "megabyte-demo", "-o", "x", "--recipe", "balance"], 1, "'balanced'?"),
    "statistics that are not there": (["quantize", "megabyte-demo", "-o", "x", "--stats", "no"], 1, "no: no such file"),
    "statistics that are none": (["quantize", "megabyte-demo", "-o", "x", "--stats", "long"], 1, "long: "),
    "nothing to unpack": (["quantize", "megabyte-demo", "-o", "x", "--dequantize"], 1, "no layer of the model is packed"),
    "a corpus that is not there": (
        ["calibrate", "-o", "new.safetensors", "--corpus", "nothing/here"], 1, "nothing/here: no such file"
    ),
    "a corpus of nobody": (["calibrate", "-o", "new.safetensors", "--corpus", "~nobody-x/y"], 1, "~nobody-x/y: no such file"),
    "statistics of another model": (
        ["quantize", "byt5-demo", "-o", "x", "--stats", "s.safetensors"], 1, "s.safetensors: the statistics hold no layer"
    ),
    "an empty corpus": (["calibrate", "-o", "new.safetensors", "--corpus", "empty"], 1, "empty: holds no bytes"),
    "an empty folder": (["calibrate", "-o", "new.safetensors", "--corpus", "folder"], 1, "folder: holds no bytes"),
    "a corpus on the hub, offline": (["calibrate", "-o", "new.safetensors", "--corpus", "hf:a/b"], 1, "hf:a/b: "),
    "statistics into nowhere": (["calibrate", "-o", "a/s.safetensors", "--max-bytes", "1k"], 1, "the folder a does not"),
    "an odd shard": (["calibrate", "-o", "new.safetensors", "--shard", "2/2"], 2, "--shard"),
    "statistics to show that are none": (["calibrate", "--show", "long"], 1, "long: "),
    "an unknown report": (["bench", "--format", "xml"], 2, "xml"),
    "bench of nothing": (["bench", "--no-throughput"], 2, "--quality"),
    "quality of nothing": (["bench", "--no-throughput", "--quality", "nothing"], 1, "nothing: no such file"),
    "a reference without bytes": (["bench", "--reference", "megabyte-demo"], 2, "--quality"),
}  # fmt: skip


# Of a model with one layer.
_MOMENTS = Moments(np.ones((1, 1), np.int64), np.ones((1, 1, 4)), np.ones((1, 1, 4), np.float32))
STATISTICS = Statistics(
    "m" * 64, {"layer": "layer"}, (Run("c" * 64, 1, 0, None),), Totals({"code": 1}, {"layer": _MOMENTS}, {}, {})
)


@pytest.mark.parametrize("kind", CASES)
def test_commands(workplace, kind):
    (workplace / "folder").mkdir()
    (workplace / "empty").write_bytes(b"")
    (workplace / "long").write_bytes(b"x" * 40_000)
    (workplace / "n.jsonl").write_bytes(b'{"text": 5}\n')
    save_statistics(workplace / "s.safetensors", STATISTICS)
    arguments, code, names = CASES[kind]
    refused(*arguments, names=names, code=code)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(workplace):
    (workplace / "closed").mkdir(mode=0o500)
    refused("quantize", "megabyte-demo", "-o", "closed/out", names="no permission")


def test_a_full_disk(workplace):
    """A small limit on the size of files stands for a full disk: the write fails half-way."""
    script = f"ulimit -f 1000; trap '' XFSZ; '{sys.executable}' -m marlin_cli quantize '{FIRST_DEMO}' -o out"
    result = subprocess.run(["bash", "-c", script], capture_output=True, timeout=120)
    error = result.stderr.decode()
    assert result.returncode == 1 and error.startswith("marlin: out: cannot write") and error.count("\n") == 1, error
    assert list(workplace.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="the system has no /dev/full")
@pytest.mark.parametrize(
    "arguments",
    [
        ["--version"],
        ["generate", "-p", "x", "--max-bytes", "9"],
        ["generate", "-p", "x", "--max-bytes", "9", "--json"],
        ["bench", "--kernels"],
    ],
)
def test_a_full_disk_behind_stdout(workplace, arguments):
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "marlin_cli", *arguments]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=120)
    # Where there is no compiler, a note about the kernels stands before it.
    lines = [line for line in result.stderr.splitlines() if not line.startswith(b"CPU kernels are not there")]
    assert (result.returncode, lines) == (1, [b"marlin: cannot write the output: No space left on device"])


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_streams(workplace, closed):
    """No file that is opened takes the place of a stream."""
    script = f"'{sys.executable}' -m marlin_cli generate megabyte-demo -p x --max-bytes 9 {closed}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, timeout=120)
    assert result.returncode == 0 and b"marlin: " not in result.stderr, result.stderr
    assert len(result.stdout) == (0 if closed == ">&-" else 9)
