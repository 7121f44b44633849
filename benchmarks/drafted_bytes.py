"""The same bytes with drafts and without: long outputs of every layout and format, greedy and sampled, alone and together.

    python benchmarks/drafted_bytes.py [--bytes 64k] [--formats float32,nvfp4,mxfp8,int4] [--layouts prefix,paper,..]
        [--streams 1,5]

Small random networks write `--bytes` bytes in all, without drafts, with drafts out of their own text (auto), with drafts that
are always wrong, with ones that are right but for a byte in twelve, and with ones that are always right. One line for each; it
ends with an error where a byte differs. About half an hour with the defaults.
"""

import argparse
import os
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("MARLIN_ROWS", "exact")

import mlx.core as mx  # noqa: E402 (rows are exact from the start)
from mlx.utils import tree_map  # noqa: E402

from marlin_cli.commands.options import parse_size  # noqa: E402
from marlin_cli.engine.drafts import Draft, DraftSource  # noqa: E402
from marlin_cli.engine.sampling import Sampling  # noqa: E402
from marlin_cli.engine.schedulers import scheduler_of  # noqa: E402
from marlin_cli.engine.scheduling import Request, SchedulerLimits  # noqa: E402
from marlin_cli.engine.speculation import AUTO, OFF, Speculated, Speculation  # noqa: E402
from marlin_cli.engine.stopping import Stopping  # noqa: E402
from marlin_cli.models.megabyte import MegaByte  # noqa: E402
from marlin_cli.models.megabyte_config import MegaByteConfig, StageConfig  # noqa: E402
from marlin_cli.quantization.apply import quantize_network  # noqa: E402
from marlin_cli.quantization.plan import QuantizationSettings  # noqa: E402

SIZES: dict[str, Any] = {
    "patch_size": 8, "max_bytes": 72 << 10, "global_layers": 2, "global_dim": 64, "global_heads": 2, "local_layers": 1,
    "local_dim": 64, "local_heads": 2,
}  # fmt: skip
LUCID = {"layout": "megabyte_pytorch", "byte_dim": 16, "token_shift": True, "ffn": "gelu", "ffn_bias": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "prefix": {},
    # A byte has 64 channels there, which every format packs.
    "paper": {
        "layout": "paper", "patch_size": 4, "global_dim": 256, "global_layers": 1, "global_positions": "learned",
        "ffn": "relu", "norm": "layernorm", "qk_norm": True,
    },
    "megabyte_pytorch": {**LUCID, "global_positions": "learned"},
    "3 stages": {
        **LUCID, "global_positions": "rope", "local_positions": "none",
        "middle": (StageConfig(length=2, layers=1, dim=64, heads=2, ffn_dim=128, positions="learned"),),
    },
}  # fmt: skip


class Knowing:
    """Drafts what will come, but for one byte in so many; 0: for none."""

    is_free = True

    def __init__(self, future: bytes, wrong_every: int) -> None:
        rng = random.Random(0)
        self._future = bytes(byte ^ (wrong_every > 0 and rng.randrange(wrong_every) == 0) for byte in future)

    def push(self, data: bytes) -> None:
        self._future = self._future[len(data) :]

    def draft(self, count: int) -> Draft | None:
        return Draft(self._future[:count], 64) if self._future else None


def network_of(layout: str, format: str) -> MegaByte:
    mx.random.seed(0)
    network = MegaByte(MegaByteConfig(**{**SIZES, **LAYOUTS[layout]}))
    network.update(
        tree_map(lambda a: mx.random.normal(a.shape) * (0.3 if a.ndim == 1 else a.shape[-1] ** -0.5), network.parameters())
    )
    mx.eval(network.parameters())
    if format == "float32":
        return network
    return quantize_network(network, QuantizationSettings(global_format=format, local_format=format)).network


Source = Callable[[Request, bytes], DraftSource]


def run(network: MegaByte, requests: Sequence[Request], source: Source | None = None) -> tuple[list[bytes], list[Speculated]]:
    """What each wrote, and what came of drafts."""
    scheduler = scheduler_of(network, SchedulerLimits(max_streams=len(requests)), draft_source=source)
    order = [scheduler.admit(request) for request in requests]
    data, told = dict.fromkeys(order, b""), []
    while scheduler.running or scheduler.waiting:
        for piece in scheduler.advance():
            data[piece.stream] += piece.data
            told += [piece.speculated] if piece.speculated else []
    return [data[number] for number in order], told


def compare(network: MegaByte, total: int, streams: int, temperature: float, what: str) -> None:
    """Raise where a byte differs."""
    rng = random.Random(streams)
    prompts = [rng.randbytes(3 + 11 * number) for number in range(streams)]
    plain = [
        Request(prompt, Stopping(total // streams), Sampling(temperature, seed=number), speculation=OFF)
        for number, prompt in enumerate(prompts)
    ]
    expected, _ = run(network, plain)
    future = dict(zip(prompts, expected, strict=True))
    ways: dict[str, tuple[Speculation, Source | None]] = {
        "auto": (AUTO, None),
        "wrong": (Speculation(4), lambda request, prompt: Knowing(future[prompt], 1)),
        "sometimes wrong": (Speculation(4), lambda request, prompt: Knowing(future[prompt], 12)),
        "right": (Speculation(8), lambda request, prompt: Knowing(future[prompt], 0)),
    }
    for name, (speculation, source) in ways.items():
        asked = [Request(each.prompt, each.stopping, each.sampling, speculation=speculation) for each in plain]
        start = time.perf_counter()
        found, told = run(network, asked, source)
        assert found == expected, f"{what}, {name}: bytes differ"
        drafted, accepted = sum(each.drafted_bytes for each in told), sum(each.accepted_bytes for each in told)
        written, passes = sum(map(len, found)), sum(each.passes for each in told)
        print(
            f"{what}, drafts {name}: {written:,} bytes equal, {accepted:,} of {drafted:,} drafted bytes accepted,"
            f" {passes / written:.4f} passes a byte, {time.perf_counter() - start:.1f} s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", default="64k")
    parser.add_argument("--formats", default="float32,nvfp4,mxfp8,int4")
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--streams", default="1,5")
    options = parser.parse_args()
    for format in options.formats.split(","):
        for layout in options.layouts.split(","):
            network = network_of(layout, format)
            for streams in map(int, options.streams.split(",")):
                for temperature in (0.0, 0.8):
                    what = f"{layout}, {format}, {streams} streams, temperature {temperature}"
                    compare(network, parse_size(options.bytes, "--bytes"), streams, temperature, what)


if __name__ == "__main__":
    main()
