"""How fast models read a prompt and decode bytes, and the memory it takes. One stream, the likeliest byte each time.

What is timed is what `marlin generate` does, by the clock on the wall:

- prefill: from the prompt's bytes to the logits of the byte after it, computed (`mx.eval`).
- time to first byte: from the same start until that byte is a number in Python.
- decode: the bytes after the first one. Each is predicted, chosen and a number in Python before the next begins; the
  steps of the global model, one a patch, are among them.

Not timed: reading the checkpoint, and one warm-up run a model, in which kernels are compiled and memory is first used.
Repeats of several models alternate (A B A B), so that a slow spell of the machine falls on all of them.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from marlin_cli.api import MegaByteModel
from marlin_cli.bench.estimates import Spread, spread_of
from marlin_cli.bench.held_out import files_by_domain
from marlin_cli.engine.decoding import Lockstep
from marlin_cli.engine.sampling import Noise, Sampling, sample
from marlin_cli.errors import CorpusError, UsageError
from marlin_cli.files import shipped

SAMPLE = "calibration/sample"  # the shipped bytes that prompts are taken from

GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class ThroughputSettings:
    """What a run does.

    Raises:
        UsageError: a number below 1.
    """

    prompt_bytes: int = 512
    decode_bytes: int = 128  # after the first byte, which the prefill gives
    repeats: int = 5  # timed runs; a warm-up goes before them
    seed: int = 0  # which bytes of the shipped sample are the prompt

    def __post_init__(self) -> None:
        for option, value in (
            ("--prompt-bytes", self.prompt_bytes),
            ("--decode-bytes", self.decode_bytes),
            ("--repeats", self.repeats),
        ):
            if value < 1:
                raise UsageError(f"{option} must be at least 1, found {value}")

    @property
    def bytes_of_run(self) -> int:
        """Bytes that pass through the model in one run."""
        return self.prompt_bytes + 1 + self.decode_bytes


@dataclass(frozen=True)
class Throughput:
    """Speeds over the repeats, and memory, of one model."""

    prefill_bytes_per_second: Spread
    decode_bytes_per_second: Spread
    time_to_first_byte_seconds: Spread
    decoded_bytes: int  # timed, in all repeats together
    cache_bytes: dict[str, int]  # by level, the most that was in use after any byte
    working_memory_bytes: int  # the most that MLX held during a run beyond what it held before: caches, activations


@dataclass(frozen=True)
class _Run:
    """Seconds of one timed run, and the memory it took."""

    prefill: float
    first_byte: float  # prefill is part of it
    decode: float
    decoded_bytes: int
    working_memory_bytes: int


def measure_throughput(
    models: Sequence[MegaByteModel],
    settings: ThroughputSettings,
    clock: Callable[[], float] = time.perf_counter,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> list[Throughput]:
    """Time the models on the same prompt, one result each.

    Args:
        clock: seconds, from any start.
        on_bytes: told after each run how many bytes passed through a model.

    Raises:
        UsageError: the bytes of a run do not fit a model's context, or cache bits do not fit its heads.
        CorpusError: the shipped sample is missing or shorter than the prompt.
    """
    check_run_fits(models, settings)
    prompt = sample_prompt(settings.prompt_bytes, settings.seed)
    caches = []
    for model in models:
        caches.append(_warm_up(model, prompt, settings.decode_bytes))
        on_bytes(settings.bytes_of_run)
    runs: list[list[_Run]] = [[] for _ in models]
    for _ in range(settings.repeats):
        for model, own in zip(models, runs, strict=True):
            own.append(_timed(model, prompt, settings.decode_bytes, clock))
            on_bytes(settings.bytes_of_run)
    return [_summary(own, settings, cache) for own, cache in zip(runs, caches, strict=True)]


def check_run_fits(models: Sequence[MegaByteModel], settings: ThroughputSettings) -> None:
    """Raise `UsageError` if the bytes of a run do not fit the context of one of the models."""
    for model in models:
        if settings.bytes_of_run > model.config.max_bytes:
            raise UsageError(
                f"--prompt-bytes {settings.prompt_bytes}, a first byte and --decode-bytes {settings.decode_bytes} do"
                f" not fit a context of {model.config.max_bytes} bytes; ask for fewer"
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


def _timed(model: MegaByteModel, prompt: bytes, decode_bytes: int, clock: Callable[[], float]) -> _Run:
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    start = clock()
    state = Lockstep(model.network, [prompt], model.cache_bits)
    mx.eval(state.logits)
    read = clock()
    ids = sample(state.logits, GREEDY, None)
    ids.tolist()  # waits for the device and brings the number over, as every consumer of bytes must
    first = clock()
    state.push(ids)
    decoded = 0
    for count in _decoded(model, state, decode_bytes):
        decoded += count
    end = clock()
    return _Run(read - start, first - start, end - first, decoded, mx.get_peak_memory() - held)


def _warm_up(model: MegaByteModel, prompt: bytes, decode_bytes: int) -> dict[str, int]:
    """A run that is not timed: the most bytes that each level of the cache had in use."""
    state = Lockstep(model.network, [prompt], model.cache_bits)
    mx.eval(state.logits)
    most = state.cache_bytes
    for _ in _decoded(model, state, decode_bytes + 1):
        most = {level: max(most[level], size) for level, size in state.cache_bytes.items()}
    return most


def _decoded(model: MegaByteModel, state: Lockstep, count: int) -> Iterator[int]:
    """Decode `count` bytes, as generation does; after each step how many came."""
    noise = Noise(GREEDY.seed, model.config.vocab_size)
    while count > 0:
        ids = state.advance(GREEDY, noise, count)
        ids.tolist()
        count -= ids.shape[1]
        yield ids.shape[1]


def _summary(runs: Sequence[_Run], settings: ThroughputSettings, cache_bytes: dict[str, int]) -> Throughput:
    return Throughput(
        prefill_bytes_per_second=spread_of([settings.prompt_bytes / run.prefill for run in runs]),
        decode_bytes_per_second=spread_of([run.decoded_bytes / run.decode for run in runs]),
        time_to_first_byte_seconds=spread_of([run.first_byte for run in runs]),
        decoded_bytes=sum(run.decoded_bytes for run in runs),
        cache_bytes=cache_bytes,
        working_memory_bytes=max(run.working_memory_bytes for run in runs),
    )
