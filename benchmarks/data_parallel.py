"""Wall time of `marlin calibrate` and `marlin bench --quality` by two ranks of one thread each, against one process.

    python benchmarks/data_parallel.py [--job calibrate|quality] [--bytes 512k] [--repeats 2] [--corpus default]

One process runs with one thread and with two; two ranks on loopback are started as mlx.launch starts them, and by mlx.launch
itself, which polls its children without a pause and so takes a core of its own. Repeats alternate, and the best of each
counts. Times are those of whole commands, imports and reading the model included. Ranks must give the numbers of one
process: statistics byte for byte, bits per byte to the last bit; other threads add up in another order.
"""

import argparse
import json
import os
import socket
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


def alone(command: list[str], environment: dict[str, str], folder: Path) -> list[subprocess.Popen[bytes]]:
    return [start(command, environment)]


def ring(command: list[str], environment: dict[str, str], folder: Path) -> list[subprocess.Popen[bytes]]:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        hosts = [[f"127.0.0.1:{each.getsockname()[1]}"] for each in (one, other)]
    (folder / "hosts.json").write_text(json.dumps(hosts))
    ring = {**environment, "MLX_HOSTFILE": str(folder / "hosts.json")}
    return [start(command, {**ring, "MLX_RANK": str(rank)}) for rank in (0, 1)]


def launched(command: list[str], environment: dict[str, str], folder: Path) -> list[subprocess.Popen[bytes]]:
    return [start([str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--", *command], environment)]


def start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    silent = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env=environment, **silent)


# How processes are started, and the threads of each. The first is what all others are compared with.
WAYS = {
    "1 process, 1 thread": (alone, 1),
    "1 process, 2 threads": (alone, 2),
    "2 ranks, 1 thread each": (ring, 1),
    "2 ranks by mlx.launch": (launched, 1),
}


def seconds(way: str, command: list[str], folder: Path) -> float:
    launch, threads = WAYS[way]
    environment = {**os.environ, "MARLIN_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    begun = time.perf_counter()
    codes = [process.wait() for process in launch(command, environment, folder)]
    taken = time.perf_counter() - begun
    if any(codes):
        raise SystemExit(f"{way}: exit codes {codes}")
    return taken


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
    best = dict.fromkeys(WAYS, float("inf"))
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for repeat in range(given.repeats):
            for number, way in enumerate(WAYS):
                output = folder / f"{repeat}-{number}.{'safetensors' if given.job == 'calibrate' else 'json'}"
                best[way] = min(best[way], seconds(way, command_of(given.job, given.corpus, given.bytes, output), folder))
                results[way] = numbers_of(given.job, output)
    first = next(iter(WAYS))
    print(f"{given.job}, {given.bytes} bytes of {given.corpus}, best of {given.repeats}")
    for way, taken in best.items():
        same = "same numbers" if results[way] == results[first] else "other numbers"
        print(f"{way:24} {taken:7.2f} s  {best[first] / taken:5.2f}x  {same}")


if __name__ == "__main__":
    main()
