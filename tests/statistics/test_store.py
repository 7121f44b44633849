"""Statistics files: what is written comes back, and what is damaged is refused in one line that names the file."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from marlin_cli.corpus import open_corpus
from marlin_cli.errors import MarlinError, OutputError, StatisticsError
from marlin_cli.models import shared_inputs
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.statistics import Statistics, load_statistics, merge, save_statistics
from marlin_cli.statistics.collect import measure
from marlin_cli.statistics.data import Run, pool
from marlin_cli.statistics.run import calibrate
from marlin_cli.statistics.store import METADATA_KEY, load_unfinished, save_unfinished
from marlin_cli.statistics.stored_arrays import Stored, StoredArrays

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


def spoil(value: float, name: str = SUMS) -> Callable[[dict], None]:
    return lambda arrays: arrays[name].__setitem__((0,) * arrays[name].ndim, value)


def absurd(arrays: dict) -> None:
    """Nothing in the file is larger than it says, for it holds no number at all."""
    for field, dtype in (("sum_squares", np.float64), ("absolute_maximum", np.float32)):
        arrays[f"inputs.output.{field}"] = np.zeros((2, 1_000_000_000, 0), dtype)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: path.unlink(), "no such file"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "is a folder"),
    "empty": (lambda path: path.write_bytes(b""), "is empty, not statistics; those come from marlin calibrate"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged safetensors file"),
    "cut in the header": (lambda path: path.write_bytes(path.read_bytes()[:300]), "damaged safetensors file"),
    "not safetensors": (
        lambda path: path.write_bytes(b"PK\x03\x04" * 100),
        "is a zip file, as torch.save",
    ),
    "JSON": (lambda path: path.write_text("{}"), "is JSON, not statistics"),
    "text": (lambda path: path.write_text("some words"), "is text, not statistics"),
    "a model": (lambda path: save_file({"weight": np.zeros(3)}, path), "not statistics"),
    "metadata not JSON": (lambda path: save_file({}, path, {METADATA_KEY: "{"}), "not JSON"),
    "metadata too deep": (lambda path: save_file({}, path, {METADATA_KEY: "[" * 100000}), "not JSON"),
    "metadata a list": (lambda path: save_file({}, path, {METADATA_KEY: "[]"}), "format version None"),
    "a later version": (lambda path: rewritten(path, header=lambda h: h.update(version=2)), "version 2"),
    "an unknown key": (lambda path: rewritten(path, header=lambda h: h.update(modle="x")), "did you mean 'model'"),
    "a missing key": (lambda path: rewritten(path, header=lambda h: h.pop("runs")), "missing key 'runs'"),
    "bytes as text": (lambda path: rewritten(path, header=lambda h: h["domains"].update(code="1")), "expected int"),
    "negative bytes": (
        lambda path: rewritten(path, header=lambda h: h["domains"].update(code=-1)),
        "the bytes of domain 'code' cannot be: -1",
    ),
    "no domains": (lambda path: rewritten(path, header=lambda h: h.update(domains={})), "missing or zero"),
    "bytes beyond 64 bits": (lambda path: rewritten(path, header=lambda h: h["domains"].update(code=1 << 63)), "cannot be"),
    "bytes of 4000 digits": (lambda path: rewritten(path, header=lambda h: h["domains"].update(code=10**4000)), "13,288 bits"),
    "escape codes": (
        lambda path: rewritten(path, header=lambda h: h["domains"].update({"\033[31m": -1})),
        r"domain '\x1b[31m' cannot be",
    ),
    "100,000 domains": (
        lambda path: rewritten(path, header=lambda h: h.update(domains={str(n): 1 for n in range(100_000)})),
        "100,000 domains, expected at most 1,024",
    ),
    "a run of no shard": (lambda path: rewritten(path, header=lambda h: h["runs"][0].update(shard_count=0)), "cannot be"),
    "layers that point to nothing": (
        lambda path: rewritten(path, header=lambda h: h["layers"].update(x="\033[31m")),
        r"the array 'inputs.\x1b[31m.count' is missing",
    ),
    "a sum beyond float32": (lambda path: rewritten(path, spoil(1e300)), "beyond float32"),
    "a maximum whose square is beyond float32": (
        lambda path: rewritten(path, spoil(1e30, "inputs.output.absolute_maximum")),
        "beyond float32",
    ),
    "sums of no rows": (lambda path: rewritten(path, spoil(0, "inputs.output.count")), "no row was measured there"),
    "more rows than can be": (lambda path: rewritten(path, spoil(2**62, "inputs.output.count")), "more rows than can be"),
    "rows whose sum overflows": (
        lambda path: rewritten(path, lambda arrays: arrays["inputs.output.count"].fill(2**62)),
        "more rows than can be",
    ),
    "a header without end": (
        lambda path: path.write_bytes((1 << 25).to_bytes(8, "little") + b"{" * (1 << 25)),
        "its header takes 33,554,432 bytes",
    ),
    "10^9 positions of no channels": (lambda path: rewritten(path, absurd), "do not have the shapes of 2 domains"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "is a pipe"),
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
        "is F32, expected F64",
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


HESSIANS: dict[str, tuple[Callable[[np.ndarray], object], str]] = {
    "NaN": (lambda h: h.__setitem__((1, 0), np.nan), "holds NaN or infinity"),
    "infinity": (lambda h: h.__setitem__((0, 0), np.inf), "holds NaN or infinity"),
    "not symmetric": (lambda h: h.__setitem__((1, 0), h[1, 0] + 0.5 * h[0, 0]), "is not symmetric"),
    "a negative square": (lambda h: (h.__setitem__((0, slice(None)), 0), h.__setitem__((slice(None), 0), 0),
                                     h.__setitem__((0, 0), -1.0)), "has a negative square"),
}  # fmt: skip


@pytest.fixture
def with_hessian(statistics: Statistics) -> Statistics:
    rows = np.random.default_rng(0).normal(size=(64, statistics.totals.inputs["output"].sum_squares.shape[-1]))
    sums = {("output", domain): (rows.T @ rows).astype(np.float32) for domain in statistics.domains}
    return dataclasses.replace(statistics, hessians=sums)


@pytest.mark.parametrize("hazard", HESSIANS)
def test_hessians_that_cannot_be_are_neither_read_nor_written(hazard: str, with_hessian: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_statistics(path, with_hessian)
    np.testing.assert_array_equal(load_statistics(path).hessians["output", "code"], with_hessian.hessians["output", "code"])
    damage, message = HESSIANS[hazard]
    rewritten(path, lambda arrays: damage(arrays["hessians.output.code"]))
    with pytest.raises(StatisticsError, match=f"a.safetensors: 'hessians.output.code' {message}"):
        _ = load_statistics(path).hessians["output", "code"]
    damage(with_hessian.hessians["output", "code"])
    with pytest.raises(StatisticsError, match=f"'hessians.output.code' {message}"):
        save_statistics(tmp_path / "b.safetensors", with_hessian)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("change", ["cut", "replaced"])
def test_a_file_that_changes_after_it_was_opened(change: str, with_hessian: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_statistics(path, with_hessian)
    found = load_statistics(path)
    if change == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        save_statistics(path, with_hessian)
    with pytest.raises(StatisticsError, match=r"a\.safetensors: changed while it was being read"):
        _ = found.hessians["output", "code"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 1e300])
def test_what_no_measurement_gives_is_not_written(value: float, statistics: Statistics, tmp_path: Path) -> None:
    statistics.totals.keys["local.layers.0.attention"].sum_squares[0, 0, 0] = value
    with pytest.raises(StatisticsError, match=r"keys\.local\.layers\.0\.attention"):
        save_statistics(tmp_path / "a.safetensors", statistics)
    assert list(tmp_path.iterdir()) == []


def test_counts_that_overflow_when_merged_are_refused(statistics: Statistics) -> None:
    other = dataclasses.replace(statistics, runs=(dataclasses.replace(statistics.runs[0], seed=8),))
    statistics.totals.inputs["output"].count[0, 0] = 2**53 - 100
    with pytest.raises(StatisticsError, match=r"'inputs\.output\.count' counts more rows than can be"):
        merge(statistics, other)


def test_an_unfinished_run_that_is_damaged_is_not_gone_on_with(
    statistics: Statistics, network: MegaByte, sources: list[str], tmp_path: Path
) -> None:
    """Of this model and run, by what it says; then its state, or its arrays, are others."""
    output, partial = tmp_path / "a.safetensors", tmp_path / "a.safetensors.partial"
    corpus = open_corpus(sources, sequence_bytes=32)
    run = Run(corpus.fingerprint(), corpus.sequence_bytes, corpus.seed, corpus.max_bytes)
    mine = dataclasses.replace(statistics, model="m", runs=(run,))
    for state in ({}, {"windows": "x"}, {"stream": 1, "windows": [10**30]}):
        save_unfinished(partial, mine, state)
        with pytest.raises(MarlinError, match="damaged"):
            calibrate(network, open_corpus(sources, sequence_bytes=32), output, model="m", resume=True)
    save_unfinished(partial, dataclasses.replace(mine, layers={**mine.layers, "more": "output"}), STATE)
    with pytest.raises(StatisticsError, match="is of other layers than the model's"):
        calibrate(network, open_corpus(sources, sequence_bytes=32), output, model="m", resume=True)


def test_an_array_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    arrays = StoredArrays(
        tmp_path / "a", {"x": Stored("F64", (1 << 40,), 0), "y": Stored("I64", (1 << 40, 0), 0)}, {}, (0,) * 4
    )
    for name in ("x", "y"):
        with pytest.raises(StatisticsError, match=r"has the absurd shape \[1099511627776"):
            arrays.read(name)
