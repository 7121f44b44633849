"""How fast models read a prompt and decode bytes, and the memory it takes. The likeliest byte each time; one stream, and
in a sweep as many as asked for, after prompts of several lengths.

What is timed is what `marlin generate` does, by the clock on the wall:

- prefill: from the prompt's bytes to the logits of the byte after it, computed (`mx.eval`).
- time to first byte: from the same start until that byte is a number in Python.
- decode: the bytes after the first one. Each is predicted, chosen and a number in Python before the next begins; the
  steps of the global model, one a patch, are among them.
- latency: of that, the wait for each whole patch; and of each byte, which is an equal share of the call that gave it,
  for where a kernel decodes all that is left of a patch its bytes come together.
- energy: of the processor packages while bytes were decoded, where the system counts it; other programs' is in it.

Not timed: reading the checkpoint, and one warm-up run a model, in which kernels are compiled and memory is first used.
Repeats of several models alternate, to and fro (A B B A), so that a slow spell of the machine falls on all of them, and what
becomes slower all the time too. Short runs are repeated until they have taken `seconds`, for single ones tell little.
"""

import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from marlin_cli.bench.energy import EnergyCounter
from marlin_cli.bench.spreads import Percentiles, Spread, percentiles_of, spread_of
from marlin_cli.continuing_model import ContinuingModel
from marlin_cli.engine.continuation import begin
from marlin_cli.engine.sampling import sample
from marlin_cli.errors import CorpusError, UsageError
from marlin_cli.files import shipped
from marlin_cli.models import architecture_of
from marlin_cli.prediction.greedy import GREEDY, decoded, with_overhead
from marlin_cli.prediction.roofline import Roofline
from marlin_cli.quality.held_out import files_by_domain

SAMPLE = "calibration/sample"  # the shipped bytes that prompts are taken from

MOST_STREAMS = 1 << 16  # more would only run out of memory


@dataclass(frozen=True)
class ThroughputSettings:
    """What a run does.

    Raises:
        UsageError: a number below 1.
    """

    prompt_bytes: int = 512
    decode_bytes: int = 128  # after the first byte, which the prefill gives
    repeats: int = 5  # timed runs at least; a warm-up goes before them
    seconds: float = 0.0  # that each model is timed at least: more repeats where those are short
    seed: int = 0  # which bytes of the shipped sample are the prompt
    # A sweep has every batch after every context, and for each of its lengths of decoding.
    sweep_contexts: tuple[int, ...] = ()  # bytes of the prompts
    sweep_decodes: tuple[int, ...] = ()  # bytes decoded after the first one
    sweep_batches: tuple[int, ...] = ()  # streams that are decoded together

    def __post_init__(self) -> None:
        for option, value in (
            ("--prompt-bytes", self.prompt_bytes),
            ("--decode-bytes", self.decode_bytes),
            ("--repeats", self.repeats),
            *(("--context", context) for context in self.sweep_contexts),
            *(("--decode-bytes", count) for count in self.sweep_decodes),
            *(("--batch", batch) for batch in self.sweep_batches),
        ):
            if value < 1:
                raise UsageError(f"{option} must be at least 1, found {value}")
        if max(self.sweep_batches, default=1) > MOST_STREAMS:
            raise UsageError(f"--batch must be at most {MOST_STREAMS:,}, found {max(self.sweep_batches)}")
        if not self.seconds >= 0:
            raise UsageError(f"--seconds must be 0 or more, found {self.seconds}")

    @property
    def bytes_of_run(self) -> int:
        """Bytes that pass through the model in one run."""
        return self.prompt_bytes + 1 + self.decode_bytes

    @property
    def bytes_of_sweep(self) -> int:
        """Bytes that pass through the model in one run at every point of the sweep."""
        return sum(batch * (context + 1 + count) for context, count, batch in self.sweep)

    @property
    def sweep(self) -> list[tuple[int, int, int]]:
        """Contexts, lengths of decoding and batch sizes of the sweep, empty if none was asked for."""
        if not self.sweep_contexts and not self.sweep_decodes and not self.sweep_batches:
            return []
        return list(
            itertools.product(
                self.sweep_contexts or (self.prompt_bytes,),
                self.sweep_decodes or (self.decode_bytes,),
                self.sweep_batches or (1,),
            )
        )


@dataclass(frozen=True)
class SweepPoint:
    """Speeds of one model after one context with one number of streams; bytes of all streams together."""

    context_bytes: int
    decode_bytes: int  # of each stream, after the first one
    batch: int
    prefill_bytes_per_second: Spread
    decode_bytes_per_second: Spread
    time_to_first_byte_seconds: Spread


@dataclass(frozen=True)
class Throughput:
    """Speeds over the repeats, and memory, of one model."""

    prefill_bytes_per_second: Spread
    decode_bytes_per_second: Spread
    time_to_first_byte_seconds: Spread
    decoded_bytes: int  # timed, in all repeats together
    cache_bytes: dict[str, int]  # by level, the most that was in use after any byte
    working_memory_bytes: int  # the most that MLX held during a run beyond what it held before: caches, activations
    byte_latency_seconds: Percentiles | None = None
    patch_latency_seconds: Percentiles | None = None  # None: no whole patch was decoded, or there are none
    joules_per_byte: float | None = None  # decoding; None where the system does not tell
    sweep: tuple[SweepPoint, ...] = ()
    roofline: Roofline | None = None  # where it was asked for
    decode_seconds_by_part: dict[str, float] | None = None  # of a byte, in the middle repeat; None: nothing tells parts apart


@dataclass(frozen=True)
class _Run:
    """Seconds of one timed run, and the memory it took."""

    prefill: float
    first_byte: float  # prefill is part of it
    decode: float
    decoded_bytes: int
    working_memory_bytes: int
    steps: list[tuple[float, int]]  # seconds of each call that gave bytes, and how many
    joules: float | None
    part_seconds: dict[str, float] | None  # of decoding, which they add up to

    @property
    def seconds(self) -> float:
        """Of all that was timed."""
        return self.first_byte + self.decode


def measure_throughput(
    models: Sequence[ContinuingModel],
    settings: ThroughputSettings,
    clock: Callable[[], float] = time.perf_counter,
    on_bytes: Callable[[int], None] = lambda count: None,
    energy: EnergyCounter | None = None,
) -> list[Throughput]:
    """Time the models on the same prompt, one result each.

    Args:
        clock: seconds, from any start.
        on_bytes: told after each run how many bytes passed through a model.
        energy: that of this machine unless given.

    Raises:
        UsageError: the bytes of a run do not fit a model's context, or cache bits do not fit its heads.
        CorpusError: the shipped sample is missing or shorter than the prompt.
    """
    check_run_fits(models, settings)
    energy = energy or EnergyCounter()
    prompt = sample_prompt(settings.prompt_bytes, settings.seed)
    caches = []
    for model in models:
        caches.append(_warm_up(model, prompt, settings.decode_bytes))
        on_bytes(settings.bytes_of_run)
    runs = _in_turn(models, [prompt], settings.decode_bytes, settings, clock, on_bytes, energy)
    sweeps = _swept(models, settings, clock, on_bytes, energy)
    return [
        _summary(own, settings, architecture_of(model.network).unit_bytes(model.config), cache, sweep)
        for model, own, cache, sweep in zip(models, runs, caches, sweeps, strict=True)
    ]


def _in_turn(
    models: Sequence[ContinuingModel],
    prompts: Sequence[bytes],
    decode_bytes: int,
    settings: ThroughputSettings,
    clock: Callable[[], float],
    on_bytes: Callable[[int], None],
    energy: EnergyCounter,
) -> list[list[_Run]]:
    """As many runs of each model, to and fro."""
    runs: list[list[_Run]] = [[] for _ in models]
    pairs = list(zip(models, runs, strict=True))
    while len(runs[-1]) < settings.repeats or any(sum(run.seconds for run in own) < settings.seconds for own in runs):
        for model, own in pairs if len(runs[-1]) % 2 == 0 else reversed(pairs):
            own.append(_timed(model, prompts, decode_bytes, clock, energy))
            on_bytes(sum(map(len, prompts)) + len(prompts) * (1 + decode_bytes))
    return runs


def _swept(
    models: Sequence[ContinuingModel],
    settings: ThroughputSettings,
    clock: Callable[[], float],
    on_bytes: Callable[[int], None],
    energy: EnergyCounter,
) -> list[tuple[SweepPoint, ...]]:
    """The sweep of each model; models alternate at each point, after a run that does not count."""
    found: list[list[SweepPoint]] = [[] for _ in models]
    for context, decode_bytes, batch in settings.sweep:
        prompts = [sample_prompt(context, settings.seed + number) for number in range(batch)]
        for model in models:
            _timed(model, prompts, decode_bytes, clock, energy)
            on_bytes(batch * (context + 1 + decode_bytes))
        runs = _in_turn(models, prompts, decode_bytes, settings, clock, on_bytes, energy)
        for own, points in zip(runs, found, strict=True):
            points.append(
                SweepPoint(
                    context,
                    decode_bytes,
                    batch,
                    spread_of([batch * context / run.prefill for run in own]),
                    spread_of([run.decoded_bytes / run.decode for run in own]),
                    spread_of([run.first_byte for run in own]),
                )
            )
    return [tuple(points) for points in found]


def check_run_fits(models: Sequence[ContinuingModel], settings: ThroughputSettings) -> None:
    """Raise `UsageError` if the bytes of a run do not fit the context of one of the models."""
    for model in models:
        if settings.bytes_of_run > model.config.max_bytes:
            raise UsageError(
                f"--prompt-bytes {settings.prompt_bytes}, a first byte and --decode-bytes {settings.decode_bytes} do"
                f" not fit a context of {model.config.max_bytes} bytes; ask for fewer"
            )
        context, count, _ = max(settings.sweep, key=lambda point: point[0] + point[1], default=(0, 0, 0))
        if context + 1 + count > model.config.max_bytes:
            raise UsageError(
                f"--context {context}, a first byte and --decode-bytes {count} do not fit a context of"
                f" {model.config.max_bytes} bytes; ask for fewer"
            )


def sample_prompt(size: int, seed: int) -> bytes:
    """Consecutive bytes of the shipped sample, its files one after another, domain by domain; equal for equal seeds.

    Raises:
        CorpusError: the sample is missing or has fewer bytes.
    """
    folder = shipped(SAMPLE)
    if not folder.is_dir():
        raise CorpusError(f"{folder}: the shipped sample is missing; install marlin again")
    files = [file for part in files_by_domain(str(folder)).values() for file in part]
    sizes = [file.stat().st_size for file in files]
    if size > sum(sizes):
        raise CorpusError(f"--prompt-bytes {size}: the shipped sample has {sum(sizes)} bytes; ask for fewer")
    start = random.Random(seed).randint(0, sum(sizes) - size)
    prompt = b""
    for file, length in zip(files, sizes, strict=True):
        if start < length and len(prompt) < size:
            with file.open("rb") as opened:
                opened.seek(start)
                prompt += opened.read(size - len(prompt))
        start = max(0, start - length)
    return prompt


def _timed(
    model: ContinuingModel, prompts: Sequence[bytes], decode_bytes: int, clock: Callable[[], float], energy: EnergyCounter
) -> _Run:
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    start = clock()
    state = begin(model.network, prompts, model.cache_bits)
    mx.eval(state.logits)
    read = clock()
    ids = sample(state.logits, GREEDY, None)
    ids.tolist()  # waits for the device and brings the number over, as every consumer of bytes must
    first = clock()
    counted, parts = energy.read(), state.part_seconds
    state.push(ids)
    steps: list[tuple[float, int]] = []
    before = first
    for count in decoded(state, decode_bytes):
        now = clock()
        steps.append((now - before, count))
        before = now
    return _Run(
        prefill=read - start,
        first_byte=first - start,
        decode=before - first,
        decoded_bytes=len(prompts) * decode_bytes,
        working_memory_bytes=mx.get_peak_memory() - held,
        steps=steps,
        joules=energy.joules(counted, energy.read()),
        part_seconds=with_overhead(parts, state.part_seconds, before - first),
    )


def _warm_up(model: ContinuingModel, prompt: bytes, decode_bytes: int) -> dict[str, int]:
    """A run that is not timed: the most bytes that each level of the cache had in use."""
    state = begin(model.network, [prompt], model.cache_bits)
    mx.eval(state.logits)
    most = state.cache_bytes
    for _ in decoded(state, decode_bytes + 1):
        most = {level: max(most[level], size) for level, size in state.cache_bytes.items()}
    return most


def _patch_seconds(run: _Run, settings: ThroughputSettings, patch_size: int) -> list[float]:
    """How long each whole patch took, of those that a run decoded."""
    position, waited, whole, found = settings.prompt_bytes + 1, 0.0, False, []
    for seconds, count in run.steps:
        if position % patch_size == 0:
            waited, whole = 0.0, True
        waited += seconds
        position += count
        if position % patch_size == 0 and whole:
            found.append(waited)
    return found


def _parts_of_a_byte(runs: Sequence[_Run]) -> dict[str, float] | None:
    """Seconds of a byte by part, in the repeat whose decoding is in the middle, so that they add up."""
    middle = sorted(runs, key=lambda run: run.decode)[len(runs) // 2]
    if middle.part_seconds is None:
        return None
    return {part: seconds / middle.decoded_bytes for part, seconds in middle.part_seconds.items()}


def _summary(
    runs: Sequence[_Run],
    settings: ThroughputSettings,
    patch_size: int,
    cache_bytes: dict[str, int],
    sweep: tuple[SweepPoint, ...],
) -> Throughput:
    patches = [seconds for run in runs for seconds in _patch_seconds(run, settings, patch_size)] if patch_size > 1 else []
    joules = [run.joules for run in runs if run.joules is not None]
    total = sum(run.decoded_bytes for run in runs)
    return Throughput(
        prefill_bytes_per_second=spread_of([settings.prompt_bytes / run.prefill for run in runs]),
        decode_bytes_per_second=spread_of([run.decoded_bytes / run.decode for run in runs]),
        time_to_first_byte_seconds=spread_of([run.first_byte for run in runs]),
        decoded_bytes=total,
        cache_bytes=cache_bytes,
        working_memory_bytes=max(run.working_memory_bytes for run in runs),
        byte_latency_seconds=percentiles_of(
            [seconds / count for run in runs for seconds, count in run.steps for _ in range(count)]
        ),
        patch_latency_seconds=percentiles_of(patches) if patches else None,
        decode_seconds_by_part=_parts_of_a_byte(runs),
        joules_per_byte=sum(joules) / total if len(joules) == len(runs) else None,
        sweep=sweep,
    )
