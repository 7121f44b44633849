"""Wall time of `marlin calibrate` and `marlin bench --quality` by two ranks of one thread each, against one process.

    python benchmarks/data_parallel.py [--job calibrate|quality] [--bytes 512k] [--repeats 2] [--corpus default]

One process runs with one thread and with two; the ranks are started by mlx.launch on loopback. Repeats alternate, and the best
of each counts. Times are those of whole commands, imports and reading the model included. The results must be equal:
statistics byte for byte, bits per byte to the last bit.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WINDOW = "2048"


def command_of(job: str, corpus: str, size: str, output: Path) -> list[str]:
    if job == "calibrate":
        options = ["--corpus", corpus, "--max-bytes", size, "--seq-bytes", WINDOW, "-o", str(output)]
    else:
        options = ["--no-throughput", "--quality", corpus, "--max-quality-bytes", size, "--window-bytes", WINDOW]
        options += ["-o", str(output)]
    return [sys.executable, "-m", "marlin_cli", "calibrate" if job == "calibrate" else "bench", "megabyte-demo", *options]


def seconds(command: list[str], ranks: int, threads: int) -> float:
    environment = {**os.environ, "MARLIN_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    if ranks > 1:
        command = [str(Path(sys.executable).with_name("mlx.launch")), "-n", str(ranks), "--", *command]
    start = time.perf_counter()
    subprocess.run(command, env=environment, check=True, capture_output=True, stdin=subprocess.DEVNULL)
    return time.perf_counter() - start


def numbers_of(job: str, output: Path) -> object:
    if job == "calibrate":
        return output.read_bytes()
    return json.loads(output.read_text())["models"][0]["quality"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=("calibrate", "quality"), default="calibrate")
    parser.add_argument("--bytes", default="512k")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--corpus", default="default")
    given = parser.parse_args()
    ways = {"1 process, 1 thread": (1, 1), "1 process, 2 threads": (1, 2), "2 ranks, 1 thread each": (2, 1)}
    best = dict.fromkeys(ways, float("inf"))
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(given.repeats):
            for number, (way, (ranks, threads)) in enumerate(ways.items()):
                output = Path(folder) / f"{repeat}-{number}.{'safetensors' if given.job == 'calibrate' else 'json'}"
                best[way] = min(best[way], seconds(command_of(given.job, given.corpus, given.bytes, output), ranks, threads))
                results[way] = numbers_of(given.job, output)
    base = best["1 process, 1 thread"]
    print(f"{given.job}, {given.bytes} bytes of {given.corpus}, best of {given.repeats}")
    for way, taken in best.items():
        same = results[way] == results["1 process, 1 thread"]
        print(f"{way:24} {taken:7.2f} s  {base / taken:5.2f}x  {'same numbers' if same else 'OTHER NUMBERS'}")


if __name__ == "__main__":
    main()
