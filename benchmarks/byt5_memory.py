"""Memory of ByT5 on the CPU: weights of byt5-small, what a decoder holds of an input, and the peak while a long one is encoded.

    python benchmarks/byt5_memory.py [--lengths 8192,32768] [--rows 32768]

Bytes of arrays, and the growth of a fresh process' resident memory around each step (Linux). The weights are random, saved
and read again. Long inputs go through one encoder layer with the heads of byt5-small, since twelve take minutes; what a
decoder holds of an input depends on its own layers and heads alone, which are those of byt5-small.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from marlin_cli import ByT5Config, ByT5Model
from marlin_cli.engine.encoder_decoder import AnswerState, encode
from marlin_cli.models.byt5 import ByT5
from marlin_cli.ops.cpu import kernels

MIB = 1 << 20
LONG = ByT5Config(d_model=256, ffn_dim=512, encoder_layers=1)


def resident_bytes() -> int:
    """Memory of this process that is in use now."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmRSS")


def peak_bytes() -> int:
    """The most that this process has had in use."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_a_process(task: Callable[..., Any], *arguments: Any) -> Any:
    """What `task(*arguments)` returns in a process of its own, whose memory is nobody else's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(task, arguments)


def save(folder: Path, bits: int | None) -> None:
    """A byt5-small in float32, or packed."""
    model = ByT5Model.from_config(ByT5Config(), device="cpu")
    (model if bits is None else model.quantize(bits=bits)).save(folder)


def weights(folder: Path, dtype: str) -> tuple[int, int]:
    """Bytes of the arrays of a model, and the growth of the resident memory by reading them."""
    kernels()
    before = resident_bytes()
    model = ByT5Model.from_pretrained(folder, device="cpu", dtype=getattr(mx, dtype))
    mx.eval(model.network.parameters())
    return sum(array.nbytes for _, array in tree_flatten(model.network.parameters())), resident_bytes() - before


def random_source(length: int) -> list[int]:
    return [int(value) for value in np.random.default_rng(0).integers(3, 259, length)]


def encoding(length: int) -> tuple[int, float]:
    """Growth of the peak by encoding an input, and seconds."""
    network = ByT5Model.from_config(LONG, device="cpu").network
    mx.eval(network.parameters(), encode(network, mx.array([[1] * 64])))
    ids, before, start = mx.array([random_source(length)]), peak_bytes(), time.perf_counter()
    mx.eval(encode(network, ids))
    return peak_bytes() - before, time.perf_counter() - start


def memory(rows: int, bits: int) -> int:
    """Bytes of the keys and values that the decoder reads of an input: in bfloat16 for 16 bits."""
    network = ByT5(ByT5Config(d_model=64, ffn_dim=64, encoder_layers=1))
    if bits == 16:
        states = mx.zeros((1, rows, 64), dtype=mx.bfloat16)
        network.set_dtype(mx.bfloat16)
        return sum(each.nbytes for each in network.memory(states))
    return AnswerState(network, [random_source(rows)], memory_bits=bits).memory_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="8192,32768")
    parser.add_argument("--rows", type=int, default=32768)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = {}
        kinds = ("bfloat16", None), ("float32", None), ("8 bits (mxfp8)", 8), ("4 bits (nvfp4)", 4)
        for label, bits in kinds:
            dtype = label if bits is None else "float32"
            folder = Path(name) / str(bits)
            if not folder.exists():
                in_a_process(save, folder, bits)
            found[label] = in_a_process(weights, folder, dtype)
            held, grown = found[label]
            print(
                f"weights of byt5-small, {label}: arrays {held / MIB:.0f} MiB, resident {grown / MIB:.0f} MiB"
                f" ({held / found['bfloat16'][0]:.1%} of the arrays in bfloat16)",
                flush=True,
            )
    plain = in_a_process(memory, arguments.rows, 16)
    for bits in (16, 8, 4):
        held = in_a_process(memory, arguments.rows, bits)
        print(
            f"what the decoder holds of {arguments.rows} bytes, {bits} bits: {held / MIB:.1f} MiB ({held / plain:.1%})",
            flush=True,
        )
    for length in map(int, arguments.lengths.split(",")):
        grown, seconds = in_a_process(encoding, length)
        scores = LONG.heads * length * length * 4
        print(
            f"encoding {length} bytes, one layer: peak grows by {grown / MIB:.0f} MiB in {seconds:.1f} s"
            f" (scores of all heads at once would be {scores / MIB:.0f} MiB)",
            flush=True,
        )


if __name__ == "__main__":
    main()
