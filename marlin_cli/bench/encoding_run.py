"""One run of `marlin bench` over models that encode texts: loaded, checked against what is asked, then timed and compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mlx.utils import tree_flatten

from marlin_cli import console
from marlin_cli.bench.encoding_result import EncodingModelReport, EncodingReport, TextSettings
from marlin_cli.bench.encoding_speed import EncodingSpeed, check_texts_fit, measure_encoding, shapes_of
from marlin_cli.bench.machine import describe_machine, peak_resident_bytes
from marlin_cli.bench.noise import say_if_noisy
from marlin_cli.bench.ranked import check_alike, of_ranks
from marlin_cli.bench.run import labels_of
from marlin_cli.bench.throughput import ThroughputSettings
from marlin_cli.checkpoints import ImportOptions, read_checkpoint
from marlin_cli.checkpoints.location import locate_model
from marlin_cli.corpus.texts import whole_characters
from marlin_cli.encoding_model import EncodingModel
from marlin_cli.errors import UsageError
from marlin_cli.prediction.sizes import bytes_by_part, weights_by_part
from marlin_cli.quality.held_out import Windowing, cut, files_by_domain
from marlin_cli.quality.texts import TextQuality, check_comparable, measure_texts, readable
from marlin_cli.ranks import Ranks, joined


@dataclass(frozen=True)
class EncodingRequest:
    """What to measure. A part that is None is left out.

    Raises:
        UsageError: nothing to measure.
    """

    models: tuple[str, ...]  # paths, shipped names or repositories; the same one twice shows the noise
    throughput: ThroughputSettings | None
    quality: TextSettings | None
    device: str = "auto"
    activation_bits: int = 16
    imports: Mapping[str, ImportOptions] = field(default_factory=dict)  # of an LA-CANINE its language, by names of models

    def __post_init__(self) -> None:
        if self.throughput is None and self.quality is None:
            raise UsageError("--no-throughput leaves nothing to measure; give --quality too")

    def label_of(self, name: str) -> str:
        """The name of a model as the report has it, with the language that it takes."""
        options = self.imports.get(name)
        return name if options is None or options.language is None else f"{name} ({options.language})"


def run(request: EncodingRequest) -> EncodingReport:
    """Measure; progress goes to stderr. What does not fit a model is refused before anything is measured.

    Raises:
        MarlinError: a model or texts that cannot be read, or settings that do not fit a model.
    """
    with joined() as ranks:
        return _run(of_ranks(request, ranks), ranks)


def _run(request: EncodingRequest, ranks: Ranks) -> EncodingReport:
    models = [_loaded(request, name) for name in request.models]
    if request.throughput is not None:
        check_texts_fit(models, request.throughput)
    labels = labels_of([request.label_of(name) for name in request.models])
    named = dict(zip(labels, models, strict=True))
    scores: Sequence[TextQuality | None] = [None] * len(models)
    quality = request.quality
    if quality is not None:
        known = quality.reference in request.models
        reference = models[request.models.index(quality.reference)] if known else _loaded(request, quality.reference)
        quality = replace(quality, window_bytes=fitting_window(quality, [*models, reference]))
        texts = texts_to_compare(quality, [*models, reference])
        check_comparable(named, texts, reference)
        check_alike(ranks, [*request.models, quality.reference], (text for found in texts.values() for text in found))
    speeds = [None] * len(models) if request.throughput is None else _time(models, request.throughput)
    if quality is not None:
        total = sum(len(text) for found in texts.values() for text in found)
        with console.byte_progress("comparing", total * len(models)) as progress:
            scores = measure_texts(named, texts, reference, progress.advance, ranks=ranks)
    reports = [
        EncodingModelReport(
            model=label,
            weights=weights_by_part(model.network),
            stored_weight_bytes=bytes_by_part(
                read_checkpoint(locate_model(name), request.imports.get(name), check_values=False).weights
            ),
            loaded_weight_bytes=bytes_by_part(dict(tree_flatten(model.network.parameters()))),
            speeds=None if speed is None else tuple(speed),
            quality=score,
        )
        for label, name, model, speed, score in zip(labels, request.models, models, speeds, scores, strict=True)
    ]
    return EncodingReport(
        machine=describe_machine(models[0].device),
        throughput_settings=request.throughput,
        quality_settings=quality,
        peak_resident_bytes=peak_resident_bytes(),
        models=tuple(reports),
    )


def _loaded(request: EncodingRequest, name: str) -> EncodingModel:
    return EncodingModel.from_pretrained(
        name, device=request.device, activation_bits=request.activation_bits, options=request.imports.get(name)
    )


def fitting_window(settings: TextSettings, models: Sequence[EncodingModel]) -> int:
    """Bytes of a text, at most as many as asked for; says so where a model takes fewer: a character has one at least."""
    longest = min(model.config.longest - (2 if model.config.marks else 0) for model in models)
    if longest < settings.window_bytes:
        console.note(f"--window-bytes {settings.window_bytes} is cut to {longest}, the longest text of a model")
    return int(min(settings.window_bytes, longest))


def texts_to_compare(settings: TextSettings, models: Sequence[EncodingModel]) -> dict[str, list[bytes]]:
    """The texts of each domain; windows that are no UTF-8, and those that a model does not read, are left out and counted."""
    windowing = Windowing(settings.window_bytes, max_bytes=settings.max_bytes)
    windows = cut(files_by_domain(*settings.corpora), windowing)
    found, total = {}, 0
    for domain, part in windows.items():
        texts = [whole_characters(each.read().tobytes()) for each in part]
        found[domain] = readable(models, [text for text in texts if text is not None])
        total += len(part)
    left_out = total - sum(map(len, found.values()))
    if left_out:
        console.note(f"{left_out} of {total} window(s) are left out: they are no UTF-8, or too short")
    return {domain: texts for domain, texts in found.items() if texts}


def _time(models: Sequence[EncodingModel], settings: ThroughputSettings) -> list[list[EncodingSpeed]]:
    total = sum(length * batch for length, batch in shapes_of(settings)) * (settings.repeats + 1) * len(models)
    with console.byte_progress("timing", total) as progress:
        found = measure_encoding(models, settings, on_characters=progress.advance)
    say_if_noisy((speed.characters_per_second for speeds in found for speed in speeds), "speeds")
    return found
