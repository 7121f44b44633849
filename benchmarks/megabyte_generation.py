"""MegaByte generation on the CPU against MEGABYTE-pytorch, on the same weights: at a context length, and a whole context.

    python benchmarks/megabyte_generation.py [--lengths 512,4096] [--bytes 24] [--rounds 3] [--whole 0]

The peer has no cache: it runs a full forward pass for every byte, so its speed at a length is that of one pass. marlin
reads the same prompt once, then decodes. The model is random: global 1024 x 12, local 512 x 4, patches of 8. marlin runs it in
float32, and with a 4-bit global and an 8-bit local part. The greedy bytes of the float32 runs are compared with the
peer's own. Rounds alternate; medians; the same threads on both sides (MARLIN_THREADS).

`--whole N` generates N bytes from nothing: marlin for real. The peer would take hours, so its passes are timed at eight
lengths and summed over all N by straight lines between them: an estimate. Its own greedy bytes are compared at the first
16 places and, marlin's bytes given, at the places timed.
"""

import argparse
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from measured import Row, add_rows_option, report
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


def peer_bytes(peer: MEGABYTE, count: int) -> bytes:
    """Its own greedy bytes from nothing, every one by a full pass, as its `generate` does."""
    ids = torch.empty((1, 0), dtype=torch.long)
    for _ in range(count):
        ids = torch.cat([ids, torch.tensor([[peer_pass(peer, ids)[1]]])], dim=1)
    return bytes(ids[0].tolist())


def whole(peer: MEGABYTE, plain: MegaByteModel, packed: MegaByteModel, count: int, rounds: int, file: Path | None) -> None:
    """A whole context from nothing."""
    runs = {"float32": decode(plain, b"", count - 1), "4/8 bits": decode(packed, b"", count - 1)}
    written = runs["float32"][1]
    assert written[:16] == peer_bytes(peer, 16), "the first greedy bytes differ from the peer's"
    # Padded to whole patches, so a pass costs the same within one; these lengths end one.
    lengths = [8, *(max(8, count * part // 64 // 8 * 8) for part in (4, 8, 16, 32, 48, 56)), count]
    passes: dict[int, list[float]] = {length: [] for length in lengths}
    same = 0
    for _ in range(rounds):
        for length in lengths:
            took, byte = peer_pass(peer, torch.tensor([list(written[:length])]))
            passes[length].append(took)
            same += length < count and byte == written[length]
    medians = [statistics.median(times) for times in passes.values()]
    print("peer, ms a pass: " + ", ".join(f"{n} bytes {1e3 * took:.0f}" for n, took in zip(passes, medians, strict=True)))
    package = f"MEGABYTE-pytorch {version('MEGABYTE-pytorch')}"
    estimate = float(np.interp(np.arange(count), lengths, medians).sum())
    for name, (took, _) in runs.items():
        report(
            Row(
                f"MegaByte, 147 M, {name}, {count:,} bytes from nothing, {thread_count()} threads",
                f"{took * count:.1f} s",
                f"{package}: {estimate:,.0f} s, estimated from passes at {len(lengths)} lengths",
                f"{estimate / (took * count):.0f}x",
                f"float32: first 16 bytes the same, and {same} of {rounds * (len(lengths) - 1)} after marlin's"
                if name == "float32"
                else "packed: other bytes",
            ),
            file,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="512,4096")
    parser.add_argument("--bytes", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole", type=int, default=0)
    add_rows_option(parser)
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
    for length in map(int, filter(None, arguments.lengths.split(","))):
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
        for name in ("float32", "4/8 bits"):
            report(
                Row(
                    f"MegaByte, 147 M, {name}, the bytes after {length}, {thread_count()} threads",
                    f"{rates[name]:.1f} bytes/s",
                    f"MEGABYTE-pytorch {version('MEGABYTE-pytorch')}: {rates['peer']:.2f} bytes/s",
                    f"{rates[name] / rates['peer']:.0f}x",
                    "greedy bytes the same" if name == "float32" else "packed: other bytes",
                ),
                arguments.rows_file,
            )
    if arguments.whole:
        whole(peer, plain, packed, arguments.whole, arguments.rounds, arguments.rows_file)


if __name__ == "__main__":
    main()
