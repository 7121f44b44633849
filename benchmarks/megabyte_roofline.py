"""MegaByte generation on the CPU against torch with both caches, and against the memory's own limit.

    python benchmarks/megabyte_roofline.py [--models demo,150M] [--bytes 64] [--rounds 5]

The demo, and a random model of 150 M parameters (global 1024 x 12, local 512 x 4, patches of 8), after a prompt of 512
bytes; marlin in float32 and with a 4-bit global and an 8-bit local part, torch in float32 and bfloat16 (cached_torch.py). The
float32 runs must give the same bytes. The roofline: bytes of weights that a byte generated must read (the global part's once in
a patch) over the bandwidth at which this machine reads 256 MB, all in this run. Rounds alternate; medians; the same threads.
"""

import argparse
import statistics
import time

import mlx.core as mx
import numpy as np
import torch
from cached_torch import CachedTorch
from measured import Row, add_rows_option, report
from mlx.utils import tree_flatten
from products import copy_bandwidth

from marlin_cli import load
from marlin_cli.api import MegaByteModel
from marlin_cli.engine.decoding import Lockstep
from marlin_cli.engine.sampling import Noise, Sampling
from marlin_cli.models import part_of
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops.cpu import kernels, thread_count
from marlin_cli.ops.device import choose_device

PROMPT_BYTES = 512


def marlin_decode(model: MegaByteModel, prompt: bytes, count: int) -> tuple[float, bytes]:
    """Seconds a byte after the prompt is read, and the bytes."""
    state = Lockstep(model.network, [prompt], model.cache_bits)
    noise, out = Noise(0, 256), []
    start = time.perf_counter()
    while len(out) < count:
        out += state.advance(Sampling(), noise, count - len(out))[0].tolist()
    return (time.perf_counter() - start) / count, bytes(out)


def torch_decode(model: CachedTorch, prompt: bytes, count: int) -> tuple[float, bytes]:
    model.read(prompt)
    out = b""
    start = time.perf_counter()
    while len(out) < count:
        out += model.patch()
    return (time.perf_counter() - start) / count, out


def bytes_read(model: MegaByteModel) -> float:
    """Bytes of linear layers that one byte generated must read."""
    total = 0.0
    for path, array in tree_flatten(model.network.parameters()):
        if "_proj" in path or path.startswith(("global_to_local", "output")):
            part = part_of(path.rsplit(".", 1)[0])
            total += array.nbytes / (model.config.patch_size if part == "global" else 1)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="demo,150M")
    parser.add_argument("--bytes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    add_rows_option(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(thread_count())
    device = choose_device("cpu")
    bandwidth = copy_bandwidth()
    print(f"mlx {mx.__version__}, torch {torch.__version__}, kernels: {kernels()[1]}; 256 MB at {bandwidth / 1e9:.1f} GB/s")
    prompt = np.random.default_rng(0).integers(97, 123, PROMPT_BYTES, dtype=np.uint8).tobytes()
    for name in arguments.models.split(","):
        if name == "demo":
            plain = load("megabyte-demo", device="cpu")
        else:
            mx.random.seed(0)
            network = MegaByte(MegaByteConfig())
            mx.eval(network.parameters())
            plain = MegaByteModel(network, device)
        packed = plain.quantize(global_bits=4, local_bits=8)
        runs = {
            "marlin float32": (marlin_decode, plain),
            "marlin 4/8 bits": (marlin_decode, packed),
            "torch float32": (torch_decode, CachedTorch(plain.network, torch.float32)),
            "torch bfloat16": (torch_decode, CachedTorch(plain.network, torch.bfloat16)),
        }
        times: dict[str, list[float]] = {run: [] for run in runs}
        for _ in range(arguments.rounds + 1):
            outputs = {}
            for run, (decode, model) in runs.items():
                took, outputs[run] = decode(model, prompt, arguments.bytes)
                times[run].append(took)
            assert outputs["marlin float32"] == outputs["torch float32"][: arguments.bytes], "greedy bytes differ"
        rates = {run: 1 / statistics.median(values[1:]) for run, values in times.items()}
        print(f"{name}: " + ", ".join(f"{run} {rate:.0f} bytes/s" for run, rate in rates.items()))
        best = max(rate for run, rate in rates.items() if run.startswith("torch"))
        for run, model in (("marlin float32", plain), ("marlin 4/8 bits", packed)):
            limit = bandwidth / bytes_read(model)
            print(
                f"{name}: {run} is {rates[run] / rates['torch float32']:.2f}x torch float32, {rates[run] / best:.2f}x its"
                f" faster type; {bytes_read(model) / 1e6:.1f} MB a byte, {100 * rates[run] / limit:.0f} % of the roofline",
                flush=True,
            )
            report(
                Row(
                    f"MegaByte generation, {name}, {run.removeprefix('marlin ')}, after {PROMPT_BYTES} bytes",
                    f"{rates[run]:.0f} bytes/s ({100 * rates[run] / limit:.0f} % of the roofline)",
                    f"torch {torch.__version__} with both caches, float32 {rates['torch float32']:.0f}, bfloat16"
                    f" {rates['torch bfloat16']:.0f} bytes/s",
                    f"{rates[run] / rates['torch float32']:.1f}x, {rates[run] / rates['torch bfloat16']:.1f}x",
                    "same bytes as torch float32" if model is plain else "packed: other bytes",
                ),
                arguments.rows_file,
            )


if __name__ == "__main__":
    main()
