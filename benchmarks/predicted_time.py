"""The time of a decoded byte as `marlin bench --roofline` predicts it, beside the time that it takes: three sizes, two widths.

    python benchmarks/predicted_time.py [--sizes 20M,60M,150M] [--bytes 64] [--rounds 7]

Random MegaByte models in float32 and with a 4-bit global and an 8-bit local part, after a prompt of 512 bytes. The prediction
is made of operations timed alone (see marlin_cli/prediction/prediction.py), in turn with decoding, so that a slow spell of the
machine falls on both; the model itself takes no part in it. Beside it stands what reading alone takes at the bandwidth of this
machine's products.
"""

import argparse
from statistics import median

import mlx.core as mx

from marlin_cli.api import MegaByteModel
from marlin_cli.bench.throughput import ThroughputSettings, measure_throughput
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops.cpu import kernels
from marlin_cli.ops.device import choose_device
from marlin_cli.prediction.prediction import DecodingProbe, layer_shapes
from marlin_cli.prediction.roofline import bandwidth_for, reading_of

PROMPT_BYTES = 512

SIZES = {
    "20M": {"global_dim": 512, "global_layers": 6, "global_heads": 8, "local_dim": 256, "local_layers": 3, "local_heads": 4},
    "60M": {"global_dim": 768, "global_layers": 8, "global_heads": 12, "local_dim": 384, "local_layers": 4, "local_heads": 6},
    "150M": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--bytes", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    device = choose_device("cpu")
    print(f"kernels: {kernels()[1]}; times in us a byte; predicted and measured by part")
    for size in arguments.sizes.split(","):
        mx.random.seed(0)
        network = MegaByte(MegaByteConfig(**SIZES[size]))
        mx.eval(network.parameters())
        plain = MegaByteModel(network, device)
        for label, model in (("float32", plain), ("4/8 bits", plain.quantize(global_bits=4, local_bits=8))):
            report(f"{size}, {label}", model, arguments.bytes, arguments.rounds)


def report(label: str, model: MegaByteModel, decode_bytes: int, rounds: int) -> None:
    """Predict and measure one model in turn, and print both."""
    context = PROMPT_BYTES + decode_bytes // 2
    probe = DecodingProbe(model.config, layer_shapes(model.network), [context], model.cache_bits)
    runs = []
    for _ in range(rounds):
        probe.run(decode_bytes // model.config.patch_size)
        runs += measure_throughput([model], ThroughputSettings(PROMPT_BYTES, decode_bytes, repeats=1))
    times = [1 / run.decode_bytes_per_second.median for run in runs]
    predicted = [sum(parts.values()) for parts in probe.observed(context)]
    ratio = median(one / other for one, other in zip(predicted, times, strict=True))
    expected, measured = median(predicted), median(times)
    parts = probe.seconds_by_part(context)
    found = {part: median(run.decode_seconds_by_part[part] for run in runs) for part in parts}
    reading = sum(reading_of(model, context, bandwidth_for(model))[1].values())
    print(
        f"{label}: predicted {1e6 * expected:.0f}, measured {1e6 * measured:.0f}"
        f" ({1e6 * min(times):.0f} .. {1e6 * max(times):.0f}), ratio in turn {ratio:.2f},"
        f" reading alone {reading / measured:.2f}; "
        + ", ".join(f"{part} {1e6 * parts[part]:.0f} and {1e6 * found[part]:.0f}" for part in parts),
        flush=True,
    )


if __name__ == "__main__":
    main()
