"""One run of `marlin bench` over models that continue bytes: loaded, checked against what is asked, then timed and scored."""

import contextlib
import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from mlx.utils import tree_flatten

from marlin_cli import console
from marlin_cli.api import ranks_to_split
from marlin_cli.bench.gpu_parts import seconds_by_part
from marlin_cli.bench.machine import describe_machine, peak_resident_bytes
from marlin_cli.bench.noise import say_if_noisy
from marlin_cli.bench.ranked import check_alike, of_ranks
from marlin_cli.bench.result import ModelReport, QualitySettings, Report
from marlin_cli.bench.throughput import Throughput, ThroughputSettings, check_run_fits, measure_throughput
from marlin_cli.checkpoints import ImportOptions, fingerprint, read_checkpoint
from marlin_cli.checkpoints.location import locate_model
from marlin_cli.continuing_model import ContinuingModel
from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.disk_tables import DiskTable
from marlin_cli.engine.scoring import BYTES_PER_PASS
from marlin_cli.errors import OutputError, UsageError
from marlin_cli.files import user_cache
from marlin_cli.models import Network
from marlin_cli.prediction.prediction import layer_shapes, predicted_seconds
from marlin_cli.prediction.roofline import bandwidth_for, roofline_of
from marlin_cli.prediction.sizes import bytes_by_part, weights_by_part
from marlin_cli.quality.held_out import Window, cut, files_by_domain
from marlin_cli.quality.journal import Journal
from marlin_cli.quality.quality import Quality, check_windows_fit, measure_quality
from marlin_cli.quality.reference_cache import DEFAULT_LIMIT_BYTES, ReferenceCache
from marlin_cli.quality.streams import measure_streams
from marlin_cli.ranks import Ranks, joined
from marlin_cli.version import __version__


@dataclass(frozen=True)
class Request:
    """What to measure. A part that is None is left out.

    Raises:
        UsageError: no model, or nothing to measure.
    """

    models: tuple[str, ...]  # paths, shipped names or repositories; the same one twice shows the noise
    throughput: ThroughputSettings | None
    quality: QualitySettings | None
    device: str = "auto"
    kv_bits: int | tuple[int, int] | None = None  # of keys and values, or of each
    activation_bits: int = 16
    roofline: bool = False  # measure this machine's bandwidth too, and what decoding makes of it
    split: str | None = None  # the part of the models that ranks share; else each has all, and some of the passes
    resume: bool = False  # go on with the quality run of these models, bytes and settings that was interrupted
    share_left: float | None = None  # see `CacheBits`
    reference_cache_bytes: int = DEFAULT_LIMIT_BYTES  # for log-probabilities of the reference, kept between runs; 0 for none
    imports: Mapping[str, ImportOptions] = field(default_factory=dict)  # of models that do not say all, by their names

    def __post_init__(self) -> None:
        if not self.models:
            raise UsageError("name a model to measure")
        if self.roofline and self.throughput is None:
            raise UsageError("--roofline is of speed; leave --no-throughput out")
        if self.throughput is None and self.quality is None:
            raise UsageError("--no-throughput leaves nothing to measure; give --quality too")


def run(request: Request) -> Report:
    """Measure; progress and notes go to stderr. What does not fit a model is refused before anything is measured.

    Where a launcher started several ranks, they share the scoring, every one returns the report, and none is timed.

    Raises:
        MarlinError: a model or a corpus that cannot be read, or settings that do not fit a model.
    """
    with joined() as ranks:
        return _run(request, ranks)


def _run(request: Request, ranks: Ranks) -> Report:
    request = of_ranks(request, ranks)
    models = [
        ContinuingModel.from_pretrained(
            name,
            device=request.device,
            kv_bits=request.kv_bits,
            activation_bits=request.activation_bits,
            options=request.imports.get(name),
            split=ranks_to_split(request.split, name, ranks),
        )
        for name in request.models
    ]
    for name, model in zip(request.models, models, strict=True):
        if left := sum(module.file_bytes for module in model.network.modules() if isinstance(module, DiskTable)):
            console.note(f"{name}: tables of {left:,} bytes stay in their file, as memory is short, and count as stored alone")
    if request.share_left is not None:
        models = [model.cached(None, request.share_left) for model in models]
    if request.throughput is not None:
        check_run_fits(models, request.throughput)
    if request.quality is not None and request.quality.window is not None:
        if ranks.size > 1:
            raise UsageError("--window: a stream is scored by one process, byte after byte; run it alone")
        streams = [model.cached(request.quality.window, request.share_left) for model in models]
    scoring = None if request.quality is None else _prepared(request, request.quality, models, ranks)
    speeds = None if request.throughput is None else _time(models, request.throughput, request.roofline)
    if scoring is not None and scoring.settings.window is not None:
        scores: list[Quality] | None = _score_streams(scoring, streams)
    else:
        scores = None if scoring is None else _score(scoring, request, models[0].device.name, ranks)
    reports = [
        ModelReport(
            model=label,
            weights=weights_by_part(model.network),
            stored_weight_bytes=bytes_by_part(
                read_checkpoint(locate_model(name), request.imports.get(name), check_values=False).weights
            ),
            loaded_weight_bytes=bytes_by_part(dict(tree_flatten(model.network.parameters()))),
            cache_bits=model.cache_bits,
            throughput=None if speeds is None else speeds[number],
            quality=None if scores is None else scores[number],
        )
        for number, (label, name, model) in enumerate(zip(labels_of(request.models), request.models, models, strict=True))
    ]
    return Report(
        machine=describe_machine(models[0].device),
        throughput_settings=request.throughput,
        quality_settings=request.quality,
        peak_resident_bytes=peak_resident_bytes(),
        models=tuple(reports),
    )


@dataclass(frozen=True)
class _Scoring:
    """The arguments of `measure_quality`."""

    settings: QualitySettings
    networks: dict[str, Network]
    windows: dict[str, list[Window]]
    reference: Network | None


def _prepared(request: Request, settings: QualitySettings, models: Sequence[ContinuingModel], ranks: Ranks) -> _Scoring:
    networks = {label: model.network for label, model in zip(labels_of(request.models), models, strict=True)}
    reference = None
    if settings.reference in request.models:
        reference = models[request.models.index(settings.reference)].network
    elif settings.reference is not None:
        shared = ranks_to_split(request.split, settings.reference, ranks)
        reference = ContinuingModel.from_pretrained(
            settings.reference, device=request.device, options=request.imports.get(settings.reference), split=shared
        ).network
    windows = cut(files_by_domain(*settings.corpora), settings.windowing)
    if settings.window is not None:
        return _Scoring(settings, networks, windows, None)
    check_windows_fit(networks, windows, reference)
    if any(model.cache_bits != CacheBits() for model in models):
        console.note("quality is that of the weights: it is scored without a cache, so --kv-bits changes nothing in it")
    return _Scoring(settings, networks, windows, reference)


def _score_streams(scoring: _Scoring, models: Sequence[ContinuingModel]) -> list[Quality]:
    total = sum(window.scored for part in scoring.windows.values() for window in part) * len(models)
    named = {
        label: (network, model.cache_bits) for (label, network), model in zip(scoring.networks.items(), models, strict=True)
    }
    with console.byte_progress("scoring", total) as progress:
        return measure_streams(named, scoring.windows, progress.advance)


def _time(models: Sequence[ContinuingModel], settings: ThroughputSettings, roofline: bool) -> list[Throughput]:
    total = (settings.bytes_of_run + settings.bytes_of_sweep) * (settings.repeats + 1) * len(models)
    with console.byte_progress("timing", total) as progress:
        speeds = measure_throughput(models, settings, on_bytes=progress.advance)
    say_if_noisy((speed.decode_bytes_per_second for speed in speeds), "decode speeds")
    if not roofline:
        return speeds
    middle = settings.prompt_bytes + 1 + settings.decode_bytes // 2
    found = []
    for model, speed in zip(models, speeds, strict=True):
        if speed.decode_seconds_by_part is None:
            speed = dataclasses.replace(speed, decode_seconds_by_part=seconds_by_part(model, settings))
        measured = 1 / speed.decode_bytes_per_second.median
        predicted = predicted_seconds(model.config, layer_shapes(model.network), [middle], model.cache_bits)
        expected = None if predicted is None else predicted[0]
        reached = roofline_of(model, middle, measured, speed.decode_seconds_by_part, bandwidth_for(model), expected)
        found.append(dataclasses.replace(speed, roofline=reached))
    return found


def _score(scoring: _Scoring, request: Request, device: str, ranks: Ranks) -> list[Quality]:
    settings = request.quality
    assert settings is not None
    made_by = [__version__, version("mlx"), device]  # whatever else decides the numbers that a model gives

    def fingerprint_of(model: str) -> str:
        return fingerprint(locate_model(model), request.imports.get(model))

    kept = {}
    cache = _cache(request)
    if cache is not None and settings.reference is not None and request.reference_cache_bytes:
        kept["kept_reference"] = ReferenceCache(
            cache / "reference", " ".join([fingerprint_of(settings.reference), *made_by]), request.reference_cache_bytes
        )
    names = [*request.models, *([] if settings.reference is None else [settings.reference])]

    def key() -> str:
        facts = [made_by, BYTES_PER_PASS, len(request.models), [fingerprint_of(name) for name in names]]
        return hashlib.sha256(json.dumps([*facts, _fingerprint_of_windows(scoring.windows)]).encode()).hexdigest()

    if ranks.size > 1:
        ranks.check_alike(job=key())
    total = sum(window.scored for part in scoring.windows.values() for window in part)
    if request.split is not None:  # no rank may do less than another, by what it has kept
        check_alike(ranks, names, [_fingerprint_of_windows(scoring.windows).encode()])
        with console.byte_progress("scoring", total) as progress, ranks.computing():
            return measure_quality(scoring.networks, scoring.windows, scoring.reference, progress.advance)
    total //= ranks.size
    keeping: contextlib.AbstractContextManager[Journal | None] = contextlib.nullcontext()
    if cache is not None:
        keeping = Journal(cache / "quality", key, rank=ranks.rank, resume=request.resume)
    with console.byte_progress("scoring", total) as progress, keeping as journal:
        return measure_quality(
            scoring.networks, scoring.windows, scoring.reference, progress.advance, journal=journal, ranks=ranks, **kept
        )


def _cache(request: Request) -> Path | None:
    """Where things are kept between runs; None where there is no such place, which is said once.

    Raises:
        OutputError: a run is to be resumed.
        UsageError: MARLIN_CACHE is no absolute path.
    """
    try:
        return user_cache()
    except OutputError as error:
        if request.resume:
            raise
        console.note(f"nothing is kept between runs: {error}")
        return None


def _fingerprint_of_windows(windows: Mapping[str, Sequence[Window]]) -> str:
    """SHA-256 over the bytes of all windows, how they are cut and in which domains."""
    digest = hashlib.sha256()
    for domain, part in windows.items():
        for window in part:
            digest.update(f"{domain} {window.length} {window.context} ".encode())
            digest.update(window.read().tobytes())
    return digest.hexdigest()


def labels_of(names: Sequence[str]) -> list[str]:
    """The names, with a number where one comes again."""
    seen: Counter[str] = Counter()
    labels = []
    for name in names:
        seen[name] += 1
        labels.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return labels
