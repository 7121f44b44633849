"""A corpus by one process and by ranks, as `ranks.py corpus` runs it: the same statistics, bits per byte, less time."""

import argparse
import json
import re
from pathlib import Path

from launched import model_of, run, text_of

START_BYTES = 16 << 10  # of the corpus of a run that does next to nothing but start; a window for each of eight ranks


def corpus(given: argparse.Namespace, folder: Path) -> None:
    path, ways = model_of(given, folder), (1, given.ranks)
    for job, output in (("calibrate", "statistics.safetensors"), ("bench", "quality.json")):
        outcome: dict[int, bytes] = {}
        seconds: dict[int, tuple[float, float]] = {}
        for ranks in ways:
            times = []
            for size in (START_BYTES, given.corpus_bytes):
                target = folder / f"{ranks}-{size}-{output}"
                times.append(run(command_of(job, path, text_of(size, folder), given, target), ranks, given, folder).wall)
            outcome[ranks], seconds[ranks] = target.read_bytes(), (times[0], times[1])
        for ranks, (start, taken) in seconds.items():
            speed = (given.corpus_bytes - START_BYTES) / (taken - start)
            print(
                f"{job}, {given.corpus_bytes:,} bytes, {ranks} process(es): {taken:.2f} s, {start:.2f} s of it starting",
                end="; ",
            )
            print(f"{speed:,.0f} bytes/s", flush=True)
        (one_start, one), (many_start, many) = seconds[1], seconds[given.ranks]
        print(f"{job}: {(one - one_start) / (many - many_start):.2f}x less the start, {one / many:.2f}x with it", end="; ")
        print((same_statistics if job == "calibrate" else same_quality)(outcome[1], outcome[given.ranks]), flush=True)


def command_of(job: str, model: str, text: Path, given: argparse.Namespace, output: Path) -> list[str]:
    command = ["-m", "marlin_cli", job, model, "--device", given.device, "-o", str(output)]
    if job == "calibrate":
        return [*command, "--corpus", f"words={text}", "--seq-bytes", str(given.window_bytes)]
    return [*command, "--no-throughput", "--quality", f"words={text}", "--window-bytes", str(given.window_bytes)]


def same_statistics(one: bytes, many: bytes) -> str:
    if one == many:
        return "the same statistics, byte for byte"
    if len(one) != len(many):
        return f"OTHER STATISTICS: {len(one):,} and {len(many):,} bytes"
    differ = sum(mine != theirs for mine, theirs in zip(one, many, strict=True))
    return f"OTHER STATISTICS: {differ:,} of {len(one):,} bytes differ"


def same_quality(one: bytes, many: bytes) -> str:
    mine, theirs = (json.loads(each)["models"][0]["quality"] for each in (one, many))
    if mine == theirs:
        return "the same quality, to the last bit"
    pairs = zip(*(re.findall(r'"bits_per_byte": ([\d.e+-]+)', json.dumps(each)) for each in (mine, theirs)), strict=True)
    return f"OTHER QUALITY: bits per byte differ by {max(abs(float(a) - float(b)) for a, b in pairs):.1e} at most"
