"""What each format would cost a model: it is packed in memory, once for each, and compared with itself as it is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import mlx.core as mx

from marlin_cli import console
from marlin_cli.answering_model import AnsweringModel
from marlin_cli.api import load
from marlin_cli.bench.answering_result import PairSettings
from marlin_cli.bench.answering_run import pairs_to_score
from marlin_cli.bench.answering_speed import measure_answering
from marlin_cli.bench.encoding_result import TextSettings
from marlin_cli.bench.encoding_run import fitting_window, texts_to_compare
from marlin_cli.bench.encoding_speed import measure_encoding
from marlin_cli.bench.machine import Machine, describe_machine
from marlin_cli.bench.throughput import ThroughputSettings, measure_throughput
from marlin_cli.checkpoints import ImportOptions, read_checkpoint
from marlin_cli.checkpoints.location import locate_model
from marlin_cli.continuing_model import ContinuingModel
from marlin_cli.encoding_model import EncodingModel
from marlin_cli.engine.heads import with_heads
from marlin_cli.errors import CorpusError, QuantizationError, UsageError
from marlin_cli.models import Network, build, matrices_of
from marlin_cli.ops import round_activations
from marlin_cli.quality.estimates import Estimate
from marlin_cli.quality.held_out import Windowing, cut, files_by_domain
from marlin_cli.quality.pairs import measure_pairs
from marlin_cli.quality.quality import measure_quality
from marlin_cli.quality.texts import measure_texts
from marlin_cli.quantization.apply import kept_bytes, plan_network
from marlin_cli.quantization.layers import planned
from marlin_cli.quantization.plan import QuantizationSettings, settings_named

AS_IT_IS = "as it is"

# Bytes that are scored unless said otherwise, of a recipe that comes with marlin.
CORPUS, SCORED_BYTES = "default", 64 << 10

AnyModel: TypeAlias = ContinuingModel | AnsweringModel | EncodingModel
Row: TypeAlias = dict[str, Estimate | None]

# Of models by their names, the first of which is `AS_IT_IS`, what was scored and the measures of each.
Scoring: TypeAlias = Callable[[dict[str, Any]], tuple[str, list[Row]]]


@dataclass(frozen=True)
class FormatsRequest:
    """What to measure."""

    model: str
    formats: tuple[str, ...]  # names as `settings_named` takes them
    throughput: ThroughputSettings | None  # None: no speed
    corpora: tuple[str, ...]  # to score: of a model that answers files of pairs; empty: what comes with marlin
    windowing: Windowing
    device: str = "auto"
    activation_bits: int = 16
    options: ImportOptions = ImportOptions()  # what a foreign checkpoint does not reveal


@dataclass(frozen=True)
class FormatRow:
    """The model in one format. Measures are of quality, by their name; see `measure_quality` and its like."""

    format: str
    bits_per_weight: float  # of all layers
    bytes: int  # of all weights, as `marlin quantize` would write them
    measures: Row
    bytes_per_second: float | None  # decoded, of one stream; of a model that encodes texts characters read


@dataclass(frozen=True)
class FormatsReport:
    """One model in several formats, as it is first."""

    machine: Machine
    model: str
    scored: str  # what the measures are of
    rows: tuple[FormatRow, ...]


def run(request: FormatsRequest) -> FormatsReport:
    """Pack, score and time; progress and notes go to stderr. A format that does not fit the model's widths is left out, and
    that is said.

    Raises:
        MarlinError: a model or a corpus that cannot be read, or a model that is packed already.
    """
    chosen = {name: settings_named(name) for name in request.formats}
    options = with_heads(locate_model(request.model), request.options)
    checkpoint = read_checkpoint(locate_model(request.model), options)
    if checkpoint.quantization is not None:
        raise UsageError(f"--formats: {request.model} is packed already; name the model it was made from")
    stored = build(checkpoint.config, checkpoint.weights, None, where=request.model)
    model = load(request.model, device=request.device, options=options)
    score = scoring_of(model, request)  # what cannot be read is said before anything is packed
    models, sizes = {AS_IT_IS: model}, {AS_IT_IS: _sizes(stored, None)}
    weights = sum(layer.weight.size for layer in matrices_of(stored).values())
    with console.byte_progress("packing", weights * len(chosen)) as progress:
        for name, settings in chosen.items():
            try:
                sizes[name] = _sizes(stored, settings)
                models[name] = packed = model.quantize(settings=settings)
            except QuantizationError as error:
                console.note(f"{name} is left out: {error}")
                sizes.pop(name, None)
                continue
            mx.eval(packed.network.parameters())
            round_activations(packed.network, request.activation_bits)
            progress.advance(weights)
    scored, measures = score(models)
    speeds = [None] * len(models) if request.throughput is None else _speeds(list(models.values()), request.throughput)
    rows = [
        FormatRow(name, *sizes[name], measured, speed) for name, measured, speed in zip(models, measures, speeds, strict=True)
    ]
    return FormatsReport(describe_machine(model.device), request.model, scored, tuple(rows))


def _sizes(stored: Network, settings: QuantizationSettings | None) -> tuple[float, int]:
    """Bits of a weight, and bytes of all, with the layers packed by the settings; nothing is packed for it."""
    layers = matrices_of(stored)
    if settings is None:
        after = sum(layer.weight.nbytes for layer in layers.values())
    else:
        after = sum(planned(plan, layers[plan.path].weight).bytes_after for plan in plan_network(stored, settings))
    weights = sum(layer.weight.size for layer in layers.values())
    return 8 * after / weights, after + sum(kept_bytes(stored).values())


def scoring_of(first: AnyModel, request: FormatsRequest) -> Scoring:
    """Read what is to be scored; what is returned scores models, beside this one, which is one of them.

    Raises:
        MarlinError: a corpus, or pairs, that cannot be read.
    """
    if isinstance(first, ContinuingModel):
        return _scoring_of_bytes(first, request)
    return _scoring_of_answers(first, request) if isinstance(first, AnsweringModel) else _scoring_of_texts(first, request)


def _scoring_of_bytes(model: ContinuingModel, request: FormatsRequest) -> Scoring:
    first, names = model.network, request.corpora or (CORPUS,)
    windowing, most = request.windowing, first.config.max_bytes
    if windowing.window_bytes > most:
        console.note(f"--window-bytes {windowing.window_bytes} is cut to {most}, the longest text of the model")
        windowing = replace(windowing, window_bytes=most)
    windows = cut(files_by_domain(*names), windowing)
    total = sum(window.scored for part in windows.values() for window in part)

    def score(models: dict[str, ContinuingModel]) -> tuple[str, list[Row]]:
        with console.byte_progress("scoring", total) as progress:
            found = measure_quality({name: model.network for name, model in models.items()}, windows, first, progress.advance)
        rows: list[Row] = []
        for name, quality in zip(models, found, strict=True):
            score, beside = quality.all_domains, quality.all_domains.against_reference
            row: Row = {"bits_per_byte": score.bits_per_byte}
            if beside is not None and name != AS_IT_IS:
                row |= {
                    "bits_per_byte_difference": beside.bits_per_byte_difference,
                    "kl_bits_per_byte": beside.kl_bits_per_byte,
                    "top1_agreement": beside.top1_agreement,
                }
            rows.append(row)
        return f"{total:,} bytes of {', '.join(names)}", rows

    return score


def _scoring_of_answers(first: AnsweringModel, request: FormatsRequest) -> Scoring:
    names = request.corpora or (request.model,)
    try:
        pairs = pairs_to_score(PairSettings(names, request.windowing.max_bytes))
    except CorpusError as error:
        if request.corpora:
            raise
        raise UsageError(
            f"--formats scores answers, and {request.model} comes with no pairs; give --quality ({error})"
        ) from None

    def score(models: dict[str, AnsweringModel]) -> tuple[str, list[Row]]:
        total = len(models) * sum(len(pair.source) + len(pair.target) for pair in pairs)
        with console.byte_progress("scoring", total) as progress:
            found = measure_pairs(models, pairs, first, progress.advance)
        rows: list[Row] = []
        for name, quality in zip(models, found, strict=True):
            score, beside = quality.all_pairs, quality.all_pairs.against_reference
            row: Row = {"bits_per_byte": score.bits_per_target_byte, "exact_match": score.exact_match}
            if beside is not None and name != AS_IT_IS:
                row |= {"bits_per_byte_difference": beside.bits_per_target_byte, "exact_match_difference": beside.exact_match}
            rows.append(row)
        return f"{len(pairs):,} pairs of {', '.join(names)}", rows

    return score


def _scoring_of_texts(first: EncodingModel, request: FormatsRequest) -> Scoring:
    names, windowing = request.corpora or (CORPUS,), request.windowing
    window = fitting_window(TextSettings(names, windowing.window_bytes, windowing.max_bytes, request.model), [first])
    texts = texts_to_compare(TextSettings(names, window, windowing.max_bytes, request.model), [first])

    def score(models: dict[str, EncodingModel]) -> tuple[str, list[Row]]:
        total = len(models) * sum(len(text) for found in texts.values() for text in found)
        others = {name: model for name, model in models.items() if name != AS_IT_IS}
        with console.byte_progress("comparing", total) as progress:
            found = measure_texts(others, texts, first, progress.advance)
        fields = ("states_error", "equal_labels", "equal_sentences")
        rows: list[Row] = [{}, *({name: getattr(quality.all_domains, name) for name in fields} for quality in found)]
        return f"{sum(map(len, texts.values())):,} texts of {', '.join(names)}", rows

    return score


def _speeds(models: Sequence[Any], settings: ThroughputSettings) -> list[float | None]:
    """Of one stream each, all models in turn."""
    if isinstance(models[0], ContinuingModel):
        return [speed.decode_bytes_per_second.median for speed in measure_throughput(models, settings)]
    if isinstance(models[0], AnsweringModel):
        alone = [speeds[0].decode_bytes_per_second for speeds in measure_answering(models, settings)]
        return [None if spread is None else spread.median for spread in alone]
    return [speeds[0].characters_per_second.median for speeds in measure_encoding(models, settings)]
