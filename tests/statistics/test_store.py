"""Statistics files: what is written comes back, and what is damaged is refused in one line that names the file."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from marlin_cli.errors import OutputError, StatisticsError
from marlin_cli.models import shared_inputs
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.statistics import Statistics, load_statistics, save_statistics
from marlin_cli.statistics.collect import measure
from marlin_cli.statistics.data import Run, pool
from marlin_cli.statistics.store import METADATA_KEY, load_unfinished, save_unfinished

STATE = {"windows": 3, "stream": {"rng": [1, 2, None], "deep": {"x": True}}}


@pytest.fixture
def statistics(network: MegaByte) -> Statistics:
    data = np.arange(64, dtype=np.uint8)
    totals = pool(measure(network, "code", data[:32]), measure(network, "binary", data[20:64]))
    return Statistics("f" * 64, shared_inputs(network), (Run("c" * 64, 32, 7, 4096, 1, 3),), totals)


def test_what_is_saved_comes_back(statistics: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_statistics(path, statistics)
    found = load_statistics(path)
    assert (found.model, found.runs) == (statistics.model, statistics.runs)
    assert (found.layers, dict(found.domains)) == (statistics.layers, {"binary": 44, "code": 32})
    for kind in ("inputs", "keys", "values"):
        before, after = getattr(statistics.totals, kind), getattr(found.totals, kind)
        assert before.keys() == after.keys()
        for name, moments in before.items():
            for field in ("count", "sum_squares", "absolute_maximum"):
                np.testing.assert_array_equal(getattr(after[name], field), getattr(moments, field))
                assert getattr(after[name], field).dtype == getattr(moments, field).dtype


def test_equal_statistics_are_equal_files(statistics: Statistics, tmp_path: Path) -> None:
    save_statistics(tmp_path / "a.safetensors", statistics)
    save_statistics(tmp_path / "b.safetensors", load_statistics(tmp_path / "a.safetensors"))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_an_unfinished_run_keeps_its_corpus_state(statistics: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors.partial"
    save_unfinished(path, statistics, STATE)
    found, state = load_unfinished(path)
    assert state == STATE
    assert found.total_bytes == 76
    with pytest.raises(StatisticsError, match="unfinished run; finish it with marlin calibrate --resume"):
        load_statistics(path)
    save_statistics(path, statistics)
    with pytest.raises(StatisticsError, match="finished run; there is nothing"):
        load_unfinished(path)


def test_an_unwritable_place(statistics: Statistics, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"no/a\.safetensors: cannot write"):
        save_statistics(tmp_path / "no" / "a.safetensors", statistics)


def rewritten(
    path: Path, arrays: Callable[[dict], None] = lambda _: None, header: Callable[[dict], None] = lambda _: None
) -> None:
    """Change the arrays or the header of a file in place."""
    with safe_open(path, framework="numpy") as file:
        document = json.loads(file.metadata()[METADATA_KEY])
    tensors = load_file(path)
    arrays(tensors)
    header(document)
    save_file(tensors, path, {METADATA_KEY: json.dumps(document)})


SUMS = "inputs.output.sum_squares"


def spoil(value: float) -> Callable[[dict], None]:
    return lambda arrays: arrays[SUMS].__setitem__((0, 0, 0), value)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "no such file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is a folder"),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged"),
    "cut in the header": (lambda path: path.write_bytes(path.read_bytes()[:300]), "damaged"),
    "not safetensors": (lambda path: path.write_bytes(b"PK\x03\x04" * 100), "damaged"),
    "a model": (lambda path: save_file({"weight": np.zeros(3)}, path), "not statistics"),
    "metadata not JSON": (lambda path: save_file({}, path, {METADATA_KEY: "{"}), "not JSON"),
    "metadata too deep": (lambda path: save_file({}, path, {METADATA_KEY: "[" * 100000}), "not JSON"),
    "metadata a list": (lambda path: save_file({}, path, {METADATA_KEY: "[]"}), "format version None"),
    "a later version": (lambda path: rewritten(path, header=lambda h: h.update(version=2)), "version 2"),
    "an unknown key": (lambda path: rewritten(path, header=lambda h: h.update(modle="x")), "did you mean 'model'"),
    "a missing key": (lambda path: rewritten(path, header=lambda h: h.pop("runs")), "missing key 'runs'"),
    "bytes as text": (lambda path: rewritten(path, header=lambda h: h["domains"].update(code="1")), "expected int"),
    "negative bytes": (lambda path: rewritten(path, header=lambda h: h["domains"].update(code=-1)), "negative"),
    "no domains": (lambda path: rewritten(path, header=lambda h: h.update(domains={})), "missing, zero or negative"),
    "a domain more": (lambda path: rewritten(path, header=lambda h: h["domains"].update(x=1)), "shapes of 3 domains"),
    "a layer more": (lambda path: rewritten(path, header=lambda h: h["layers"].update(x="x")), "'inputs.x.count' is"),
    "a missing array": (lambda path: rewritten(path, lambda arrays: arrays.pop(SUMS)), f"'{SUMS}' is missing"),
    "missing values": (
        lambda path: rewritten(path, lambda arrays: arrays.pop("values.local.layers.0.attention.count")),
        "'values.local.layers.0.attention.count' is missing",
    ),
    "NaN": (lambda path: rewritten(path, spoil(float("nan"))), "NaN, infinity or a negative"),
    "infinity": (lambda path: rewritten(path, spoil(float("inf"))), "NaN, infinity or a negative"),
    "a negative sum": (lambda path: rewritten(path, spoil(-1.0)), "NaN, infinity or a negative"),
    "another type": (
        lambda path: rewritten(path, lambda arrays: arrays.update({SUMS: arrays[SUMS].astype(np.float32)})),
        "is float32, expected float64",
    ),
    "another shape": (
        lambda path: rewritten(path, lambda arrays: arrays.update({SUMS: arrays[SUMS][:, 1:].copy()})),
        "shapes of 2 domains",
    ),
    "a flat array": (
        lambda path: rewritten(path, lambda arrays: arrays.update({SUMS: arrays[SUMS].ravel()})),
        "shapes of 2 domains",
    ),
}


@pytest.mark.parametrize("hazard", DAMAGE)
def test_damaged_files_are_refused(hazard: str, statistics: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    save_statistics(path, statistics)
    damage, message = DAMAGE[hazard]
    damage(path)
    with pytest.raises(StatisticsError) as caught:
        load_statistics(path)
    text = str(caught.value)
    assert message in text
    assert text.startswith(str(path))
    assert "\n" not in text
