"""Time from a cache without kernels to the first product, and again with them: wall seconds of processes of their own.

    python benchmarks/cold_start.py [--march native] [--again 3] [--seconds 40] [--seconds-again 0.1]

A process imports marlin's kernels, which builds them into a new folder (MARLIN_CACHE), and multiplies a packed row. What counts
is the time from the import of `marlin_cli.ops.cpu`, with MLX already there, to the product; how many lines it says on stderr
is printed too. The exit status is 1 where one of the limits does not hold. Alone on the machine it says something.
"""

import argparse
import os
import subprocess
import sys
import tempfile

CODE = """
import time
import mlx.core as mx
mx.set_default_device(mx.cpu)
packed = mx.quantize(mx.random.normal((256, 256)), mode="nvfp4", group_size=16, bits=4)
x = mx.random.normal((1, 256))
mx.eval(packed, x)
start = time.perf_counter()
from marlin_cli.ops.cpu import kernels
imported = time.perf_counter()
module, reason = kernels()
assert module is not None, reason
mx.eval(module.marlin_gemm(x, *packed, None, module.Kind.nvfp4, 16, 16))
print(imported - start, time.perf_counter() - imported, module.processor_class())
"""


def run(folder: str, march: str) -> tuple[float, float, str, list[str]]:
    """Seconds of the import, and from there to the product; the class of processor; what was said on stderr."""
    environment = {**os.environ, "MARLIN_CACHE": folder, "MARLIN_MARCH": march}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    imported, product, processor = done.stdout.split()
    return float(imported), float(product), processor, done.stderr.splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--march", default=os.environ.get("MARLIN_MARCH", "native"))
    parser.add_argument("--again", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--seconds-again", type=float, default=0.1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _, cold, processor, said = run(folder, arguments.march)
        print(f"{processor}, {os.cpu_count()} processors: {cold:.1f} s from a cache without kernels, {len(said)} lines said")
        warm = [run(folder, arguments.march) for _ in range(arguments.again)]
    again, importing = min(product for _, product, *_ in warm), min(imported for imported, *_ in warm)
    lines = sum(len(said_again) for *_, said_again in warm)
    print(f"again {1e3 * again:.0f} ms, besides {1e3 * importing:.0f} ms of imports; {lines} lines said")
    sys.exit(cold > arguments.seconds or again > arguments.seconds_again or len(said) != 1)


if __name__ == "__main__":
    main()
