"""How fast ByT5 reads inputs and writes answers, one at a time and in batches, by the clock on the wall.

- encoder: from the inputs' ids to the encoder's states, computed.
- time to first byte: from the same start, with the keys and values that the decoder reads, until a first byte of each
  answer is a number in Python.
- decode: the bytes after the first ones. Each is predicted, chosen and a number in Python before the next begins.
  Answers do not end: every byte that is asked for is decoded.

Not timed: reading the checkpoint, and one warm-up run of each batch. Repeats of several models alternate (A B A B).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from marlin_cli.answering_model import AnsweringModel
from marlin_cli.bench.spreads import Percentiles, Spread, percentiles_of, spread_of
from marlin_cli.bench.throughput import ThroughputSettings, sample_prompt
from marlin_cli.engine.encoder_decoder import AnswerState, encode
from marlin_cli.engine.sampling import Noise
from marlin_cli.errors import UsageError
from marlin_cli.models.byt5_ids import ids_of_bytes
from marlin_cli.prediction.greedy import GREEDY

BATCH_SIZES = (1, 8)


@dataclass(frozen=True)
class AnsweringSpeed:
    """Speeds over the repeats, and memory, of one model at one batch size. Bytes are those of all inputs together."""

    batch_size: int
    encoder_bytes_per_second: Spread
    time_to_first_byte_seconds: Spread | None  # this and the next ones: None of an encoder alone
    decode_bytes_per_second: Spread | None
    decoded_bytes: int  # timed, in all repeats together
    memory_bytes: int  # keys and values of the inputs
    working_memory_bytes: int  # the most that MLX held during a run beyond what it held before
    byte_latency_seconds: Percentiles | None = None  # the wait for a byte of every answer, after the first ones


@dataclass(frozen=True)
class _Run:
    """Seconds of one timed run, and the memory it took."""

    encoder: float
    first_byte: float
    decode: float
    memory_bytes: int
    working_memory_bytes: int
    steps: list[float]


def measure_answering(
    models: Sequence[AnsweringModel],
    settings: ThroughputSettings,
    clock: Callable[[], float] = time.perf_counter,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> list[list[AnsweringSpeed]]:
    """Time the models on the same inputs of `prompt_bytes` each: for each model, a result for each of `batch_sizes_of`.

    Args:
        clock: seconds, from any start.
        on_bytes: told after each run how many bytes passed through a model.

    Raises:
        UsageError: the inputs do not fit a model.
        CorpusError: the shipped sample is missing or shorter than the inputs.
    """
    check_inputs_fit(models, settings)
    results: list[list[AnsweringSpeed]] = [[] for _ in models]
    for size in batch_sizes_of(settings):
        inputs = [ids_of_bytes(sample_prompt(settings.prompt_bytes, settings.seed + number)) for number in range(size)]
        runs: list[list[_Run]] = [[] for _ in models]
        for repeat in range(-1, settings.repeats):
            for model, own in zip(models, runs, strict=True):
                run = _timed(model, inputs, settings.decode_bytes, clock)
                if repeat >= 0:  # the first one is a warm-up
                    own.append(run)
                on_bytes(size * settings.bytes_of_run)
        for model, own, result in zip(models, runs, results, strict=True):
            result.append(_summary(own, settings, size, answers=bool(model.config.decoder_layers)))
    return results


def batch_sizes_of(settings: ThroughputSettings) -> tuple[int, ...]:
    """How many inputs are answered together, one measurement after another."""
    return settings.sweep_batches or BATCH_SIZES


def check_inputs_fit(models: Sequence[AnsweringModel], settings: ThroughputSettings) -> None:
    """Raise `UsageError` if the inputs are too long for one of the models."""
    for model in models:
        if settings.prompt_bytes > model.config.max_bytes:
            raise UsageError(
                f"--prompt-bytes {settings.prompt_bytes} do not fit a longest input of {model.config.max_bytes} bytes;"
                " ask for fewer"
            )


def _timed(model: AnsweringModel, inputs: Sequence[Sequence[int]], decode_bytes: int, clock: Callable[[], float]) -> _Run:
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    sources = [[*each, model.config.end_id] for each in inputs]
    start = clock()
    mx.eval(encode(model.network, mx.array(sources)))
    encoded = clock()
    if not model.config.decoder_layers:
        return _Run(encoded - start, 0.0, 0.0, 0, mx.get_peak_memory() - held, [])
    again = clock()
    state = AnswerState(model.network, sources, memory_bits=model.kv_bits)
    noise = Noise(0, model.config.vocab_size)  # nobody reads it
    ids, _ = state.draw((), GREEDY, noise, decode_bytes + 1)
    first = before = clock()
    steps = []
    for step in range(decode_bytes):
        state.push(ids)
        ids, _ = state.draw((), GREEDY, noise, decode_bytes - step)
        now = clock()
        steps.append(now - before)
        before = now
    return _Run(encoded - start, first - again, before - first, state.memory_bytes, mx.get_peak_memory() - held, steps)


def _summary(runs: Sequence[_Run], settings: ThroughputSettings, size: int, *, answers: bool) -> AnsweringSpeed:
    read, written = size * settings.prompt_bytes, size * settings.decode_bytes
    return AnsweringSpeed(
        batch_size=size,
        encoder_bytes_per_second=spread_of([read / run.encoder for run in runs]),
        time_to_first_byte_seconds=spread_of([run.first_byte for run in runs]) if answers else None,
        decode_bytes_per_second=spread_of([written / run.decode for run in runs]) if answers else None,
        decoded_bytes=written * len(runs) if answers else 0,
        memory_bytes=max(run.memory_bytes for run in runs),
        working_memory_bytes=max(run.working_memory_bytes for run in runs),
        byte_latency_seconds=percentiles_of([seconds for run in runs for seconds in run.steps]) if answers else None,
    )
