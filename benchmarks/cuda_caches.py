"""Whole patches on an NVIDIA GPU over keys and values of 16, 8 and 4 bits: bytes a second by context, and whether bytes agree.

    python benchmarks/cuda_caches.py [--models demo,166M] [--parts 166M] [--contexts 2048,28672,131072] [--bytes 512]
        [--rounds 3] [--check 128] [--operations]

166M is marlin's own shape and `paper` the same in the paper's layout, with random weights.

Bytes that are drawn after the prompt is read, ids on the host; the best of some rounds. Of models in `--parts` the time of the
launches by part too, from kernels that keep account of it. `--check N` has the demo write N greedy bytes by whole patches and
operation by operation, which round at different places, in float32 and in bfloat16: the share that is the same, and the first
that is not. `--operations` measures decoding operation by operation too, behind the first context. Kernels are compiled before
anything is timed, all at once.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from marlin_cli.api import MegaByteModel
from marlin_cli.engine import cuda_patches, decoding
from marlin_cli.engine.cache import ROWS_PER_PAGE, CacheBits
from marlin_cli.engine.decoding import Lockstep
from marlin_cli.engine.sampling import Noise, Sampling
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops import cuda_stages, cuda_text
from marlin_cli.ops.cuda_compile import compiled

BITS = (16, 8, 4)
TEXT = Path(__file__).parent.parent / "LOG.md"


def network_of(name: str, dtype: mx.Dtype) -> MegaByte:
    """The demo, or random weights of a shape with room for a long context."""
    if name == "demo":
        return MegaByteModel.from_pretrained("megabyte-demo", device="cuda", dtype=dtype).network
    mx.random.seed(0)
    network = MegaByte(MegaByteConfig(max_bytes=1 << 18, layout="paper" if name == "paper" else "prefix"))
    network.set_dtype(dtype)
    mx.eval(network.parameters())
    return network


def prompt_of(length: int) -> bytes:
    text = TEXT.read_bytes()
    return (text * (length // len(text) + 1))[:length]


def texts_of(network: MegaByte, bits: tuple[int, ...], *, timed: bool = False) -> list[str]:
    """The kernels' texts of one stream."""
    whole, local = cuda_patches.global_stage(network), cuda_patches.local_stage(network)
    stages = [local] + [
        whole if each == 16 else replace(whole, key_bits=each, value_bits=each, page_rows=ROWS_PER_PAGE) for each in bits
    ]
    texts = []
    for stage in stages:
        sizes = cuda_stages.sizes_of(stage, 1, cuda_stages.blocks_of(stage), network.config.patch_size, timed=timed)
        texts.append(cuda_text.text(cuda_stages.kernel_name(stage), sizes))
    return texts


def written(network: MegaByte, prompt: bytes, bits: CacheBits, count: int) -> bytes:
    state, noise, out = Lockstep(network, [prompt], bits), Noise(0, network.config.vocab_size), []
    while len(out) < count:
        out += np.array(state.advance(Sampling(), noise, count - len(out)))[0].tolist()
    return bytes(out)


def check(name: str, network: MegaByte, count: int) -> None:
    """Bytes of whole patches beside those of operations; the prompt leaves a page to fill and one to add."""
    prompt = prompt_of(network.config.patch_size * (ROWS_PER_PAGE - 4) + 3)
    dtype = str(network.local_byte_embedding.weight.dtype).removeprefix("mlx.core.")
    by_patches = decoding.patch_decoder
    for each in BITS[1:]:
        bits = CacheBits(each, each)
        whole = written(network, prompt, bits, count)
        decoding.patch_decoder = lambda *_: None
        single = written(network, prompt, bits, count)
        decoding.patch_decoder = by_patches
        same = np.frombuffer(whole, np.uint8) == np.frombuffer(single, np.uint8)
        first = "none differs" if same.all() else f"the first {int(same.argmin())} are the same"
        print(f"{name}, {dtype}, {each} bits kept: {same.mean():.1%} of {count} bytes the same, {first}", flush=True)


def decode(state: Lockstep, noise: Noise, count: int) -> None:
    done = 0
    while done < count:
        done += state.advance(Sampling(), noise, count - done).shape[1]


def rates(name: str, network: MegaByte, context: int, count: int, rounds: int, *, parts: bool, operations: bool) -> None:
    """Bytes a second behind a context, and microseconds of a patch by part."""
    prompt, patch = prompt_of(context), network.config.patch_size
    for each in BITS:
        bits, noise, best = CacheBits(each, each), Noise(0, network.config.vocab_size), 0.0
        state = Lockstep(network, [prompt], bits)
        decode(state, noise, 4 * patch)
        for _ in range(rounds):
            start = time.perf_counter()
            decode(state, noise, count)
            best = max(best, count / (time.perf_counter() - start))
        size, took = state.cache_bytes["global"], ""
        if operations:
            by_patches, decoding.patch_decoder = decoding.patch_decoder, lambda *_: None
            state = Lockstep(network, [prompt], bits)
            decoding.patch_decoder = by_patches
            decode(state, noise, 2 * patch)
            start = time.perf_counter()
            decode(state, noise, 16 * patch)
            took = f"; operation by operation {16 * patch / (time.perf_counter() - start):,.0f}"
        if parts:
            state = Lockstep(network, [prompt], bits, decoder=cuda_patches.patch_decoder(network, 1, bits, timed=True))
            decode(state, noise, 4 * patch)
            before = state.part_seconds or {}
            decode(state, noise, 32 * patch)
            after = state.part_seconds or {}
            took += "; us a patch: " + ", ".join(f"{part} {(after[part] - before[part]) / 32e-6:,.0f}" for part in after)
        print(f"{name}, {context:,} bytes, {each} bits kept, {size / 1e6:,.1f} MB: {best:,.0f} bytes/s{took}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="demo,166M")
    parser.add_argument("--parts", default="166M")
    parser.add_argument("--contexts", default="2048,28672,131072")
    parser.add_argument("--bytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", type=int, default=0)
    parser.add_argument("--operations", action="store_true")
    arguments = parser.parse_args()
    names = arguments.models.split(",")
    networks = {name: network_of(name, mx.bfloat16) for name in names}
    exact = network_of("demo", mx.float32) if arguments.check else None
    start = time.perf_counter()
    parts = arguments.parts.split(",")
    texts = [text for network in networks.values() for text in texts_of(network, BITS)]
    texts += [text for name in names if name in parts for text in texts_of(networks[name], BITS, timed=True)]
    compiled(texts + ([] if exact is None else texts_of(exact, BITS[1:])))
    print(f"compiled in {time.perf_counter() - start:.1f} s", flush=True)
    if exact is not None:
        check("demo", exact, arguments.check)
        check("demo", networks.get("demo") or network_of("demo", mx.bfloat16), arguments.check)
    for name, network in networks.items():
        room = network.config.max_bytes - (arguments.rounds + 1) * arguments.bytes
        for i, context in enumerate(map(int, arguments.contexts.split(","))):
            if context <= room:
                asked = {"parts": name in parts, "operations": arguments.operations and i == 0}
                rates(name, network, context, arguments.bytes, arguments.rounds, **asked)


if __name__ == "__main__":
    main()
