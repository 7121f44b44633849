"""Seconds to the first byte of each prompt in fresh processes on an NVIDIA GPU, by rows of the prompt, and what was compiled.

    python benchmarks/cuda_first_bytes.py [--models demo,167M] [--prompts 8,16,40,80,200,512] [--cache FOLDER]
        [--turns cold,warm,mlx]

Each process imports marlin, makes a model (the demo, or random weights) in bfloat16 or in 4 and 8 bits, and then generates 8
bytes after each prompt in turn, of patches of 8 bytes, with caches as they are (MARLIN_CACHE). The clock starts with the model
there. Turns: `cold`, from caches of its own, all models at once; `warm`, again, one after the other; `mlx`, with kernels of
ours that MLX compiles in each process, as all but whole stages were before they were kept. --model NAME BITS is one process.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def one(name: str, bits: int, prompts: list[int], by_mlx: bool) -> None:
    """This process's times."""
    import mlx.core as mx
    import numpy as np

    from marlin_cli.api import MegaByteModel
    from marlin_cli.engine.generation import generate
    from marlin_cli.engine.sampling import Sampling
    from marlin_cli.engine.stopping import Stopping
    from marlin_cli.models.megabyte import MegaByte
    from marlin_cli.models.megabyte_config import MegaByteConfig
    from marlin_cli.ops import cuda, cuda_compile
    from marlin_cli.ops.cuda_kernels import SOURCES
    from marlin_cli.ops.device import choose_device
    from marlin_cli.quantization.apply import quantize_network
    from marlin_cli.quantization.plan import settings_from_bits

    compiled: list[str] = []
    compile_text, made = cuda_compile.compile_text, {}

    def counted(text: str) -> bytes:
        compiled.append("ours")
        return compile_text(text)

    def kernel(name: str, in_rows: bool = False):
        if name not in made:
            made[name] = SOURCES[name].made_by(mx.fast.cuda_kernel)

        def call(**options):
            variant = f"{name} {options['template']}"
            if variant not in compiled:
                compiled.append(variant)
            return made[name](**options)

        return call

    cuda_compile.compile_text = counted
    if by_mlx:
        cuda.kernel = kernel
    choose_device("cuda")
    if name == "demo":
        network = MegaByteModel.from_pretrained("megabyte-demo", device="cuda", dtype=mx.bfloat16).network
    else:
        mx.random.seed(0)
        network = MegaByte(MegaByteConfig())
        network.set_dtype(mx.bfloat16)
    if bits < 16:
        network = quantize_network(network, settings_from_bits(bits, 8, 16), method="rtn").network
    mx.eval(network.parameters())
    mx.synchronize()
    took = []
    for length in prompts:
        prompt = np.random.default_rng(length).integers(97, 123, length, dtype=np.uint8).tobytes()
        begun = time.perf_counter()
        for turn, _ in enumerate(generate(network, [prompt], Stopping(max_bytes=8), Sampling())):
            if turn == 0:
                took.append(time.perf_counter() - begun)
    again = time.perf_counter()
    next(iter(generate(network, [prompt], Stopping(max_bytes=8), Sampling())))
    print(
        f"{' '.join(f'{seconds:.2f}' for seconds in took)} = {sum(took):.2f} s, the last one again "
        f"{1e3 * (time.perf_counter() - again):.1f} ms; compiled {len(compiled)}"
    )
    mine = [each for each in compiled if each != "ours"]
    if mine:
        print("  MLX: " + "; ".join(mine))


def process(name: str, bits: int, prompts: str, cache: Path, by_mlx: bool) -> subprocess.Popen:
    command = [sys.executable, __file__, "--model", name, str(bits), "--prompts", prompts, *(["--by-mlx"] if by_mlx else [])]
    environment = {**os.environ, "MARLIN_CACHE": str(cache / f"{name}-{bits}")}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="demo,167M")
    parser.add_argument("--prompts", default="8,16,40,80,200,512")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--turns", default="cold,warm,mlx")
    parser.add_argument("--model", nargs=2)
    parser.add_argument("--by-mlx", action="store_true")
    arguments = parser.parse_args()
    if arguments.model:
        one(arguments.model[0], int(arguments.model[1]), [int(each) for each in arguments.prompts.split(",")], arguments.by_mlx)
        return
    cache = arguments.cache or Path(tempfile.mkdtemp())
    sides = [(name, bits) for name in arguments.models.split(",") for bits in (16, 4)]
    print(f"prompts of {arguments.prompts} bytes")
    for turn in arguments.turns.split(","):
        begun, running = time.monotonic(), []
        for name, bits in sides:
            running.append(process(name, bits, arguments.prompts, cache, turn == "mlx"))
            if turn != "cold":
                running[-1].wait()
        for (name, bits), each in zip(sides, running, strict=True):
            print(f"{turn}: {name}, {'bfloat16' if bits == 16 else '4/8 bits'}: {each.communicate()[0].strip()}", flush=True)
        print(f"  {time.monotonic() - begun:.0f} s in all", flush=True)
    for folder in sorted(cache.glob("*/*")):
        names = sorted(path.stem[:60] for path in folder.iterdir() if path.suffix != ".txt" and path.suffix != ".cu")
        print(f"{folder.relative_to(cache)}: {len(names)}" + (f": {', '.join(names)}" if "ptx" in folder.name else ""))


if __name__ == "__main__":
    main()
