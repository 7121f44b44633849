"""Costs of a stream by line and byte: what is told, what is written, and a run that goes on where it was ended."""

import contextlib
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from small_networks import CONFIGS, random_weights

from marlin_cli.api import MegaByteModel
from marlin_cli.bench import surprise as surprising
from marlin_cli.bench.cost_files import CostFile, NoFile
from marlin_cli.bench.line_costs import MOST_LINE_BYTES, LineCosts
from marlin_cli.bench.surprise import FileSource, default_window, surprise
from marlin_cli.engine import stream_scoring
from marlin_cli.engine.endless import Window
from marlin_cli.errors import MarlinError, OutputError, UsageError
from marlin_cli.ops.device import choose_device

TEXT = b"".join(b"line %d says %s\n" % (n, bytes([65 + n % 26]) * (n % 40)) for n in range(60)) + b"the end"


@pytest.fixture(scope="module")
def model():
    return MegaByteModel(random_weights(CONFIGS["prefix"]), choose_device("cpu")).cached(Window(64))


@pytest.fixture(autouse=True)
def small_portions(monkeypatch):
    monkeypatch.setattr(stream_scoring, "PATCHES_AT_ONCE", 16)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    return path


class Pipe:
    """A source that makes one wait after some of its reads, and ends at once where it is told to."""

    name = "stdin"

    def __init__(self, data, pauses=(), breaks_at=None):
        self.data, self.pauses, self.breaks_at, self.reads, self.at = data, pauses, breaks_at, 0, 0

    def read(self, most):
        self.reads += 1
        if self.breaks_at is not None and self.at >= self.breaks_at:
            raise KeyboardInterrupt
        if self.reads in self.pauses:
            return None
        part = self.data[self.at : self.at + min(most, 100)]
        self.at += len(part)
        return part


def score(model, source, **settings):
    with FileSource(source) if isinstance(source, Path) else contextlib.nullcontext(source) as opened:
        return surprise(model, "m", opened, NoFile(), 5, **settings)


def test_lines_and_bytes_cost_what_the_stream_costs(model, text, tmp_path):
    files = [CostFile(tmp_path / name) for name in ("c.jsonl", "c.npy")]
    found = [score(model, text, file=file) for file in files]
    lines = [json.loads(line) for line in files[0].path.read_text().splitlines()]
    bits = np.load(files[1].path)
    assert found[0].bytes == found[1].bytes == len(TEXT) == len(bits) and found[0].lines == len(lines) == 61
    assert found[0].bits_per_byte == pytest.approx(bits.mean(), rel=1e-6)
    for line, own in zip(lines, TEXT.splitlines(keepends=True), strict=True):
        part = slice(line["offset"], line["offset"] + line["bytes"])
        assert TEXT[part] == own and line["bits"] == pytest.approx(bits[part].sum(), abs=2e-3)
    costliest = sorted(lines, key=lambda line: -line["bits"])[:5]
    assert [line.number for line in found[0].costliest] == [line["line"] for line in costliest]
    assert found[0].costliest[0].beginning == TEXT.splitlines(keepends=True)[costliest[0]["line"] - 1]
    assert {path.name for path in tmp_path.iterdir()} == {"text", "c.jsonl", "c.npy"}


def test_a_pipe_that_pauses_gives_the_same(model, text):
    whole, paused = score(model, text), score(model, Pipe(TEXT, pauses=(2, 3, 7)))
    assert paused.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=1e-5)
    assert [line.number for line in paused.costliest] == [line.number for line in whole.costliest]


@pytest.mark.parametrize("name", ["c.jsonl", "c.npy"])
@pytest.mark.parametrize("at", [0, 700])
def test_a_run_that_was_ended_goes_on_to_the_same_bytes(model, text, tmp_path, name, at):
    whole, ended = CostFile(tmp_path / f"whole-{name}"), CostFile(tmp_path / name)
    expected = score(model, text, file=whole)
    with pytest.raises(KeyboardInterrupt):
        score(model, Pipe(TEXT, breaks_at=at), file=ended)
    assert ended.state.exists() and not ended.path.exists()
    found = score(model, text, file=ended, resume=True)
    assert ended.path.read_bytes() == whole.path.read_bytes() and not ended.state.exists() and not ended.unfinished.exists()
    assert (found.bytes, found.lines, found.bits_per_byte, found.costliest) == (
        expected.bytes, expected.lines, expected.bits_per_byte, expected.costliest
    )  # fmt: skip


def test_a_run_from_the_beginning_leaves_no_older_state(tmp_path):
    file = CostFile(tmp_path / "costs.jsonl")
    file.unfinished.write_bytes(b"of another run")
    file.state.write_bytes(b"of another run, too")
    with pytest.raises(KeyboardInterrupt), file.writing(None):
        raise KeyboardInterrupt
    assert not file.unfinished.exists() and not file.state.exists()


def test_a_run_that_nothing_could_go_on_from_leaves_nothing(tmp_path):
    """As on a full disk, which has no room for a state either."""
    file = CostFile(tmp_path / "costs.jsonl")
    with pytest.raises(OutputError, match="costs.jsonl: cannot write: No space left on device"), file.writing(None):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


def test_a_run_is_saved_now_and_then(model, text, tmp_path):
    file = CostFile(tmp_path / "c.jsonl")
    seconds = iter(range(0, 10**6, 20))
    states = []

    def on_bytes(count):
        states.append(file.state.exists())

    score(model, text, file=file, clock=lambda: next(seconds), on_bytes=on_bytes)
    assert states[0] is False and any(states)


def test_what_does_not_go_on_is_refused(model, text, tmp_path):
    file = CostFile(tmp_path / "c.jsonl")
    with pytest.raises(KeyboardInterrupt):
        score(model, Pipe(TEXT, breaks_at=700), file=file)
    with pytest.raises(UsageError, match="does not begin with the 7"):
        score(model, Pipe(b"x" + TEXT[1:]), file=file, resume=True)
    with pytest.raises(UsageError, match="does not begin with the 7"):
        score(model, Pipe(TEXT[:100]), file=file, resume=True)
    with pytest.raises(UsageError, match="is of a run with another cache"):
        score(model.cached(Window(32)), text, file=file, resume=True)
    data = bytearray(file.state.read_bytes())
    data[-3] ^= 1
    file.state.write_bytes(data)
    with pytest.raises(UsageError, match="is damaged"):
        score(model, text, file=file, resume=True)
    file.state.write_bytes(b"nothing")
    with pytest.raises(UsageError, match="delete it to begin again"):
        score(model, text, file=file, resume=True)
    score(model, text, file=file)
    assert file.path.exists()


@pytest.mark.parametrize("name", ["costs", "costs.csv", "costs.f32"])
def test_names_of_no_form_are_refused(tmp_path, name):
    with pytest.raises(UsageError, match=r"name it \.jsonl"):
        CostFile(tmp_path / name)


def test_a_source_that_is_not_there_is_told(tmp_path):
    with pytest.raises(MarlinError, match="cannot read"):
        FileSource(tmp_path / "nothing")


def test_a_line_without_an_end_is_cut():
    costs = LineCosts(2)
    ended = costs.push(bytes(2 * MOST_LINE_BYTES + 5), np.ones(2 * MOST_LINE_BYTES + 5, dtype=np.float32))
    assert [line.length for line in ended] == [MOST_LINE_BYTES] * 2 and ended[1].offset == MOST_LINE_BYTES
    assert [line.length for line in costs.finish()] == [5] and costs.lines == 3
    assert [line.number for line in costs.costliest] == [1, 2]


def test_an_empty_stream_costs_nothing(model, tmp_path):
    (tmp_path / "nothing").write_bytes(b"")
    found = score(model, tmp_path / "nothing", file=CostFile(tmp_path / "c.npy"))
    assert (found.bytes, found.lines, found.bits_per_byte, found.costliest) == (0, 0, 0.0, ())
    assert np.load(tmp_path / "c.npy").shape == (0,)


def test_each_model_has_a_window_without_being_asked():
    assert default_window(CONFIGS["prefix"]) == Window(96)
    assert default_window(CONFIGS["megabyte_pytorch"]) == Window()
    assert surprising.DEFAULT_WINDOW_BYTES == 2048
