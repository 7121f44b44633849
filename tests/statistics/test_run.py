"""A pass over a corpus: interrupted anywhere and resumed, or cut into shards, it gives what one pass gives."""

import os
import signal
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from marlin_cli.api import MegaByteModel
from marlin_cli.corpus import Corpus, open_corpus
from marlin_cli.errors import OutputError, StatisticsError
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.ops.device import choose_device
from marlin_cli.statistics import Statistics, load_statistics, merge
from marlin_cli.statistics import run as run_module
from marlin_cli.statistics.collect import measure
from marlin_cli.statistics.data import pool
from marlin_cli.statistics.run import calibrate, unfinished_path

MODEL = "m" * 64
SEQUENCE_BYTES = 96  # 15 windows, of which the last of each file is shorter and no multiple of a patch


def corpus_of(sources: list[str], **changes: int) -> Corpus:
    return open_corpus(sources, **{"sequence_bytes": SEQUENCE_BYTES, "seed": 0, **changes})


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "stats.safetensors"


@pytest.fixture
def whole(network: MegaByte, sources: list[str], tmp_path: Path) -> Path:
    """The file of a run that nothing disturbed."""
    path = tmp_path / "whole.safetensors"
    calibrate(network, corpus_of(sources), path, model=MODEL)
    return path


def assert_same_numbers(a: Statistics, b: Statistics, rtol: float) -> None:
    assert a.domains == b.domains
    for (kind, path, left), (_, _, right) in zip(a.totals.items(), b.totals.items(), strict=True):
        np.testing.assert_array_equal(left.count, right.count, f"{kind} {path}")
        np.testing.assert_array_equal(left.absolute_maximum, right.absolute_maximum, f"{kind} {path}")
        np.testing.assert_allclose(left.sum_squares, right.sum_squares, rtol=rtol, err_msg=f"{kind} {path}")


def test_a_run_adds_up_its_windows(network: MegaByte, sources: list[str], whole: Path) -> None:
    windows = list(corpus_of(sources))
    totals = measure(network, windows[0].domain, windows[0].bytes)
    for window in windows[1:]:
        totals = pool(totals, measure(network, window.domain, window.bytes))
    found = load_statistics(whole)
    assert found.domains == {"binary": 640, "code": 740} == totals.domains  # a byte and two more fill no patch
    for (_, _, left), (_, _, right) in zip(found.totals.items(), totals.items(), strict=True):
        np.testing.assert_array_equal(left.sum_squares, right.sum_squares)
    assert not unfinished_path(whole).exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError], ids=["Ctrl-C", "a fault"])
@pytest.mark.parametrize("after", [1, 2, 7, 14])
def test_an_interrupted_run_resumes_to_the_same_file(
    error: type[BaseException],
    after: int,
    network: MegaByte,
    sources: list[str],
    whole: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A fault saves nothing of its own: it leaves what the last save, four windows ago at most, has.
    monkeypatch.setattr(run_module, "SAVE_EVERY_BYTES", 4 * SEQUENCE_BYTES)
    measured = []

    def stop(count: int) -> None:
        measured.append(count)
        if len(measured) == after:
            raise error

    with pytest.raises(error):
        calibrate(network, corpus_of(sources), output, model=MODEL, on_bytes=stop)
    assert not output.exists()
    assert unfinished_path(output).exists() == (error is KeyboardInterrupt or after > 4)
    done: list[int] = []
    calibrate(network, corpus_of(sources), output, model=MODEL, resume=True, on_bytes=done.append)
    assert output.read_bytes() == whole.read_bytes()
    assert not unfinished_path(output).exists()
    assert sum(done) == 1380
    if error is KeyboardInterrupt:
        assert done[0] == sum(measured)  # nothing is measured twice


def test_interrupted_at_every_window(network: MegaByte, sources: list[str], whole: Path, output: Path) -> None:
    def stop(seen: list[int], count: int) -> None:
        """At the second call: the first of a resumed run is about what was done before."""
        seen.append(count)
        if len(seen) == 2:
            raise KeyboardInterrupt

    interrupts = 0
    while not output.exists():
        try:
            calibrate(network, corpus_of(sources), output, model=MODEL, resume=True, on_bytes=partial(stop, []))
        except KeyboardInterrupt:
            interrupts += 1
            assert interrupts < 20
    assert interrupts == 14
    assert output.read_bytes() == whole.read_bytes()


def test_a_broken_window_does_not_spoil_the_sums(
    network: MegaByte, sources: list[str], whole: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of a window: the window is not counted, and comes again."""
    calls = []

    def interrupted(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return measure(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            calibrate(network, corpus_of(sources), output, model=MODEL)
    calibrate(network, corpus_of(sources), output, model=MODEL, resume=True)
    assert output.read_bytes() == whole.read_bytes()


def test_resuming_a_finished_run_measures_nothing(
    network: MegaByte, sources: list[str], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = whole.read_bytes()
    monkeypatch.delattr(run_module, "measure")
    done: list[int] = []
    found = calibrate(network, corpus_of(sources), whole, model=MODEL, resume=True, on_bytes=done.append)
    assert found.total_bytes == 1380 == sum(done)
    assert whole.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "o" * 64}, "of another model"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"sequence_bytes": 48}, "sequence_bytes 96, not 48"),
        ({"max_bytes": 500}, "max_bytes None, not 500"),
        ({"shard": (0, 2)}, "shard_count 1, not 2"),
        ({"sources": slice(0, 1)}, "another corpus"),
    ],
    ids=["model", "seed", "window", "size", "shard", "corpus"],
)
@pytest.mark.parametrize("finished", [False, True], ids=["unfinished", "finished"])
def test_another_run_is_not_resumed(
    changes: dict, message: str, finished: bool, network: MegaByte, sources: list[str], output: Path
) -> None:
    def stop(count: int) -> None:
        if not finished:
            raise KeyboardInterrupt

    try:
        calibrate(network, corpus_of(sources), output, model=MODEL, on_bytes=stop)
    except KeyboardInterrupt:
        pass
    there = output if finished else unfinished_path(output)
    before = there.read_bytes()
    corpus_changes = {key: value for key, value in changes.items() if key in ("seed", "sequence_bytes", "max_bytes")}
    corpus = corpus_of(sources[changes.get("sources", slice(None))], **corpus_changes)
    model, shard = changes.get("model", MODEL), changes.get("shard", (0, 1))
    with pytest.raises(StatisticsError, match=message):
        calibrate(network, corpus, output, model=model, shard=shard, resume=True)
    assert there.read_bytes() == before


def test_an_unfinished_run_is_not_thrown_away(network: MegaByte, sources: list[str], output: Path) -> None:
    unfinished_path(output).write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"stats\.safetensors\.partial: an unfinished run is there.*--resume"):
        calibrate(network, corpus_of(sources), output, model=MODEL)
    assert unfinished_path(output).read_bytes() == b"precious"


@pytest.mark.parametrize("count", [2, 3])
def test_merged_shards_equal_the_whole(count: int, network: MegaByte, sources: list[str], whole: Path, tmp_path: Path) -> None:
    shards = [
        calibrate(network, corpus_of(sources), tmp_path / f"{index}.safetensors", model=MODEL, shard=(index, count))
        for index in range(count)
    ]
    merged = shards[0]
    for shard in shards[1:]:
        merged = merge(merged, shard)
    assert_same_numbers(merged, load_statistics(whole), rtol=1e-12)
    assert len(merged.runs) == count


def test_a_shard_resumes_too(network: MegaByte, sources: list[str], output: Path, tmp_path: Path) -> None:
    expected = tmp_path / "expected.safetensors"
    calibrate(network, corpus_of(sources), expected, model=MODEL, shard=(1, 2))
    seen: list[int] = []

    def stop(count: int) -> None:
        seen.append(count)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(network, corpus_of(sources), output, model=MODEL, shard=(1, 2), on_bytes=stop)
    calibrate(network, corpus_of(sources), output, model=MODEL, shard=(1, 2), resume=True)
    assert output.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(
    ("size", "shard", "message"),
    [(3, (0, 1), "no window of 4 bytes"), (90, (1, 2), r"for shard 1/2")],
    ids=["less than a patch", "no window for the shard"],
)
def test_nothing_to_measure(
    size: int, shard: tuple[int, int], message: str, network: MegaByte, tmp_path: Path, output: Path
) -> None:
    (tmp_path / "short").write_bytes(bytes(size))
    corpus = open_corpus([str(tmp_path / "short")], sequence_bytes=size)
    with pytest.raises(StatisticsError, match=message):
        calibrate(network, corpus, output, model=MODEL, shard=shard)
    assert not output.exists()


def test_an_output_folder_that_is_missing(network: MegaByte, sources: list[str], tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        calibrate(network, corpus_of(sources), tmp_path / "no" / "stats.safetensors", model=MODEL)


KILLED = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path
    from marlin_cli.api import load
    from marlin_cli.corpus import open_corpus
    from marlin_cli.statistics import run, store

    folder, moment, sources = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    run.SAVE_EVERY_BYTES = 1
    windows = 0

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def window_done(count):
        global windows
        windows += 1
        if moment == "between windows" and windows == 4:
            die()

    real_save, real_write = store._save, store.writing

    def save(path, statistics, state):
        final = state is None
        if (moment == "while saving" and not final and windows == 4) or (moment == "while writing the result" and final):
            # Half of the file is there, under its temporary name, when the process ends.
            real_write = store.write_safetensors
            def half(temporary, *rest):
                real_write(temporary, *rest)
                os.truncate(temporary, 5000)
                die()
            store.write_safetensors = half
        real_save(path, statistics, state)
        if moment == "before the rest is removed" and final:
            die()

    store._save = save
    network = load(folder / "model", device="cpu").network
    corpus = open_corpus(sources, sequence_bytes=96)
    run.calibrate(network, corpus, folder / "stats.safetensors", model="m" * 64, on_bytes=window_done)
""")


@pytest.mark.parametrize(
    "moment", ["between windows", "while saving", "while writing the result", "before the rest is removed"]
)
def test_kill_9_leaves_no_half_file(moment: str, network: MegaByte, sources: list[str], whole: Path, tmp_path: Path) -> None:
    MegaByteModel(network, choose_device("cpu")).save(tmp_path / "model")
    command = [sys.executable, "-c", KILLED, str(tmp_path), moment, *sources]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert result.returncode == -signal.SIGKILL, result.stderr
    output = tmp_path / "stats.safetensors"
    assert output.exists() == (moment == "before the rest is removed")
    assert unfinished_path(output).exists()
    calibrate(network, corpus_of(sources), output, model=MODEL, resume=True)
    assert output.read_bytes() == whole.read_bytes()
    assert not unfinished_path(output).exists()


def test_only_statistics_are_replaced(network: MegaByte, sources: list[str], output: Path) -> None:
    output.write_bytes(b"somebody's notes")
    with pytest.raises(OutputError, match="holds no statistics, which alone are replaced"):
        calibrate(network, corpus_of(sources), output, model=MODEL)
    assert output.read_bytes() == b"somebody's notes"
    output.unlink()
    for _ in range(2):
        calibrate(network, corpus_of(sources), output, model=MODEL)
