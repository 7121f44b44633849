"""The time of a decoded byte as memory bandwidth predicts it, beside the time that it takes: three sizes, two widths.

    python benchmarks/predicted_time.py [--sizes 20M,60M,150M] [--bytes 64] [--rounds 5]

Random MegaByte models in float32 and with a 4-bit global and an 8-bit local part, after a prompt of 512 bytes. The prediction
is `marlin bench --roofline`'s: bytes that a byte must read, by part, over the bandwidth at which this machine's products read
weights of that format, measured in the same run. What else takes time (activations, sampling, threads that wait) it leaves
out, and that a small part stays in the processor's caches; so it is a bound for large models, and says less of small ones.
"""

import argparse

import mlx.core as mx

from marlin_cli.api import MegaByteModel
from marlin_cli.bench.roofline import bandwidth_for, roofline_of
from marlin_cli.bench.throughput import ThroughputSettings, measure_throughput
from marlin_cli.models.megabyte import MegaByte, MegaByteConfig
from marlin_cli.ops.cpu import kernels
from marlin_cli.ops.device import choose_device

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
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device = choose_device("cpu")
    settings = ThroughputSettings(PROMPT_BYTES, arguments.bytes, arguments.rounds)
    print(f"kernels: {kernels()[1]}; times in us a byte; predicted over measured")
    for size in arguments.sizes.split(","):
        mx.random.seed(0)
        network = MegaByte(MegaByteConfig(**SIZES[size]))
        mx.eval(network.parameters())
        plain = MegaByteModel(network, device)
        for label, model in (("float32", plain), ("4/8 bits", plain.quantize(global_bits=4, local_bits=8))):
            [speed] = measure_throughput([model], settings)
            times = [1 / rate for rate in speed.decode_bytes_per_second.samples]
            measured = 1 / speed.decode_bytes_per_second.median
            context = PROMPT_BYTES + arguments.bytes // 2
            found = roofline_of(model, context, measured, bandwidth_for(model))
            parts = ", ".join(f"{part} {1e6 * seconds:.0f}" for part, seconds in found.seconds_by_part.items())
            rates = ", ".join(f"{kind} {rate / 1e9:.1f}" for kind, rate in found.matvec_bytes_per_second.items())
            print(
                f"{size}, {label}: predicted {1e6 * found.share * measured:.0f}, measured {1e6 * measured:.0f}"
                f" ({1e6 * min(times):.0f} .. {1e6 * max(times):.0f}): {found.share:.2f}; {parts}; GB/s {rates}",
                flush=True,
            )


if __name__ == "__main__":
    main()
