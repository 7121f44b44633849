"""Many streams of a MegaByte on the CPU, beside batches of other kinds, and what a long prompt costs those that run.

    python benchmarks/many_streams.py [--formats float32,nvfp4,mxfp8] [--requests 24] [--bytes 256] [--rounds 3]
        [--parts S1,S2,S4] [--slices 64]

The network is random: global 1024 x 12, local 512 x 4, patches of 8. Rounds alternate; medians; greedy bytes. What the first
request gives is compared with what it gives alone (they have to be equal where MARLIN_ROWS=exact).

- S1: requests arrive by a Poisson process somewhat faster than they are served, with prompts of 16 to 4,096 bytes (evenly in
  their logarithm); 8 have a place at once. Bytes/s from when 8 run until none waits. Beside it:
  - static: batches of 8 prompts of the mean length, which begin and end together, prompts read beside each other.
  - merged: batches in mlx-lm's manner, put together from parts that are measured here, on the same arrivals: a prompt is read
    alone while the others stand still; to join, all keys and values are copied to the longest; every stream reads as many rows
    as the longest has.
- S2: 8 streams over one, decoding alone.
- S4: while 4 streams run, a prompt of 32 KiB arrives, in slices of so many rows at most: the longest gap between their pieces
  over the median gap, before it and in all; and the time until its first byte over the time that it takes alone.
"""

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from measured import Row, add_rows_option, report
from mlx.utils import tree_map

from marlin_cli.engine.decoding import Lockstep
from marlin_cli.engine.sampling import Noise, Sampling
from marlin_cli.engine.schedulers import scheduler_of
from marlin_cli.engine.scheduling import Request, Scheduler, SchedulerLimits
from marlin_cli.engine.stopping import Stopping
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.plan import QuantizationSettings

PLACES, LONG_PROMPT = 8, 32 << 10


def network_of(format: str) -> MegaByte:
    mx.random.seed(0)
    network = MegaByte(MegaByteConfig(max_bytes=2 * LONG_PROMPT))
    network.update(
        tree_map(lambda a: mx.random.normal(a.shape) * (1 if a.ndim == 1 else a.shape[-1] ** -0.5), network.parameters())
    )
    mx.eval(network.parameters())
    if format == "float32":
        return network
    return quantize_network(network, QuantizationSettings(global_format=format, local_format=format)).network


def prompts_of(count: int, seed: int) -> list[bytes]:
    """Of 16 to 4,096 bytes."""
    rng = random.Random(seed)
    return [rng.randbytes(round(math.exp(rng.uniform(math.log(16), math.log(4096))))) for _ in range(count)]


class Run:
    """Requests that arrive at given times; what came of them, and when."""

    def __init__(self, scheduler: Scheduler[Request], requests: list[Request], arrivals: list[float]) -> None:
        self.outputs = [b""] * len(requests)
        self.moments: list[list[tuple[float, int]]] = [[] for _ in requests]  # of each piece: when, and its bytes
        self.full: list[float] = []  # the moments at which all places were taken and requests waited
        start, admitted = time.perf_counter(), 0
        while admitted < len(requests) or scheduler.running or scheduler.waiting:
            now = time.perf_counter() - start
            while admitted < len(requests) and arrivals[admitted] <= now:
                assert scheduler.admit(requests[admitted]) == admitted
                admitted += 1
            if not scheduler.running and not scheduler.waiting:
                time.sleep(max(0.0, arrivals[admitted] - now))
                continue
            for piece in scheduler.advance():
                self.outputs[piece.stream] += piece.data
                self.moments[piece.stream].append((time.perf_counter() - start, len(piece.data)))
            if scheduler.waiting:
                self.full.append(time.perf_counter() - start)
        self.seconds = time.perf_counter() - start

    @property
    def bytes_per_second(self) -> float:
        """While all places were taken."""
        first, last = self.full[0], self.full[-1]
        return sum(count for own in self.moments for when, count in own if first < when <= last) / (last - first)


def decode(state: Lockstep, count: int) -> float:
    """Seconds in which a batch goes on by so many bytes each."""
    noise, start = Noise(0, 256), time.perf_counter()
    while count > 0:
        count -= np.array(state.advance(Sampling(), noise, count)).shape[1]
    return time.perf_counter() - start


def static_bytes_per_second(network: MegaByte, length: int, wanted: int) -> float:
    prompts, start = [random.Random(n).randbytes(length) for n in range(PLACES)], time.perf_counter()
    decode(Lockstep(network, prompts), wanted)
    return PLACES * wanted / (time.perf_counter() - start)


class Merged:
    """The cost of a left-padded batch that streams join and leave, of parts that are measured when it is made."""

    LENGTHS = 128, 4096 + 512

    def __init__(self, network: MegaByte, prompts: list[bytes]) -> None:
        self._config = network.config
        self._patch: dict[tuple[int, int], float] = {}
        for length in self.LENGTHS:
            state = Lockstep(network, [random.Random(n).randbytes(length) for n in range(PLACES)])
            for streams in range(PLACES, 0, -1):
                state.keep(list(range(streams)))
                self._patch[streams, length] = min(decode(state, 8) for _ in range(3))
        self.prompt_seconds = []
        for prompt in prompts:
            start = time.perf_counter()
            state = Lockstep(network, [prompt])
            decode(state, 8 - len(prompt) % 8)
            self.prompt_seconds.append(time.perf_counter() - start)
        block = np.ones(16 << 20, dtype=np.float32)
        start = time.perf_counter()
        block.copy()
        self._seconds_a_byte = (time.perf_counter() - start) / block.nbytes

    def patch_seconds(self, streams: int, length: float) -> float:
        """Of a batch whose longest stream has so many bytes: on a straight line between what was measured."""
        low, high = (self._patch[streams, each] for each in self.LENGTHS)
        return low + (high - low) * (length - self.LENGTHS[0]) / (self.LENGTHS[1] - self.LENGTHS[0])

    def copy_seconds(self, streams: int, length: float) -> float:
        """All keys and values, of as many rows as the longest has."""
        return self._seconds_a_byte * 2 * 4 * streams * length / 8 * self._config.global_layers * self._config.global_dim

    def bytes_per_second(self, prompts: list[bytes], wanted: int, arrivals: list[float]) -> float:
        clock, waiting, running, made, full = 0.0, list(range(len(prompts))), {}, [], []
        while waiting or running:
            if not running and arrivals[waiting[0]] > clock:
                clock = arrivals[waiting[0]]
            while waiting and len(running) < PLACES and arrivals[waiting[0]] <= clock:
                number = waiting.pop(0)
                clock += self.prompt_seconds[number]
                first = 8 - len(prompts[number]) % 8
                made.append((clock, first))
                running[number] = first
                clock += self.copy_seconds(len(running), max(len(prompts[n]) + done for n, done in running.items()))
            clock += self.patch_seconds(len(running), max(len(prompts[n]) + done for n, done in running.items()))
            for number, done in list(running.items()):
                made.append((clock, min(8, wanted - done)))
                running[number] = done + 8
                if done + 8 >= wanted:
                    del running[number]
            if waiting and arrivals[waiting[0]] <= clock:
                full.append(clock)
        return sum(count for when, count in made if full[0] < when <= full[-1]) / (full[-1] - full[0])


def arriving(network: MegaByte, format: str, count: int, wanted: int, rounds: int, rows: Path | None) -> None:
    """S1."""
    prompts = prompts_of(count, seed=1)
    requests = [Request(prompt, Stopping(wanted)) for prompt in prompts]
    mean = sum(map(len, prompts)) // count // 8 * 8
    merged = Merged(network, prompts)
    ours, static, theirs = [], [], []
    for number in range(rounds):
        static.append(static_bytes_per_second(network, mean, wanted))
        rng, rate = random.Random(number), 1.3 * static[0] / wanted
        arrivals = np.cumsum([0.0] * PLACES + [rng.expovariate(rate) for _ in range(count - PLACES)]).tolist()
        run = Run(scheduler_of(network, SchedulerLimits(max_streams=PLACES)), requests, arrivals)
        ours.append(run.bytes_per_second)
        theirs.append(merged.bytes_per_second(prompts, wanted, arrivals))
    alone = Run(scheduler_of(network), requests[:1], [0.0]).outputs[0]
    same = f"first request {'equal to' if alone == run.outputs[0] else 'OTHER THAN'} alone"
    speed = statistics.median(ours)
    for name, peer in (("a static batch of equal length", static), ("left-padded merging, from measured parts", theirs)):
        other = statistics.median(peer)
        report(Row(f"S1, {format}: {count} requests, {PLACES} places, prompts of 16 to 4,096 bytes (mean {mean})",
                   f"{speed:.0f} bytes/s", f"{name}: {other:.0f} bytes/s", f"{speed / other:.2f}x", same), rows)  # fmt: skip


def side_by_side(network: MegaByte, format: str, wanted: int, rounds: int, rows: Path | None) -> None:
    """S2."""

    def speed(streams: int) -> float:
        requests = [Request(prompt[:16].ljust(16), Stopping(wanted)) for prompt in prompts_of(streams, seed=2)]
        run = Run(scheduler_of(network), requests, [0.0] * streams)
        first = run.moments[0][0][0]
        return sum(count for own in run.moments for when, count in own if when > first) / (run.seconds - first)

    speeds = [[speed(streams) for streams in (1, PLACES)] for _ in range(rounds)]
    one, many = (statistics.median(each) for each in zip(*speeds, strict=True))
    ours, peer = f"{PLACES} streams {many:.0f} bytes/s", f"one {one:.0f} bytes/s"
    report(Row(f"S2, {format}", ours, peer, f"{many / one:.2f}x", "-"), rows)


def long_prompt(network: MegaByte, format: str, slice_rows: int, rounds: int, rows: Path | None) -> None:
    """S4."""
    long = Request(random.Random(5).randbytes(LONG_PROMPT), Stopping(8))

    def first_byte(run: Run, stream: int) -> float:
        return run.moments[stream][0][0]

    found = []
    for _ in range(rounds):
        alone = first_byte(Run(scheduler_of(network), [long], [0.0]), 0)
        others = [Request(prompt, Stopping(100_000)) for prompt in prompts_of(4, seed=3)]
        scheduler = scheduler_of(network, SchedulerLimits(slice_rows=slice_rows))
        for request in others:
            scheduler.admit(request)
        moments = []
        for step in range(1000):
            if step == 50:
                entered, arrived = scheduler.admit(long), time.perf_counter()
            pieces = scheduler.advance()
            moments.append(time.perf_counter())
            if step > 50 and any(piece.stream == entered for piece in pieces):
                break
        gaps = np.diff(moments[20:])
        before = float(np.median(gaps[:29]))
        found.append((gaps.max() / before, gaps.max() / float(np.median(gaps)), (moments[-1] - arrived) / alone))
    before, in_all, whole = (statistics.median(each) for each in zip(*found, strict=True))
    what = f"S4, {format}: a prompt of {LONG_PROMPT >> 10} KiB beside 4 streams, slices of {slice_rows} rows at most"
    gap = f"longest gap {before:.1f}x the median before"
    report(Row(what, gap, f"{in_all:.1f}x the median in all", f"first byte after {whole:.2f}x its time alone", "-"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="float32,nvfp4,mxfp8")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--bytes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", default="S1,S2,S4")
    parser.add_argument("--slices", default="64")
    add_rows_option(parser)
    options = parser.parse_args()
    rounds, rows, slices = options.rounds, options.rows_file, [int(each) for each in options.slices.split(",")]
    parts: dict[str, Callable[[MegaByte, str], object]] = {
        "S1": lambda network, format: arriving(network, format, options.requests, options.bytes, rounds, rows),
        "S2": lambda network, format: side_by_side(network, format, options.bytes, rounds, rows),
        "S4": lambda network, format: [long_prompt(network, format, each, rounds, rows) for each in slices],
    }
    mx.set_default_device(mx.cpu)
    for format in options.formats.split(","):
        network = network_of(format)
        for part in options.parts.split(","):
            parts[part](network, format)


if __name__ == "__main__":
    main()
