"""The first byte after a prompt whose beginning has been read before: from memory, and from a file after a restart.

    python benchmarks/kept_prompts.py [--model 150M|demo|PATH] [--bits 16,4] [--kv-bits 16,8,4] [--prefix 16k] [--rounds 5]

Requests have one beginning and another end each. Times are from a request's admission to its first byte: `ordinary` reads the
whole prompt; `memory` begins in the pages of an earlier request; `file` is the first request of a new process, on the folder
that an earlier one has left. That process has read the model and every weight's hash before, as a server does when it starts:
`ready` says how long that hash takes. The file may stand in the system's own cache of files, as after a restart of the server.
Rounds alternate; medians. Each request's bytes are compared with those of ordinary reading. 150M is a random model (global
1024 x 12, local 512 x 4, patches of 8); `--bits 4` packs it into 4 bits, the local part into 8. Rows are exact, as in a server.
"""

import os

os.environ.setdefault("MARLIN_ROWS", "exact")

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from marlin_cli.api import MegaByteModel
from marlin_cli.commands.options import parse_size, parse_sizes
from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.prompt_store import PromptStore, StoreLimits
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.schedulers import scheduler_of
from marlin_cli.engine.scheduling import Request
from marlin_cli.engine.state_kinds import kind_of
from marlin_cli.engine.states import PromptKeeper
from marlin_cli.engine.stopping import Stopping
from marlin_cli.models.megabyte_config import MegaByteConfig

ANSWER_BYTES = 24


def model_of(name: str, bits: int, prefix_bytes: int) -> MegaByteModel:
    """The shipped demo, one at a path, or the random one; packed if asked for."""
    if name == "150M":
        model = MegaByteModel.from_config(MegaByteConfig(max_bytes=max(8192, 2 * prefix_bytes)))
    else:
        model = MegaByteModel.from_pretrained("megabyte-demo" if name == "demo" else name)
    return model if bits == 16 else model.quantize()


def prompts(prefix_bytes: int, count: int) -> list[bytes]:
    """Prompts of equal length that begin alike: with the README, as often as it takes."""
    text = Path(__file__).parents[1].joinpath("README.md").read_bytes()
    prefix = (text * (1 + prefix_bytes // len(text)))[:prefix_bytes]
    ends = np.random.default_rng(0).integers(97, 123, (count, 40), dtype=np.uint8)
    return [prefix + end.tobytes() for end in ends]


def request(model: MegaByteModel, bits: CacheBits, prompt: bytes, keeper: PromptKeeper | None) -> tuple[float, bytes]:
    """Seconds to the first byte, and the bytes."""
    scheduler = scheduler_of(model.network, None, bits, keeper)
    started = time.perf_counter()
    scheduler.admit(Request(prompt, Stopping(ANSWER_BYTES), Sampling()))
    found, first = b"", 0.0
    while scheduler.running or scheduler.waiting:
        for piece in scheduler.advance():
            first = first or time.perf_counter() - started
            found += piece.data
    return first, found


def after_restart(options: argparse.Namespace) -> None:
    """In a process of its own: the first request on a folder; prints seconds to its first byte, of the hash, and the bytes."""
    prefix = parse_size(options.prefix, "--prefix")
    model = model_of(options.model, int(options.bits), prefix)
    bits = CacheBits(int(options.kv_bits), int(options.kv_bits))
    all_prompts = prompts(prefix, options.rounds + 2)
    request(model, bits, all_prompts[0][-64:], None)  # kernels are loaded, memory has been touched
    started = time.perf_counter()
    store = PromptStore(kind_of(model.network, bits), Path(options.folder))
    ready = time.perf_counter() - started
    first, found = request(model, bits, all_prompts[options.index], store)
    store.close()
    print(json.dumps({"first": first, "ready": ready, "bytes": found.hex()}))


def measure(options: argparse.Namespace, weight_bits: int, kv_bits: int) -> None:
    """One model and one width of keys and values."""
    prefix = parse_size(options.prefix, "--prefix")
    model, bits = model_of(options.model, weight_bits, prefix), CacheBits(kv_bits, kv_bits)
    asked = prompts(prefix, options.rounds + 2)
    times: dict[str, list[float]] = {"ordinary": [], "memory": [], "file": [], "ready": []}
    with tempfile.TemporaryDirectory() as folder:
        kind = kind_of(model.network, bits)
        on_disk = PromptStore(kind, Path(folder) / "states")
        request(model, bits, asked[0], on_disk)
        on_disk.close()
        (file,) = (Path(folder) / "states").iterdir()
        memory = PromptStore(kind, None, StoreLimits(memory_bytes=8 << 30))
        request(model, bits, asked[0], memory)
        for index in range(1, options.rounds + 1):
            took, expected = request(model, bits, asked[index], None)
            times["ordinary"].append(took)
            took, found = request(model, bits, asked[index], memory)
            times["memory"].append(took)
            assert found == expected, "bytes from memory differ from those of ordinary reading"
            command = [
                sys.executable, __file__, "--model", options.model, "--bits", str(weight_bits), "--kv-bits", str(kv_bits),
                "--prefix", options.prefix, "--rounds", str(options.rounds), "--index", str(index),
                "--folder", str(file.parent),
            ]  # fmt: skip
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            told = json.loads(run.stdout)
            times["file"].append(told["first"])
            times["ready"].append(told["ready"])
            assert bytes.fromhex(told["bytes"]) == expected, "bytes from a file differ from those of ordinary reading"
            assert not run.stderr.strip(), run.stderr
        size = file.stat().st_size
    middle = {name: statistics.median(values) for name, values in times.items()}
    print(
        f"{options.model}, weights {weight_bits} bits, keys and values {kv_bits} bits, {prefix:,} bytes and 40 more:"
        f" first byte {1000 * middle['ordinary']:,.0f} ms; from memory {1000 * middle['memory']:,.1f} ms"
        f" ({middle['ordinary'] / middle['memory']:.1f}x), from a file of {size / 1e6:,.1f} MB"
        f" {1000 * middle['file']:,.1f} ms ({middle['ordinary'] / middle['file']:.1f}x; ready in"
        f" {1000 * middle['ready']:,.0f} ms); same bytes",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="150M")
    parser.add_argument("--bits", default="16,4", help="of the weights")
    parser.add_argument("--kv-bits", default="16,8,4")
    parser.add_argument("--prefix", default="16k")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--index", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder is not None:
        return after_restart(options)
    for weight_bits in parse_sizes(options.bits, "--bits"):
        for kv_bits in parse_sizes(options.kv_bits, "--kv-bits"):
            measure(options, weight_bits, kv_bits)


if __name__ == "__main__":
    main()
