"""Pages of a long cache that bounds on their keys allow to leave out: how many, what it costs, and what it saves.

    python benchmarks/sparse.py FILE [MODEL] [--context 32768] [--bytes 512]

FILE is text of more than the context. Decoding with and without bounds goes in turns, in one process, on the same state.
"""

import argparse
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from marlin_cli.api import load
from marlin_cli.continuing_model import ContinuingModel
from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.continuation import begin
from marlin_cli.engine.endless import Window
from marlin_cli.engine.sampling import Noise, Sampling
from marlin_cli.engine.stream_scoring import PatchScorer
from marlin_cli.models.megabyte import MegaByte

SHARES = {"0": 0.0, "2^-24": 2.0**-24, "1e-3": 1e-3, "1e-2": 1e-2, "1e-1": 1e-1}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("file", type=Path)
    arguments.add_argument("model", nargs="?", default="megabyte-demo")
    arguments.add_argument("--context", type=int, default=32768)
    arguments.add_argument("--bytes", type=int, default=512)
    given = arguments.parse_args()
    model = load(given.model, device="cpu")
    assert isinstance(model, ContinuingModel)
    data = given.file.read_bytes()[: given.context]
    oracle(model.network, data)
    decoding(model, data[: given.context - 9 * given.bytes], given.bytes)
    quality(model, data)


def decoding(model: ContinuingModel, prompt: bytes, count: int) -> None:
    """Bytes and speed of greedy decoding after a long prompt."""
    settings = {"all pages": CacheBits(), **{name: CacheBits(share_left=share) for name, share in SHARES.items()}}
    states = {name: begin(model.network, [prompt], bits) for name, bits in settings.items()}
    seconds: dict[str, list[float]] = {name: [] for name in settings}
    made: dict[str, list[int]] = {name: [] for name in settings}
    noise = Noise(0, model.config.vocab_size)
    for _ in range(8):
        for name, state in states.items():
            started, drawn = time.perf_counter(), 0
            while drawn < count:
                ids = np.array(state.advance(Sampling(), noise, count - drawn))
                made[name] += ids[0].tolist()
                drawn += ids.shape[1]
            seconds[name].append(time.perf_counter() - started)
    plain = min(seconds["all pages"])
    for name in settings:
        same = "the same bytes" if made[name] == made["all pages"] else "other bytes"
        print(f"{name:9}: {count / min(seconds[name]):,.0f} bytes/s, {plain / min(seconds[name]):.3f} times; {same}")


def quality(model: ContinuingModel, data: bytes) -> None:
    """Bits per byte of the last eighth of the context, and the share of its pages that are read."""
    first, costs = len(data) - len(data) // 8, {}
    for name, share in {"all pages": None, **SHARES}.items():
        bits = model.cached(Window(model.config.max_bytes), share).cache_bits
        scorer = PatchScorer(model.network, bits)
        scorer.score(data[:first])
        before = scorer.pages_read
        costs[name] = float(scorer.score(data[first:]).mean())
        shares = [
            (read - a) / max(1, there - b) for (read, there), (a, b) in zip(scorer.pages_read, before, strict=True) if there > b
        ]
        read = f"; pages read by layer: {', '.join(f'{100 * each:.1f} %' for each in shares)}" if shares else ""
        print(f"{name:9}: {costs[name]:.5f} bits per byte ({costs[name] - costs['all pages']:+.5f}){read}")


def oracle(network: MegaByte, data: bytes, queries: int = 24) -> None:
    """The share of pages that who knew every score would have to read: no bound can do better."""
    seen: list[tuple[np.ndarray, np.ndarray, float]] = []

    class Plain:
        offset = 0

        def attend(self, q: mx.array, k: mx.array, v: mx.array, scale: float, window: int | None) -> mx.array:
            from marlin_cli.ops import attention

            seen.append((np.array(q[0]), np.array(k[0]), scale))
            return attention(q, k, v, scale, window=window)

    def run(number: int, rows: mx.array) -> mx.array:
        stack = network.stages[number].stack
        hidden = stack(rows, [Plain() for _ in stack.layers])  # type: ignore[misc]
        mx.eval(hidden)
        return hidden

    network.last_sequences(mx.array(np.frombuffer(data, dtype=np.uint8).astype(np.int32))[None], run)
    for page in (128, 16):
        for share in (2.0**-24, 1e-3, 1e-2):
            print(f"who knows all scores reads, pages of {page} rows, {share:.1e} left: {_read(seen, page, share, queries)}")


def _read(seen: list[tuple[np.ndarray, np.ndarray, float]], page: int, share: float, queries: int) -> str:
    draw, found = np.random.default_rng(0), []
    for q, k, scale in seen:
        count, parts = k.shape[1] // page, []
        for head in range(q.shape[0]):
            keys = k[head * k.shape[0] // q.shape[0], : count * page].astype(np.float64)
            for row in draw.integers(count * page * 7 // 8, count * page, queries):
                scores = keys[: row // page * page] @ q[head, row].astype(np.float64) * scale
                mass = np.sort(np.exp(scores - scores.max()).reshape(-1, page).sum(axis=1))
                left = np.cumsum(mass)
                parts.append(1 - np.searchsorted(left, share * left[-1]) / len(mass))
        found.append(f"{100 * np.mean(parts):.0f} %")
    return ", ".join(found)


if __name__ == "__main__":
    main()
