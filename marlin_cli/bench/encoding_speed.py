"""How fast texts are read: characters a second by length and batch, from code points to what the head gives, or to states.

A length counts positions, marks included: all texts of a batch have it, so that nothing is padded. Not timed: reading the
checkpoint, and one warm-up run of each shape. Repeats of several models alternate (A B A B).
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from marlin_cli.bench.spreads import Spread, spread_of
from marlin_cli.bench.throughput import SAMPLE, ThroughputSettings
from marlin_cli.encoding_model import EncodingModel
from marlin_cli.errors import CorpusError, UsageError
from marlin_cli.files import shipped
from marlin_cli.quality.held_out import files_by_domain

BATCH_SIZES = (1, 8)
DOMAIN = "multilingual"  # of the shipped sample: text, of many scripts


@dataclass(frozen=True)
class EncodingSpeed:
    """Speeds over the repeats, and memory, of one model at one length and batch size."""

    prompt_characters: int  # of each text, marks included
    batch_size: int
    characters_per_second: Spread  # of all texts together
    working_memory_bytes: int  # the most that MLX held during a run beyond what it held before


def shapes_of(settings: ThroughputSettings) -> list[tuple[int, int]]:
    """Lengths and batch sizes, one measurement after another."""
    lengths = settings.sweep_contexts or (settings.prompt_bytes,)
    return [(length, batch) for length in lengths for batch in settings.sweep_batches or BATCH_SIZES]


def measure_encoding(
    models: Sequence[EncodingModel],
    settings: ThroughputSettings,
    clock: Callable[[], float] = time.perf_counter,
    on_characters: Callable[[int], None] = lambda count: None,
) -> list[list[EncodingSpeed]]:
    """Time the models on the same texts: for each model, a result for each of `shapes_of`.

    Args:
        clock: seconds, from any start.
        on_characters: told after each run how many characters passed through a model.

    Raises:
        UsageError: texts that do not fit a model.
        CorpusError: the shipped sample is missing.
    """
    check_texts_fit(models, settings)
    results: list[list[EncodingSpeed]] = [[] for _ in models]
    for length, batch in shapes_of(settings):
        runs: list[list[tuple[float, int]]] = [[] for _ in models]
        for repeat in range(-1, settings.repeats):
            for model, own in zip(models, runs, strict=True):
                marks = 2 if model.config.marks else 0
                texts = [sample_text(length - marks, settings.seed + number) for number in range(batch)]
                run = _timed(model, texts, clock)
                if repeat >= 0:  # the first one is a warm-up
                    own.append(run)
                on_characters(length * batch)
        for own, result in zip(runs, results, strict=True):
            speed = spread_of([length * batch / seconds for seconds, _ in own])
            result.append(EncodingSpeed(length, batch, speed, max(memory for _, memory in own)))
    return results


def check_texts_fit(models: Sequence[EncodingModel], settings: ThroughputSettings) -> None:
    """Raise `UsageError` if a length is too long for one of the models, or none of a text."""
    for model in models:
        config = model.config
        for length, _ in shapes_of(settings):
            if not config.downsample_factor <= length <= config.longest:
                raise UsageError(
                    f"--prompt-bytes {length}: a text has {config.downsample_factor} to {config.longest:,} characters here,"
                    " marks included; ask for that"
                )


def sample_text(characters: int, seed: int) -> list[int]:
    """Consecutive code points of the shipped sample's text; equal for equal seeds.

    Raises:
        CorpusError: the sample is missing.
    """
    folder = shipped(SAMPLE)
    if not folder.is_dir():
        raise CorpusError(f"{folder}: the shipped sample is missing; install marlin again")
    files = files_by_domain(str(folder))[DOMAIN]
    chosen = random.Random(seed)
    text = ""
    while len(text) < characters:
        text += chosen.choice(files).read_bytes().decode("utf-8", errors="ignore")
    start = chosen.randint(0, len(text) - characters)
    return [*map(ord, text[start : start + characters])]


def _timed(model: EncodingModel, texts: Sequence[list[int]], clock: Callable[[], float]) -> tuple[float, int]:
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    read = model.encode_many if model.config.head == "none" else model.scores_many
    start = clock()
    read(texts)
    return clock() - start, max(0, mx.get_peak_memory() - held)
