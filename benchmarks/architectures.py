"""A MegaByte, a flat byte transformer and a subword transformer of the same width and depth, random, on this machine.

    python benchmarks/architectures.py [--context 4096] [--bytes 32] [--rounds 5] [--layers 6] [--dim 512]

The flat ones are mlx-lm's LLaMA (RMSNorm, RoPE, SwiGLU) with the layers and width of MegaByte's global model, so that the
layers of one of their steps cost what a patch costs; the subword one has 32,000 ids, and a token is taken for 4 bytes. All
float32, greedy. MegaByte runs as `marlin generate` does, on our kernels; mlx-lm on MLX's own. Operations are multiply-adds of
weights and of attention for one step at the end of the context; caches are the rows in use. Rounds alternate; medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.llama import Model, ModelArgs

from marlin_cli.bench.arithmetic import cache_bytes, costs_of
from marlin_cli.bench.throughput import sample_prompt
from marlin_cli.engine.decoding import Lockstep
from marlin_cli.engine.sampling import Noise, Sampling
from marlin_cli.models import part_of
from marlin_cli.models.megabyte import MegaByte, MegaByteConfig, default_ffn_dim
from marlin_cli.ops.cpu import kernels, thread_count

BYTES_PER_TOKEN = 4
SUBWORDS = 32000


def flat_model(layers: int, dim: int, vocabulary: int) -> Model:
    heads = dim // 64
    return Model(
        ModelArgs(
            model_type="llama", hidden_size=dim, num_hidden_layers=layers, intermediate_size=default_ffn_dim("swiglu", dim),
            num_attention_heads=heads, num_key_value_heads=heads, rms_norm_eps=1e-5, vocab_size=vocabulary,
            tie_word_embeddings=False,
        )
    )  # fmt: skip


def flat_decoder(model: Model, prompt: mx.array, steps: int) -> Callable[[], float]:
    """Seconds of a step after the prompt [1, n]."""

    def decode() -> float:
        cache = make_prompt_cache(model)
        for start in range(0, prompt.shape[1], 512):
            logits = model(prompt[:, start : start + 512], cache=cache)
            mx.eval(logits)
        token = mx.argmax(logits[:, -1:], axis=-1)
        mx.eval(token)
        start_time = time.perf_counter()
        for _ in range(steps):
            token = mx.argmax(model(token, cache=cache)[:, -1:], axis=-1)
            token.tolist()
        return (time.perf_counter() - start_time) / steps

    return decode


def megabyte_decoder(model: MegaByte, prompt: bytes, count: int) -> Callable[[], float]:
    """Seconds of a byte after the prompt."""

    def decode() -> float:
        state, left, noise = Lockstep(model, [prompt]), count, Noise(0, 256)
        start = time.perf_counter()
        while left:
            ids = state.advance(Sampling(), noise, left)
            ids.tolist()
            left -= ids.shape[1]
        return (time.perf_counter() - start) / count

    return decode


def linear_weights(model: MegaByte) -> dict[str, int]:
    """Numbers in the linear layers by part."""
    sizes: dict[str, int] = {}
    for path, array in tree_flatten(model.parameters()):
        if array.ndim == 2 and not path.endswith(("byte_embedding.weight", "positions.weight")):
            part = part_of(path.rsplit(".", 1)[0])
            sizes[part] = sizes.get(part, 0) + array.size
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("context", 4096), ("bytes", 32), ("rounds", 5), ("layers", 6), ("dim", 512)):
        parser.add_argument(f"--{option}", type=int, default=default)
    given = parser.parse_args()
    mx.random.seed(0)
    config = MegaByteConfig(
        max_bytes=given.context, global_layers=given.layers, global_dim=given.dim, global_heads=given.dim // 64,
        local_layers=max(1, given.layers // 3), local_dim=given.dim // 2, local_heads=max(1, given.dim // 128),
    )  # fmt: skip
    megabyte = MegaByte(config)
    flat, subword = flat_model(given.layers, given.dim, 256), flat_model(given.layers, given.dim, SUBWORDS)
    mx.eval(megabyte.parameters(), flat.parameters(), subword.parameters())
    prompt = sample_prompt(given.context - given.bytes, seed=0)
    ids = mx.array(list(prompt))[None]
    tokens = mx.random.randint(0, SUBWORDS, (1, len(prompt) // BYTES_PER_TOKEN))
    steps = max(1, given.bytes // BYTES_PER_TOKEN)
    runs = [
        megabyte_decoder(megabyte, prompt, given.bytes),
        flat_decoder(flat, ids, given.bytes),
        flat_decoder(subword, tokens, steps),
    ]
    rounds = [[run() for run in runs] for _ in range(given.rounds + 1)][1:]
    seconds = [statistics.median(column) for column in zip(*rounds, strict=True)]

    weights = linear_weights(megabyte)
    rows_seen = given.context // config.patch_size
    attention = 2 * given.layers * given.dim * rows_seen / config.patch_size
    attention += 2 * config.local_layers * config.local_dim * config.patch_size / 2
    shares = {part: size / (config.patch_size if part == "global" else 1) for part, size in weights.items()}
    operations = [sum(shares.values()) + attention]
    for model, rows in ((flat, given.context), (subword, given.context // BYTES_PER_TOKEN)):
        layers = sum(a.size for p, a in tree_flatten(model.parameters()) if a.ndim == 2 and "embed_tokens" not in p)
        operations.append(layers + 2 * given.layers * given.dim * rows)
    heads = given.dim // 64
    caches = [sum(costs_of(config, {}, given.context, 32, 32).cache_bytes.values())]
    caches += [cache_bytes(given.layers, heads, given.context // each, 64, 32) for each in (1, BYTES_PER_TOKEN)]
    print(f"MLX {mx.__version__}, {thread_count()} threads, kernels: {kernels()[1]}; context {given.context} bytes,")
    print(f"{given.layers} layers of {given.dim}; a token is {BYTES_PER_TOKEN} bytes; float32\n")
    print("| model | million multiply-adds a byte | cache, MB | ms a byte | ms a token equivalent |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, ops, cache, took, each in zip(
        ("MegaByte", "flat, bytes", "flat, subwords"), operations, caches, seconds, (1, 1, BYTES_PER_TOKEN), strict=True
    ):
        cells = [ops / each / 1e6, cache / 1e6, 1e3 * took / each, 1e3 * took * BYTES_PER_TOKEN / each]
        print(f"| {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")


if __name__ == "__main__":
    main()
