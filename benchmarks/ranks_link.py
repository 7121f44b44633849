"""How long GPUs take to give each other parts of a sum, by `ranks.py link`: with kernels/exchange.cuh."""

import argparse
import json
import time
from pathlib import Path

from launched import last_document, run

TURNS = 4000
KERNEL = """
extern "C" __global__ void turns(
    unsigned long long* words, const marlin::Exchange* exchange, unsigned turn, int count, float* out) {
  using namespace marlin;
  Grid grid(words);
  PartSums parts;
  parts.begin(exchange, turn), grid.heed(parts.host());
  const int place = blockIdx.x * blockDim.x + threadIdx.x;
  float value = 1.0f;
  for (int i = 0; i < count; i++) {
    parts.next(), parts.send(place, value);
    value = parts.sum(grid, place, value) * (1.0f / RANKS);
  }
  out[place] = value;
}
"""


def link(given: argparse.Namespace, folder: Path) -> None:
    command = [str(Path(__file__).with_name("ranks.py")), "turns", "--device", "cuda"]
    found = last_document(run(command, given.ranks, given, folder).written[0])
    for values, microseconds in found.items():
        print(f"a sum of {values} values over {given.ranks} GPUs: {microseconds:.2f} us")


def turns(given: argparse.Namespace) -> None:
    """What a rank does."""
    from ctypes import c_int32, c_uint32, c_uint64

    import mlx.core as mx
    import numpy as np

    from marlin_cli.ops.cuda_compile import compiled
    from marlin_cli.ops.cuda_exchange import MOST_PLACES, NoExchange, exchange_among
    from marlin_cli.ops.cuda_text import constants
    from marlin_cli.ops.kernel_source import code
    from marlin_cli.ranks import joined

    mx.set_default_device(mx.gpu)
    with joined() as ranks, ranks.computing():
        exchange = exchange_among(ranks)
        if isinstance(exchange, NoExchange):
            raise exchange
        text = constants(mx.bfloat16, {"RANKS": ranks.size, "PLACES": MOST_PLACES})
        text += "".join(code(name) for name in ("packed.cuh", "ptx.cuh", "grid.cuh", "exchange.cuh")) + KERNEL
        [machine_code] = compiled([text])
        found = {}
        for blocks, threads in ((1, 1), (1, 32), (128, 32), (128, 512)):
            words, out = exchange.queue.allocate(256), exchange.queue.allocate(4 * blocks * threads)
            launch = exchange.queue.load(machine_code, "turns", blocks, threads, 0)
            for _ in range(2):
                exchange.queue.wait()
                ranks.gather(b"ready")
                record, turn = exchange.take(TURNS)
                begun = time.perf_counter()
                launch(c_uint64(words.address), c_uint64(record), c_uint32(turn), c_int32(TURNS), c_uint64(out.address))
                exchange.queue.wait()
                found[blocks * threads] = 1e6 * (time.perf_counter() - begun) / TURNS
            exchange.check()
            assert (np.frombuffer(exchange.queue.read(out.address, out.size), np.float32) == 1).all()
    print(json.dumps(found))
