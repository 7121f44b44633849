"""MegaByte generation on an NVIDIA GPU: marlin in 16 bits and in 4 and 8, against torch with a CUDA graph a patch, in one run.

    python benchmarks/cuda_megabyte.py [--models demo,166M,1.2B] [--streams 1,16] [--bytes 256] [--prompt 512] [--rounds 5]

Bytes a second of all streams together, after the prompt is read, ids on the host; medians of rounds that alternate, the first
one for warming up. `--operations` has marlin's own path without kernels for whole patches beside them. Greedy bytes of the
bfloat16 runs are compared: torch and marlin round at different places, so they part at some near tie. So their predictions of
the same bytes, the prompt and what torch wrote, are compared too: divergence in bits a byte.
"""

import argparse
import statistics
import time

import mlx.core as mx
import numpy as np
import torch
from graph_torch import GraphTorch
from measured import Row, add_rows_option, report
from mlx.utils import tree_flatten

from marlin_cli.api import MegaByteModel
from marlin_cli.engine import decoding
from marlin_cli.engine.decoding import Lockstep
from marlin_cli.engine.sampling import Noise, Sampling
from marlin_cli.engine.scoring import log2_predictions
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops.device import choose_device
from marlin_cli.quality.quality import kl_divergence
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.plan import settings_from_bits

SHAPES = {
    "166M": {},
    "1.2B": {"global_layers": 24, "global_dim": 2048, "global_heads": 16},
}


def model_of(name: str) -> MegaByteModel:
    """The demo, or random weights of a shape."""
    if name == "demo":
        return MegaByteModel.from_pretrained("megabyte-demo", device="cuda", dtype=mx.bfloat16)
    device = choose_device("cuda")
    mx.random.seed(0)
    network = MegaByte(MegaByteConfig(**SHAPES[name]))
    network.set_dtype(mx.bfloat16)
    mx.eval(network.parameters())
    return MegaByteModel(network, device)


def marlin_run(model: MegaByteModel, prompts: list[bytes], count: int) -> tuple[float, bytes]:
    """Seconds of greedy decoding after the prompts are read, and the bytes of the first stream."""
    state, noise = Lockstep(model.network, prompts, model.cache_bits), Noise(0, model.config.vocab_size)
    out: list[int] = []
    mx.synchronize()
    start = time.perf_counter()
    while len(out) < count:
        out += state.advance(Sampling(), noise, count - len(out))[0].tolist()
    took = time.perf_counter() - start
    mx.synchronize()
    return took, bytes(out)


def divergence(model: MegaByteModel, peer: GraphTorch, data: bytes) -> float:
    """KL(torch || marlin) in bits a byte, of what both predict of the same bytes."""
    expected = mx.array(peer.log2_predictions(data))
    found = log2_predictions(model.network, np.frombuffer(data, np.uint8)[None])[0].astype(mx.float32)
    return float(kl_divergence(expected, found).mean().item())


def torch_run(peer: GraphTorch, prompt: bytes, count: int) -> tuple[float, bytes]:
    peer.read(prompt)
    torch.cuda.synchronize()
    start = time.perf_counter()
    out = peer.decode(count // peer.config.patch_size)[0].tolist()
    return time.perf_counter() - start, bytes(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="demo,166M,1.2B")
    parser.add_argument("--streams", default="1,16")
    parser.add_argument("--bytes", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--operations", action="store_true")
    add_rows_option(parser)
    arguments = parser.parse_args()
    prompt = np.random.default_rng(0).integers(97, 123, arguments.prompt, dtype=np.uint8).tobytes()
    whole_patches = decoding.patch_decoder
    for name in arguments.models.split(","):
        plain = model_of(name)
        parameters = sum(array.size for _, array in tree_flatten(plain.network.parameters()))
        packed = MegaByteModel(
            quantize_network(plain.network, settings_from_bits(4, 8, 16), method="rtn").network, plain.device
        )
        mx.eval(packed.network.parameters())
        for streams in map(int, arguments.streams.split(",")):
            patch = plain.config.patch_size
            peer = GraphTorch(plain.network, torch.bfloat16, streams, (arguments.prompt + arguments.bytes) // patch + 9)
            peer.read(prompt)
            peer.capture()
            sides = {
                "bfloat16": lambda p=plain, n=streams: marlin_run(p, [prompt] * n, arguments.bytes),
                "4/8 bits": lambda p=packed, n=streams: marlin_run(p, [prompt] * n, arguments.bytes),
                "torch": lambda p=peer: torch_run(p, prompt, arguments.bytes),
            }
            if arguments.operations:
                sides |= {f"{key} by operations": sides[key] for key in ("bfloat16", "4/8 bits")}
            rates: dict[str, list[float]] = {key: [] for key in sides}
            written: dict[str, bytes] = {}
            for _ in range(arguments.rounds + 1):
                for key, run in sides.items():
                    decoding.patch_decoder = (lambda *_: None) if "operations" in key else whole_patches
                    took, written[key] = run()
                    rates[key].append(arguments.bytes * streams / took)
            medians = {key: statistics.median(each[1:]) for key, each in rates.items()}
            for key in sides:
                if key == "torch":
                    continue
                compared = "torch" if "operations" in key or key == "bfloat16" else key
                share = np.mean([a == b for a, b in zip(written[key], written[compared], strict=True)])
                same = next((i for i, (a, b) in enumerate(zip(written[key], written[compared], strict=True)) if a != b), None)
                outputs = (
                    "other bytes"
                    if compared == key
                    else f"first {arguments.bytes if same is None else same} bytes the same, {share:.0%} of all"
                )
                if key in ("bfloat16", "4/8 bits") and streams == 1:
                    model = plain if key == "bfloat16" else packed
                    outputs += f", divergence {divergence(model, peer, prompt + written['torch']):.1e} bits a byte"
                report(
                    Row(
                        f"MegaByte, {parameters / 1e6:,.0f} M, {key}, {streams} streams",
                        f"{medians[key]:,.0f} bytes/s",
                        f"torch {torch.__version__}, bfloat16, a graph a patch: {medians['torch']:,.0f} bytes/s",
                        f"{medians[key] / medians['torch']:.2f}x",
                        outputs,
                    ),
                    arguments.rows_file,
                )
            del peer
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
