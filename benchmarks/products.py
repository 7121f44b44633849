"""CPU products side by side in one run: packed ones against mx.quantized_matmul, dense ones against torch.

    python benchmarks/products.py [--sizes 1024,2048,4096] [--repeats 9] [--only packed|dense]

Rounds interleave the two sides; medians. A product is timed after one of its own that does not count, as in decoding, where
threads have not slept since the product before, and one row passes through a chain of products. Outputs are compared in the
same run. Packed bandwidth counts the bytes of the packed weights and scales; the share is of a copy of 256 MB measured here.
torch (extra `peers`) runs with the same threads; MLX's CPU backend multiplies packed weights with one thread, whatever it is
given: MARLIN_THREADS=1 is the comparison of kernels.
"""

import argparse
import statistics
import time

import mlx.core as mx
import numpy as np
from measured import Row, add_rows_option, report

from marlin_cli.ops.cpu import kernels, thread_count
from marlin_cli.quantization.encoders import decode, mlx_encode
from marlin_cli.quantization.formats import FORMATS

# Products in one evaluation, each of the one before, as in a pass through twelve layers: an evaluation costs a hand-over
# between threads, whichever product runs.
LINKS = 64


def chain(product, x, links: int):
    for _ in range(links):
        x = product(x)
    return x


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def medians(calls, repeats: int, before=None) -> list[float]:
    """Median seconds of each call, run in turn, after one round that does not count; `before` each its own call, not timed."""

    def timed(call, first) -> float:
        if first is not None:
            first()
        return seconds(call)

    rounds = [list(map(timed, calls, before or [None] * len(calls))) for _ in range(repeats + 1)][1:]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def copy_bandwidth() -> float:
    """Bytes read per second by the sum of a large array over all threads, as numpy and OpenBLAS have it."""
    module = kernels()[0]
    x, weight = mx.ones((1, 8192)), mx.ones((8192, 8192))
    mx.eval(x, weight)
    (took,) = medians([lambda: mx.eval(module.linear(x, weight))], 5)
    return weight.nbytes / took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="1024,2048,4096")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", choices=("packed", "dense"))
    add_rows_option(parser)
    arguments = parser.parse_args()
    module, reason = kernels()
    if module is None:
        raise SystemExit(f"no CPU kernels: {reason}")
    mx.set_default_device(mx.cpu)
    bandwidth = copy_bandwidth()
    print(f"mlx {mx.__version__}, {thread_count()} threads; a 256 MB weight is read at {bandwidth / 1e9:.1f} GB/s")
    sizes = [int(size) for size in arguments.sizes.split(",")]
    for size in sizes if arguments.only != "dense" else ():
        weight = mx.random.normal((size, size)) * size**-0.5
        for rows in (1, 8):
            x = mx.random.normal((rows, size))
            mx.eval(x, weight)
            found, found_rounded = [], []
            for name, format in FORMATS.items():
                # Without a global scale: products leave it out, and x would grow.
                packed = mlx_encode(weight, format, format.group_size_for(size))
                scales = packed.scales if packed.biases is None else packed.scales.astype(mx.float32)
                biases = None if packed.biases is None else packed.biases.astype(mx.float32)
                mx.eval(packed.weight, scales)
                kind = module.Kind[name]
                settings = {"group_size": packed.group_size, "bits": format.bits, "mode": format.mode}

                def ours(x, p=packed, s=scales, b=biases, kind=kind, activation_bits=16):
                    return module.marlin_gemm(x, p.weight, s, b, kind, p.group_size, activation_bits)

                def rounded(x, ours=ours):
                    return ours(x, activation_bits=8)

                def theirs(x, p=packed, s=scales, b=biases, settings=settings):
                    return mx.quantized_matmul(x, p.weight, s, b, **settings)

                links = LINKS if rows == 1 else 2
                sides = (ours, theirs, rounded)
                one, calls = ([lambda x=x, f=f, n=n: mx.eval(chain(f, x, n)) for f in sides] for n in (1, links))
                fast, slow, faster = (took / links for took in medians(calls, arguments.repeats, one))
                exact = x @ decode(packed).T
                error, rounding = ((mx.abs(f(x) - exact).max() / mx.abs(exact).max()).item() for f in (ours, rounded))
                read = (packed.weight.nbytes + packed.scales.nbytes) / fast
                print(
                    f"{name} K=N={size} M={rows}: {1e3 * fast:.3f} ms, MLX {1e3 * slow:.3f} ms, {slow / fast:.1f}x,"
                    f" {read / 1e9:.1f} GB/s ({100 * read / bandwidth:.0f} %), error {error:.0e};"
                    f" with 8-bit activations {1e3 * faster:.3f} ms, {slow / faster:.1f}x, error {rounding:.0e}",
                    flush=True,
                )
                found.append((name, fast, slow, error))
                if format.mode != "mxfp8":  # whose weights are no whole numbers: its activations stay as they are
                    found_rounded.append((name, faster, slow, rounding))
            for label, measured in ("packed products", found), ("packed products, 8-bit activations", found_rounded):
                report(
                    Row(
                        f"{label}, {rows} x {size} by {size} x {size}, {thread_count()} threads",
                        ", ".join(f"{name} {1e3 * fast:.2f}" for name, fast, *_ in measured) + " ms",
                        "mx.quantized_matmul: " + ", ".join(f"{1e3 * slow:.2f}" for _, _, slow, _ in measured) + " ms",
                        ", ".join(f"{slow / fast:.1f}x" for _, fast, slow, _ in measured),
                        f"within {max(error for *_, error in measured):.0e} of the unpacked product",
                    ),
                    arguments.rows_file,
                )
    if arguments.only == "packed":
        return
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(thread_count())
    counts = 1, 8, 64, 512
    for size in sizes:
        found = []
        for rows in counts:
            x, weight = mx.random.normal((rows, size)), mx.random.normal((size, size)) * size**-0.5
            mx.eval(x, weight)
            theirs_x, theirs_weight = torch.from_numpy(np.array(x)), torch.from_numpy(np.array(weight))
            links = LINKS if rows == 1 else 1

            def ours(count, x=x, w=weight):
                return mx.eval(chain(lambda x: module.linear(x, w), x, count))

            def theirs(count, x=theirs_x, w=theirs_weight):
                return chain(lambda x: torch.nn.functional.linear(x, w), x, count)

            one, calls = ([lambda f=f, n=n: f(n) for f in (ours, theirs)] for n in (1, links))
            fast, peer = (took / links for took in medians(calls, arguments.repeats, one))
            expected = torch.nn.functional.linear(theirs_x, theirs_weight).numpy()
            error = np.abs(np.array(module.linear(x, weight)) - expected).max() / np.abs(expected).max()
            print(
                f"dense K=N={size} M={rows}: {1e3 * fast:.3f} ms, torch {torch.__version__} {1e3 * peer:.3f} ms,"
                f" {fast / peer:.2f} of torch's time, error {error:.0e}",
                flush=True,
            )
            found.append((fast, peer, error))
        report(
            Row(
                f"dense float32 products, {', '.join(map(str, counts))} x {size} by {size} x {size}, {thread_count()} threads",
                ", ".join(f"{1e3 * fast:.2f}" for fast, *_ in found) + " ms",
                f"torch {torch.__version__}: " + ", ".join(f"{1e3 * peer:.2f}" for _, peer, _ in found) + " ms",
                ", ".join(f"{peer / fast:.2f}x" for fast, peer, _ in found),
                f"within {max(error for *_, error in found):.0e}",
            ),
            arguments.rows_file,
        )


if __name__ == "__main__":
    main()
