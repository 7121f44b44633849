"""Signals that ask the command to end: what was measured is saved, the exit code says which it was, and it can go on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from marlin_cli.api import MegaByteModel
from marlin_cli.corpus import Corpus, open_corpus
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.ops.device import choose_device
from marlin_cli.statistics import run as run_module
from marlin_cli.statistics.run import calibrate, unfinished_path
from marlin_cli.statistics.store import load_unfinished, save_statistics

MODEL = "m" * 64


def corpus_of(sources: list[str]) -> Corpus:
    return open_corpus(sources, sequence_bytes=96)


# Waits in the middle of the fourth window, until it is told to end.
COMMAND = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
from marlin_cli.statistics import run

measure, seen = run.measure, []

def waiting(*arguments):
    seen.append(1)
    if len(seen) == 4:
        print("here", flush=True)
        time.sleep(60)
    return measure(*arguments)

if "--resume" not in sys.argv:
    run.measure = waiting
from marlin_cli.cli import main
main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_saves_the_place(
    number: signal.Signals, code: int, network: MegaByte, sources: list[str], tmp_path: Path
) -> None:
    MegaByteModel(network, choose_device("cpu")).save(tmp_path / "model")
    output = tmp_path / "out.safetensors"
    arguments = ["calibrate", str(tmp_path / "model"), "-o", str(output), "--seq-bytes", "96"]
    arguments += [part for source in sources for part in ("--corpus", source)]
    command = [sys.executable, "-c", COMMAND, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert "go on with --resume" in errors.replace("\n", " ")
    assert load_unfinished(unfinished_path(output))[0].total_bytes == 3 * 96
    if number != signal.SIGTERM:
        return  # all three leave the same
    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "model", "out.safetensors"]
    whole = tmp_path / "whole.safetensors"
    calibrate(network, corpus_of(sources), whole, model=load_model_of(output))
    assert output.read_bytes() == whole.read_bytes()


def load_model_of(path: Path) -> str:
    return run_module.load_statistics(path).model


def test_an_interrupt_of_the_last_save_loses_nothing(
    network: MegaByte, sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.safetensors"

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "save_statistics", interrupted)
        with pytest.raises(KeyboardInterrupt):
            calibrate(network, corpus_of(sources), output, model=MODEL)
    monkeypatch.setattr(run_module, "measure", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(run_module, "save_statistics", save_statistics)
    assert calibrate(network, corpus_of(sources), output, model=MODEL, resume=True).total_bytes == 1380
