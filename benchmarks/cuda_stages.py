"""Stages of a MegaByte that an NVIDIA GPU takes in one launch: microseconds of a patch's local and global launch, alone.

    python benchmarks/cuda_stages.py [--models demo,167M,1.2B] [--streams 1,16] [--launches 100] [--warps 8] [--loads 8]

Launches follow each other without anything between; medians of three times `--launches`. Random weights of each shape, in
bfloat16 and in 4 (global) and 8 (local) bits; 80 rows are in the global cache. All kernels are compiled first, and not kept.
"""

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx

from marlin_cli.engine.cuda_patches import global_stage, local_stage
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops import cuda_stages
from marlin_cli.ops.cuda_compile import compile_text
from marlin_cli.ops.cuda_driver import Queue, shared_memory
from marlin_cli.ops.cuda_stages import StageOnDevice, shared_bytes, takes_stage
from marlin_cli.ops.device import choose_device
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.plan import settings_from_bits

SHAPES = {
    "demo": {
        "byte_dim": 64, "global_layers": 6, "global_dim": 256, "global_heads": 4, "local_layers": 2, "local_dim": 128,
        "local_heads": 2,
    },
    "167M": {},
    "1.2B": {"global_layers": 24, "global_dim": 2048, "global_heads": 16},
}  # fmt: skip
ROWS, CAPACITY = 80, 256


def launch_of(device: StageOnDevice, queue: Queue, steps: int):
    """A call that queues a patch of the stage, and what it needs to stay alive."""
    stage, streams = device.stage, device.streams
    ids = queue.allocate(4 * streams * steps)
    if stage.first is None:
        device.own_caches(steps)
        lead, added = (queue.allocate(2 * rows * stage.dim) for rows in (streams, steps))
        filters = (0.0, 1.0, 0.0, 0)
        return lambda held=(lead, added, ids): device.decode_sequence(
            held[0].address, held[1].address, 0, 0, filters, 0, steps, held[2].address
        )
    shape = (streams, stage.kv_heads, CAPACITY, stage.head_dim)
    caches = [tuple(mx.random.normal(shape).astype(stage.table.dtype) for _ in range(2)) for _ in stage.layers]
    device.set_caches(caches)
    out = queue.allocate(2 * streams * stage.last.rows)
    return lambda held=(ids, out, caches): device.step(held[0].address, ROWS, 0, held[1].address)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="demo,167M,1.2B")
    parser.add_argument("--streams", default="1,16")
    parser.add_argument("--launches", type=int, default=100)
    parser.add_argument("--warps", type=int, default=cuda_stages.WARPS)
    parser.add_argument("--loads", type=int, default=cuda_stages.LOADS)
    arguments = parser.parse_args()
    cuda_stages.WARPS, cuda_stages.LOADS = arguments.warps, arguments.loads
    choose_device("cuda")
    queue, devices = Queue(), []
    for name in arguments.models.split(","):
        network = MegaByte(MegaByteConfig(**SHAPES[name]))
        network.set_dtype(mx.bfloat16)
        packed = quantize_network(network, settings_from_bits(4, 8, 16), method="rtn").network
        for kind, each in (("bfloat16", network), ("4/8 bits", packed)):
            mx.eval(each.parameters())
            for stage in (local_stage(each), global_stage(each)):
                assert stage is not None
                known = None
                for streams in map(int, arguments.streams.split(",")):
                    if not takes_stage(stage, streams):  # as more warps leave more for each other in shared memory
                        needs = f"a block needs {shared_bytes(stage, streams)} bytes of shared memory of {shared_memory()}"
                        print(f"{name}, {kind}, {streams} streams, {cuda_stages.kernel_name(stage)}: not taken, {needs}")
                        continue
                    device = StageOnDevice(stage, streams, network.config.patch_size, queue, known)
                    known = device.known
                    devices.append((f"{name}, {kind}, {streams} streams, {cuda_stages.kernel_name(stage)}", device))
    with ThreadPoolExecutor() as pool:
        codes = list(pool.map(lambda each: compile_text(each[1].text), devices))
    for (label, device), code in zip(devices, codes, strict=True):
        device.load(code)
        launch, times = launch_of(device, queue, 8), []
        for _ in range(4):
            start = time.perf_counter()
            for _ in range(arguments.launches):
                launch()
            queue.wait()
            times.append((time.perf_counter() - start) / arguments.launches)
        print(f"{label}: {1e6 * statistics.median(times[1:]):.0f} us, {device.blocks} blocks", flush=True)


if __name__ == "__main__":
    main()
