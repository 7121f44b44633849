"""What a step of ByT5's decoder takes on an NVIDIA GPU, and what reading the inputs takes, by streams and format.

    python benchmarks/cuda_decoder.py [--streams 1,8,16] [--formats bfloat16,nvfp4] [--source 257] [--launches 20]
        [--warps 8] [--loads 8] [--parts]

byt5-small's shape with random weights; a launch takes 8 steps; of --loads decoders in 4 bits have half under way.
Microseconds a step of launches that stand in one queue, and the time of all that comes before the first step. With --parts,
of launches that keep account of it, where the time of a step goes.
"""

import argparse
import statistics
import time

import mlx.core as mx
import numpy as np

from marlin_cli.engine.cuda_answers import GREEDY, CudaAnswers
from marlin_cli.engine.encoder_decoder import AnswerState, encode
from marlin_cli.models.byt5 import ByT5
from marlin_cli.models.byt5_config import ByT5Config
from marlin_cli.ops import cuda_stages
from marlin_cli.ops.device import choose_device
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.plan import QuantizationSettings

STEPS = 8


def network_of(name: str) -> ByT5:
    mx.random.seed(0)
    network = ByT5(ByT5Config())
    network.set_dtype(mx.bfloat16)
    if name != "bfloat16":
        settings = QuantizationSettings(
            encoder_format=name, decoder_format=name, cross_format=name, wo_format="mxfp8" if name.endswith("fp4") else name,
            group_size=32 if name.startswith("int") else None,
        )  # fmt: skip
        network = quantize_network(network, settings, method="rtn").network
    mx.eval(network.parameters())
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="1,8,16")
    parser.add_argument("--formats", default="bfloat16,nvfp4")
    parser.add_argument("--source", type=int, default=257)
    parser.add_argument("--launches", type=int, default=20)
    parser.add_argument("--warps", type=int, default=cuda_stages.WARPS)
    parser.add_argument("--loads", type=int, default=cuda_stages.LOADS)
    parser.add_argument("--parts", action="store_true")
    arguments = parser.parse_args()
    cuda_stages.WARPS, cuda_stages.LOADS = arguments.warps, arguments.loads
    if arguments.parts:
        sizes_of = cuda_stages.sizes_of
        cuda_stages.sizes_of = lambda *given, **options: sizes_of(*given, **{**options, "timed": True})
    choose_device("cuda")
    for name in arguments.formats.split(","):
        network = network_of(name)
        for streams in map(int, arguments.streams.split(",")):
            sources = np.random.default_rng(0).integers(3, 259, (streams, arguments.source)).tolist()
            encoding = []
            for _ in range(6):
                start = time.perf_counter()
                mx.eval(encode(network, mx.array(sources)))
                encoding.append(time.perf_counter() - start)
            beginnings = []
            for _ in range(4):
                start = time.perf_counter()
                state = AnswerState(network, sources)
                beginnings.append(time.perf_counter() - start)
            assert isinstance(state._answers, CudaAnswers), name
            group, queue = state._answers._groups[0], state._answers._queue
            group.feed(np.zeros((group.streams, 1), np.int32), 0, 1, 0, GREEDY, frozenset())
            took = []
            before = group.seconds()
            for _ in range(4):
                queue.wait()
                start = time.perf_counter()
                for launch in range(arguments.launches):
                    number = group.feed(None, 1 + launch * STEPS % 128, STEPS, 0, GREEDY, frozenset())
                queue.wait()
                took.append((time.perf_counter() - start) / arguments.launches / STEPS)
            steps = 4 * arguments.launches * STEPS
            spent = {kind: (seconds - before[kind]) / steps for kind, seconds in group.seconds().items()}
            if arguments.parts:
                print("  us: " + ", ".join(f"{kind} {1e6 * seconds:.1f}" for kind, seconds in spent.items() if seconds))
            ids, costs = group.read(number, STEPS)
            print(
                f"{name}, {streams} streams: {statistics.median(took[1:]) * 1e6:.1f} us a step; "
                f"encoder {statistics.median(encoding[1:]) * 1e3:.2f} ms, with what decoding begins with "
                f"{statistics.median(beginnings[1:]) * 1e3:.2f} ms (first {beginnings[0] * 1e3:.0f}); "
                f"ids {ids[0, :4].tolist()}, cost {costs[0, 0]:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
