"""MegaByte generation on the CPU against MEGABYTE-pytorch, on the same weights: bytes per second at a context length.

    python benchmarks/megabyte_generation.py [--lengths 512,4096] [--bytes 24] [--rounds 3]

The peer has no cache: it runs a full forward pass for every byte, so its speed at a length is that of one pass. marlin
reads the same prompt once, then decodes. The model is random: global 1024 x 12, local 512 x 4, patches of 8. marlin runs it in
float32, and with a 4-bit global and an 8-bit local part. The greedy bytes of the float32 runs are compared with the
peer's own. Rounds alternate; medians; the same threads on both sides (MARLIN_THREADS).
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from MEGABYTE_pytorch import MEGABYTE

from marlin_cli import load
from marlin_cli.api import MegaByteModel
from marlin_cli.checkpoints import ImportOptions
from marlin_cli.engine.decoding import Lockstep
from marlin_cli.engine.sampling import Noise, Sampling
from marlin_cli.ops.cpu import kernels, thread_count


def decode(model: MegaByteModel, prompt: bytes, count: int) -> tuple[float, bytes]:
    """Seconds a byte of greedy decoding after the prompt is read, and the bytes."""
    state = Lockstep(model.network, [prompt], model.cache_bits)
    mx.eval(state.logits)
    first = mx.argmax(state.logits, axis=-1)
    out = first.tolist()
    state.push(first)
    noise = Noise(0, model.config.vocab_size)
    start = time.perf_counter()
    while len(out) <= count:
        out += state.advance(Sampling(), noise, count + 1 - len(out))[0].tolist()
    return (time.perf_counter() - start) / count, bytes(out)


@torch.no_grad()
def peer_pass(model: MEGABYTE, ids: torch.Tensor) -> tuple[float, int]:
    """Seconds of one forward pass, and the likeliest next byte."""
    start = time.perf_counter()
    logits = model(ids)[:, -1]
    took = time.perf_counter() - start
    return took, int(logits.argmax())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="512,4096")
    parser.add_argument("--bytes", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(thread_count())
    torch.manual_seed(0)
    peer = MEGABYTE(num_tokens=256, dim=(1024, 512), depth=(12, 4), max_seq_len=(1024, 8), dim_head=64, heads=8).eval()
    parameters = sum(parameter.numel() for parameter in peer.parameters())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "peer.pt"
        torch.save(peer.state_dict(), file)
        plain = load(file, device="cpu", options=ImportOptions(heads=8, max_bytes=8192))
        packed = plain.quantize(global_bits=4, local_bits=8)
    print(f"{parameters / 1e6:.0f} M parameters, {thread_count()} threads, kernels: {kernels()[1]}, torch {torch.__version__}")
    rng = np.random.default_rng(0)
    for length in map(int, arguments.lengths.split(",")):
        prompt = rng.integers(0, 256, length, dtype=np.uint8).tobytes()
        times: dict[str, list[float]] = {"peer": [], "float32": [], "4/8 bits": []}
        for _ in range(arguments.rounds):
            ids = torch.tensor([list(prompt)])
            expected = []
            for _ in range(3):
                took, byte = peer_pass(peer, ids)
                times["peer"].append(took)
                expected.append(byte)
                ids = torch.cat([ids, torch.tensor([[byte]])], dim=1)
            took, out = decode(plain, prompt, arguments.bytes)
            times["float32"].append(took)
            assert list(out[:3]) == expected, "greedy bytes differ from the peer's"
            times["4/8 bits"].append(decode(packed, prompt, arguments.bytes)[0])
        rates = {name: 1 / statistics.median(values) for name, values in times.items()}
        print(
            f"length {length}: MEGABYTE-pytorch {rates['peer']:.2f} bytes/s; marlin float32 {rates['float32']:.1f}"
            f" ({rates['float32'] / rates['peer']:.0f}x), 4/8 bits {rates['4/8 bits']:.1f}"
            f" ({rates['4/8 bits'] / rates['peer']:.0f}x)",
            flush=True,
        )


if __name__ == "__main__":
    main()
