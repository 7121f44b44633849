"""Streams beyond the context: memory, speed, bits per byte beside the window read anew, and planted lines of a log found.

    python benchmarks/endless.py [MODEL] [--window 2048] [--heldout FOLDER] [--log-bytes 2000000] [--train STEPS]

Everything is measured in one run and one process. The model is the demo unless named; `--train` trains a small one on the
first bytes of the log first, as the demo has seen no logs.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
from endless_log import made_log
from endless_model import trained

from marlin_cli.api import load
from marlin_cli.bench.cost_files import CostFile, NoFile
from marlin_cli.bench.surprise import FileSource, surprise
from marlin_cli.continuing_model import ContinuingModel
from marlin_cli.engine.continuation import begin
from marlin_cli.engine.endless import Window
from marlin_cli.engine.sampling import Noise, Sampling
from marlin_cli.engine.scoring import costs
from marlin_cli.engine.stopping import Stopping
from marlin_cli.engine.stream_scoring import stream_scorer

SAMPLED_PATCHES = 192
TURNS = 40


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("model", nargs="?", default="megabyte-demo")
    arguments.add_argument("--window", type=int, default=2048)
    arguments.add_argument("--heldout", type=Path, help="a folder of files; without it bits per byte are left out")
    arguments.add_argument("--log-bytes", type=int, default=2_000_000)
    arguments.add_argument("--train", type=int, default=0, help="steps of training a small model on the log's first tenth")
    arguments.add_argument("--only", choices=("decode", "quality", "log"))
    given = arguments.parse_args()
    model = load(given.model, device="cpu")
    assert isinstance(model, ContinuingModel)
    if given.only in (None, "decode"):
        decoding(model, given.window)
    if given.only in (None, "quality") and given.heldout is not None:
        quality(model, given.window, given.heldout)
    if given.only in (None, "log"):
        log(model, given)


def decoding(model: ContinuingModel, window: int) -> None:
    """Memory and speed at 1, 10 and 100 times the window, and beside a window that is read anew for each patch.

    All in turns, in seconds of the processor, of which the least of each counts: others use the machine.
    """
    endless, patch = model.cached(Window(window)), model.config.patch_size
    noise, sampling, states = Noise(0, model.config.vocab_size), Sampling(0.8), {}
    sizes: dict[int | str, int] = {}
    for times in (1, 10, 100):
        state = begin(endless.network, [b"The stream begins. "], endless.cache_bits)
        while state.positions[0] < times * window:
            state.advance(sampling, noise, window)
        states[times], sizes[times] = state, state.cache_bytes["global"]
        sizes[f"resident {times}"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    text = np.random.default_rng(0).integers(32, 127, window, dtype=np.uint8).tobytes()
    least: dict[int, float] = {}

    def took(number: int, seconds: float) -> None:
        least[number] = min(least.get(number, seconds), seconds)

    for _ in range(TURNS):
        for times, state in states.items():
            started, first = time.process_time(), state.positions[0]
            while state.positions[0] < first + 8 * patch:
                state.advance(sampling, noise, window)
            took(times, (time.process_time() - started) / (state.positions[0] - first))
        started = time.process_time()
        for _ in model.pieces([text[patch:]], Stopping(patch), Sampling()):
            pass
        took(0, (time.process_time() - started) / patch)
    for times in states:
        print(
            f"{times:4} x {window:,} bytes: {1 / least[times]:,.0f} bytes/s ({least[1] / least[times]:.3f}), global cache"
            f" {sizes[times]:,} bytes, peak resident {sizes[f'resident {times}']} MiB"
        )
    print(f"the window read anew for each patch: {1 / least[0]:,.0f} bytes/s, {least[0] / least[10]:.1f} times slower")


def quality(model: ContinuingModel, window: int, folder: Path) -> None:
    """Bits per byte of a ring, with sinks and without, beside those of the window read anew, on the same patches."""
    patch, network = model.config.patch_size, model.network
    texts = [path.read_bytes()[: 16 * window] for path in sorted(folder.rglob("*")) if path.is_file()]
    data = b"".join(text for text in texts if len(text) > 4 * window)[: 128 * window]
    draw = np.random.default_rng(0)
    starts = np.sort(draw.choice(np.arange(window // patch, len(data) // patch), SAMPLED_PATCHES, replace=False)) * patch
    gold = np.zeros(len(starts))
    for first in range(0, len(starts), 16):
        ends = starts[first : first + 16] + patch
        rows = [np.frombuffer(data[end - window : end], dtype=np.uint8) for end in ends]
        found = np.array(costs(network, mx.array(np.stack(rows).astype(np.int32))))
        gold[first : first + 16] = found[:, -patch:].mean(axis=1)
    print(f"bits per byte of {len(starts)} patches of {len(data):,} bytes, window of {window:,}: read anew {gold.mean():.4f}")
    for name, view in {
        "ring without sinks": Window(window, 0), "ring, 1 sink": Window(window, 1), "ring, 4 sinks": Window(window, 4),
        "context read again": Window(),
    }.items():  # fmt: skip
        bits = stream_scorer(network, model.cached(view).cache_bits).score(data)
        own = np.array([bits[start : start + patch].mean() for start in starts])
        error = (own - gold).std() / np.sqrt(len(own))
        print(
            f"  {name}: {own.mean():.4f} ({100 * (own.mean() / gold.mean() - 1):+.2f} % +- {100 * error / gold.mean():.2f}),"
            f" all bytes {bits.mean():.4f}"
        )


def log(model: ContinuingModel, given: argparse.Namespace) -> None:
    """Planted lines among the 20 costliest; speed and memory, and that a run that was ended gives the same bytes."""
    data, planted = made_log(given.log_bytes)
    models = {given.model: model}
    if given.train:
        print("training on the first tenth of the log")
        models["trained on it"] = trained(data[: len(data) // 10], given.train)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "service.log"
        path.write_bytes(data)
        for name, each in models.items():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            with FileSource(path) as source:
                found = surprise(each.cached(Window(given.window)), name, source, NoFile(), 20)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            hits = [line.number for line in found.costliest if line.number in planted]
            print(
                f"{name}: {found.bytes:,} bytes, {found.lines:,} lines, {found.bits_per_byte:.3f} bits per byte,"
                f" {found.bytes_per_second:,.0f} bytes/s (100 MB in {1e8 / found.bytes_per_second / 60:.0f} minutes);"
                f" {len(hits)} of {len(planted)} planted lines among the 20 costliest; peak resident {before} -> {peak} MiB"
            )
            _resumed(each.cached(Window(given.window)), path, Path(folder), data)


def _resumed(model: ContinuingModel, path: Path, folder: Path, data: bytes) -> None:
    """End a run in its middle, go on, and compare with one that was not ended."""
    part = folder / "part.log"
    part.write_bytes(data[:100_000])
    whole, ended = CostFile(folder / "whole.jsonl"), CostFile(folder / "ended.jsonl")

    class Ended(Exception):
        pass

    seen = 0

    def end(count: int) -> None:
        nonlocal seen
        seen += count
        if seen > 50_000:
            raise Ended

    for file, on_bytes in ((whole, lambda count: None), (ended, end)):
        try:
            with FileSource(part) as source:
                surprise(model, "", source, NoFile(), 20, file=file, on_bytes=on_bytes)
        except Ended:
            with FileSource(part) as source:
                surprise(model, "", source, NoFile(), 20, file=ended, resume=True)
    same = whole.path.read_bytes() == ended.path.read_bytes()
    print(f"  ended in its middle and resumed: {'the same bytes' if same else 'OTHER BYTES'}")
    lines = [json.loads(line) for line in whole.path.read_text().splitlines()]
    assert sum(line["bytes"] for line in lines) == 100_000
    for each in (whole, ended):
        each.path.unlink()


if __name__ == "__main__":
    main()
