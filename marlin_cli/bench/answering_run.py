"""One run of `marlin bench` over models that answer: loaded, checked against what is asked of them, then timed and scored."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mlx.utils import tree_flatten

from marlin_cli import console
from marlin_cli.answering_model import AnsweringModel
from marlin_cli.api import ranks_to_split
from marlin_cli.bench.answering_result import AnsweringModelReport, AnsweringReport, PairSettings
from marlin_cli.bench.answering_speed import AnsweringSpeed, batch_sizes_of, check_inputs_fit, measure_answering
from marlin_cli.bench.machine import describe_machine, peak_resident_bytes
from marlin_cli.bench.noise import say_if_noisy
from marlin_cli.bench.ranked import check_alike, of_ranks
from marlin_cli.bench.run import labels_of
from marlin_cli.bench.throughput import ThroughputSettings
from marlin_cli.checkpoints import read_checkpoint
from marlin_cli.checkpoints.location import locate_model
from marlin_cli.corpus import Pair, read_pairs
from marlin_cli.corpus.examples import split_domain
from marlin_cli.corpus.pairs import locate_pairs
from marlin_cli.errors import UsageError
from marlin_cli.prediction.sizes import bytes_by_part, weights_by_part
from marlin_cli.quality.pairs import PairQuality, check_pairs_fit, measure_pairs
from marlin_cli.ranks import Ranks, joined


@dataclass(frozen=True)
class AnsweringRequest:
    """What to measure. A part that is None is left out.

    Raises:
        UsageError: nothing to measure.
    """

    models: tuple[str, ...]  # paths, shipped names or repositories; the same one twice shows the noise
    throughput: ThroughputSettings | None
    quality: PairSettings | None
    device: str = "auto"
    kv_bits: int | None = None
    activation_bits: int = 16
    split: str | None = None  # the part of the models that ranks share; else each has all, and some of the passes

    def __post_init__(self) -> None:
        if self.throughput is None and self.quality is None:
            raise UsageError("--no-throughput leaves nothing to measure; give --quality too")


def run(request: AnsweringRequest) -> AnsweringReport:
    """Measure; progress goes to stderr. What does not fit a model is refused before anything is measured.

    Raises:
        MarlinError: a model or pairs that cannot be read, or settings that do not fit a model.
    """
    with joined() as ranks:
        return _run(of_ranks(request, ranks), ranks)


def _run(request: AnsweringRequest, ranks: Ranks) -> AnsweringReport:
    pairs = [] if request.quality is None else pairs_to_score(request.quality)
    models = [
        AnsweringModel.from_pretrained(
            name,
            device=request.device,
            kv_bits=request.kv_bits,
            activation_bits=request.activation_bits,
            split=ranks_to_split(request.split, name, ranks),
        )
        for name in request.models
    ]
    if request.throughput is not None:
        check_inputs_fit(models, request.throughput)
    labels = labels_of(request.models)
    scores: Sequence[PairQuality | None] = [None] * len(models)
    if request.quality is not None:
        reference = _reference(request, request.quality, models, ranks)
        named_models = [*request.models, request.quality.reference]
        check_alike(ranks, named_models, (side for pair in pairs for side in (pair.source, pair.target)))
        named = dict(zip(labels, models, strict=True))
        check_pairs_fit(named if reference is None else {**named, "the reference": reference}, pairs)
    speeds = [None] * len(models) if request.throughput is None else _time(models, request.throughput)
    if request.quality is not None:
        passes = len(models) + (reference is not None and reference not in models)
        with console.byte_progress("scoring", passes * sum(len(pair.source) + len(pair.target) for pair in pairs)) as progress:
            if request.split is None:
                scores = measure_pairs(named, pairs, reference, progress.advance, ranks=ranks)
            else:
                with ranks.computing():
                    scores = measure_pairs(named, pairs, reference, progress.advance)
    reports = [
        AnsweringModelReport(
            model=label,
            weights=weights_by_part(model.network),
            stored_weight_bytes=bytes_by_part(read_checkpoint(locate_model(name), check_values=False).weights),
            loaded_weight_bytes=bytes_by_part(dict(tree_flatten(model.network.parameters()))),
            kv_bits=model.kv_bits,
            speeds=None if speed is None else tuple(speed),
            quality=score,
        )
        for label, name, model, speed, score in zip(labels, request.models, models, speeds, scores, strict=True)
    ]
    return AnsweringReport(
        machine=describe_machine(models[0].device),
        throughput_settings=request.throughput,
        quality_settings=request.quality,
        peak_resident_bytes=peak_resident_bytes(),
        models=tuple(reports),
    )


def pairs_to_score(settings: PairSettings) -> list[Pair]:
    """The pairs to score: at even steps through the files where there are more bytes than asked for.

    A name before a file, as in `name=file`, is the group of its pairs that name none.
    """
    pairs: list[Pair] = []
    seen: dict[Path, str] = {}
    for text in settings.pairs:
        group, name = split_domain(text)
        file = locate_pairs(name)
        if seen.setdefault(file.resolve(), text) is not text:
            raise UsageError(f"--quality {text}: {file} is named twice; name it once")
        pairs += [replace(pair, group=pair.group or group or "") for pair in read_pairs(file)]
    total = sum(len(pair.source) + len(pair.target) for pair in pairs)
    if settings.max_bytes is None or total <= settings.max_bytes:
        return pairs
    count = len(pairs) * settings.max_bytes // total
    if not count:
        raise UsageError(
            f"--max-quality-bytes {settings.max_bytes} is less than a pair of {', '.join(settings.pairs)}; raise it"
        )
    return [pairs[(2 * number + 1) * len(pairs) // (2 * count)] for number in range(count)]


def _reference(
    request: AnsweringRequest, settings: PairSettings, models: Sequence[AnsweringModel], ranks: Ranks
) -> AnsweringModel | None:
    if settings.reference is None:
        return None
    if settings.reference in request.models:
        return models[request.models.index(settings.reference)]
    shared = ranks_to_split(request.split, settings.reference, ranks)
    return AnsweringModel.from_pretrained(settings.reference, device=request.device, split=shared)


def _time(models: Sequence[AnsweringModel], settings: ThroughputSettings) -> list[list[AnsweringSpeed]]:
    total = settings.bytes_of_run * (settings.repeats + 1) * len(models) * sum(batch_sizes_of(settings))
    with console.byte_progress("timing", total) as progress:
        found = measure_answering(models, settings, on_bytes=progress.advance)
    speeds = [speed for speeds in found for speed in speeds]
    say_if_noisy((speed.decode_bytes_per_second or speed.encoder_bytes_per_second for speed in speeds), "speeds")
    return found
