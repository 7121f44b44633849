"""The time of a decoded byte that `marlin bench --plan` predicts, beside the measured one, where patches are of unequal length.

    python benchmarks/predicted_patches.py [--bytes 48] [--rounds 7]

A random BLT and a random SpaceByte in float32 after a prompt of 256 bytes; predictions are timed in turn with decoding, see
`predicted_time.py`. The BLT ends a patch after 4 bytes, the mean that a plan counts with.
"""

import argparse
from statistics import median

import mlx.core as mx

from marlin_cli import ContinuingModel
from marlin_cli.bench.throughput import ThroughputSettings, measure_throughput
from marlin_cli.models.blt import Blt
from marlin_cli.models.blt_config import BltConfig, StackConfig
from marlin_cli.models.spacebyte import SpaceByte
from marlin_cli.models.spacebyte_config import SpaceByteConfig
from marlin_cli.ops.device import choose_device
from marlin_cli.prediction.prediction import DecodingProbe, layer_shapes

PROMPT_BYTES = 256

OF_BYTES = StackConfig(256, 704, 4, 4)
BLT = BltConfig(
    patcher=OF_BYTES, encoder=StackConfig(256, 704, 4, 1), patches=StackConfig(512, 1408, 8, 6), decoder=OF_BYTES,
    hash_buckets=1000, threshold=1e6, max_patch_bytes=4, max_bytes=1023,
)  # fmt: skip
SPACEBYTE = SpaceByteConfig(
    max_bytes=1023, max_patches=256, patch_rule="utf8", global_layers=6, global_dim=512, global_heads=8, initial_layers=2,
    final_layers=2, local_dim=256, local_heads=4, local_window=384,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    device = choose_device("cpu")
    context = PROMPT_BYTES + arguments.bytes // 2
    for name, network in (("BLT", Blt(BLT)), ("SpaceByte", SpaceByte(SPACEBYTE))):
        mx.eval(network.parameters())
        model = ContinuingModel(network, device)
        probe = DecodingProbe(network.config, layer_shapes(network), [context], model.cache_bits)
        times = []
        for _ in range(arguments.rounds):
            probe.run(arguments.bytes // probe.unit)
            run = measure_throughput([model], ThroughputSettings(PROMPT_BYTES, arguments.bytes, repeats=1))[0]
            times.append(1 / run.decode_bytes_per_second.median)
        predicted = [sum(parts.values()) for parts in probe.observed(context)]
        ratio = median(one / other for one, other in zip(predicted, times, strict=True))
        parts = ", ".join(f"{part} {1e6 * seconds:.0f}" for part, seconds in probe.seconds_by_part(context).items())
        print(
            f"{name}: predicted {1e6 * median(predicted):.0f} us, measured {1e6 * median(times):.0f}"
            f" ({1e6 * min(times):.0f} .. {1e6 * max(times):.0f}), ratio in turn {ratio:.2f}; predicted {parts}",
            flush=True,
        )


if __name__ == "__main__":
    main()
