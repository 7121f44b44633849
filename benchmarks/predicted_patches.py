"""Time and memory of decoding that `marlin bench --plan` predicts, beside the measured ones, of models decoded by operations.

    python benchmarks/predicted_patches.py [--only blt,spacebyte,evabyte,block_recurrent] [--bytes 48] [--rounds 5]

Random networks of two sizes in float32 and in 4 bits, after a prompt of 256 bytes. The time: operations are timed in turn with
decoding, see `predicted_time.py`, and the middle and the range of the ratios are shown; --processor takes the processor's time
instead of the clock on the wall, on one thread (MARLIN_THREADS=1), which other programs disturb less. The memory: arrays that
are held when the last byte is there. Patches end after 4 bytes, the mean that a plan counts with.
"""

import argparse
import gc
import time
from statistics import median
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from marlin_cli import ContinuingModel
from marlin_cli.engine.continuation import begin
from marlin_cli.models.block_recurrent import BlockRecurrent, BlockRecurrentConfig
from marlin_cli.models.blt import Blt
from marlin_cli.models.blt_config import BltConfig, StackConfig
from marlin_cli.models.evabyte import EvaByte, EvaByteConfig
from marlin_cli.models.spacebyte import SpaceByte
from marlin_cli.models.spacebyte_config import SpaceByteConfig
from marlin_cli.ops.device import choose_device
from marlin_cli.prediction.greedy import decoded
from marlin_cli.prediction.memory import stream_bytes
from marlin_cli.prediction.prediction import DecodingProbe, layer_shapes
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.plan import QuantizationSettings

PROMPT_BYTES = 256


def blt(scale: int) -> Any:
    """4 and 8 layers of bytes 256 and 512 wide around 6 of patches twice as wide."""
    of_bytes = StackConfig(256 * scale, 704 * scale, 4 * scale, 4)
    return Blt(
        BltConfig(
            patcher=of_bytes, encoder=StackConfig(256 * scale, 704 * scale, 4 * scale, 1),
            patches=StackConfig(512 * scale, 1408 * scale, 8 * scale, 6), decoder=of_bytes,
            hash_buckets=1000, threshold=1e6, max_patch_bytes=4, max_bytes=1023,
        )
    )  # fmt: skip


def spacebyte(scale: int) -> Any:
    """2 layers of bytes 256 and 512 wide on both sides of 6 of patches twice as wide."""
    return SpaceByte(
        SpaceByteConfig(
            max_bytes=1023, max_patches=256, patch_rule="periodic", global_layers=6, global_dim=512 * scale,
            global_heads=8 * scale, global_ffn_dim=2048 * scale, initial_layers=2, final_layers=2, local_dim=256 * scale,
            local_heads=4 * scale, local_ffn_dim=1024 * scale, local_window=384,
        )
    )  # fmt: skip


def evabyte(scale: int) -> Any:
    """6 layers 512 and 1,024 wide, windows of 128 bytes."""
    return EvaByte(
        EvaByteConfig(
            d_model=512 * scale, ffn_dim=1376 * scale, heads=8 * scale, layers=6, window_bytes=128, max_bytes=1023
        )
    )  # fmt: skip


def block_recurrent(scale: int) -> Any:
    """The preset, and one of twice its widths; blocks of 128 bytes."""
    return BlockRecurrent(
        BlockRecurrentConfig(
            d_model=512 * scale, ffn_dim=1376 * scale, heads=8 * scale, block_bytes=128, state_vectors=128, max_bytes=1023
        )
    )


class Clocked:
    """A probe whose passes another clock times."""

    def __init__(self, probe: Any, clock: Any) -> None:
        self._probe, self._clock = probe, clock

    def seconds(self) -> float:
        start = self._clock()
        self._probe.seconds()
        return self._clock() - start


NETWORKS = {"blt": blt, "spacebyte": spacebyte, "evabyte": evabyte, "block_recurrent": block_recurrent}


def decoding(network: Any, prompt: bytes, count: int, clock: Any) -> tuple[float, int]:
    """Seconds of a byte of `count`, and bytes that are held behind them beside the weights."""
    gc.collect()
    held = mx.get_active_memory()
    state = begin(network, [prompt])
    mx.eval(state.logits)
    start = clock()
    for _ in decoded(state, count):
        pass
    seconds = (clock() - start) / count
    mx.eval(state.logits)
    return seconds, mx.get_active_memory() - held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(NETWORKS))
    parser.add_argument("--sizes", default="1,2")
    parser.add_argument("--bytes", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processor", action="store_true")
    arguments = parser.parse_args()
    device, clock = choose_device("cpu"), time.process_time if arguments.processor else time.perf_counter
    context, prompt = PROMPT_BYTES + arguments.bytes // 2, bytes(range(PROMPT_BYTES))
    for name in arguments.only.split(","):
        for scale in map(int, arguments.sizes.split(",")):
            plain = NETWORKS[name](scale)
            mx.eval(plain.parameters())
            for bits in ("float32", "nvfp4"):
                network = plain if bits == "float32" else quantize_network(plain, QuantizationSettings(), method="rtn").network
                mx.eval(network.parameters())
                model = ContinuingModel(network, device)
                probe = DecodingProbe(network.config, layer_shapes(network), [context], model.cache_bits, clock)
                if arguments.processor:
                    probe._probes = [(part, Clocked(each, clock), passes) for part, each, passes in probe._probes]
                    probe._kept = {length: Clocked(each, clock) for length, each in probe._kept.items()}
                decoding(network, prompt, 8, clock)
                times, held = [], 0
                for _ in range(arguments.rounds):
                    probe.run(max(1, 16 // probe.unit))
                    seconds, held = decoding(network, prompt, arguments.bytes, clock)
                    times.append(seconds)
                predicted = [sum(parts.values()) for parts in probe.observed(context)]
                ratios = sorted(one / other for one, other in zip(predicted, times, strict=True))
                weights = sum(array.nbytes for _, array in tree_flatten(network.parameters()))
                memory = stream_bytes(network.config, PROMPT_BYTES + arguments.bytes, 32, 32)
                parts = ", ".join(f"{part} {1e6 * each:.0f}" for part, each in probe.seconds_by_part(context).items())
                least = min(predicted), min(times)
                print(
                    f"{name} x {scale} {bits}: least predicted {1e6 * least[0]:.0f} us, measured {1e6 * least[1]:.0f}"
                    f" ({least[0] / least[1]:.2f}), in turn {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f});"
                    f" a stream {memory / 1e6:.1f} MB predicted, {held / 1e6:.1f} held ({memory / held:.2f}), with weights"
                    f" {(memory + weights) / (held + weights):.2f}; {parts}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
