"""`marlin quantize --measure`: what packing cost, scored beside the original, in the card of the folder."""

from pathlib import Path

from marlin_cli import console
from marlin_cli.api import load
from marlin_cli.bench.answering_result import PairSettings
from marlin_cli.bench.answering_run import pairs_to_score
from marlin_cli.bench.formats import AS_IT_IS, SCORED_BYTES, FormatsRequest, Row, scoring_of
from marlin_cli.checkpoints import ImportOptions
from marlin_cli.errors import CorpusError, UsageError
from marlin_cli.models import Capability, Network, architecture_of
from marlin_cli.quality.held_out import Windowing
from marlin_cli.quantization.card import CARD, with_cost
from marlin_cli.reports.formats_report import MEASURES
from marlin_cli.version import __version__
from marlin_cli.writing import writing


def check_measurable(model: str, network: Network) -> None:
    """See, before anything is packed, that there is something to score the model on.

    Raises:
        UsageError: it answers, and has no pairs beside it.
    """
    if architecture_of(network).capability is not Capability.ANSWERS:
        return
    try:
        pairs_to_score(PairSettings((model,), SCORED_BYTES))
    except CorpusError:
        raise UsageError(
            f"--measure scores answers, and {model} comes with no pairs; put pairs.jsonl into it, or leave out --measure"
            " and compare with bench --quality PAIRS --reference"
        ) from None


def write_measured_card(model: str, options: ImportOptions, target: Path) -> None:
    """Score the model and the packed one in `target`, say it in a line, and write the card anew with it.

    Raises:
        MarlinError: a model or bytes that cannot be read, or a card that cannot be written.
    """
    models = {AS_IT_IS: load(model, options=options), "packed": load(target)}
    request = FormatsRequest(model, (), None, (), Windowing(max_bytes=SCORED_BYTES))
    scored, (before, after) = scoring_of(models[AS_IT_IS], request)(models)
    said = f"On {scored}, by marlin {__version__}: {cost_of(before, after)}."
    card = (target / CARD).read_text(encoding="utf-8")
    with writing(target / CARD) as file:
        file.write_text(with_cost(card, said), encoding="utf-8")
    console.note(said)


def cost_of(before: Row, after: Row) -> str:
    """The measures of the packed model with their errors, and those of the original in brackets."""
    parts = []
    for name, (title, form, scale, _) in MEASURES.items():
        estimate, original = after.get(name), before.get(name)
        if estimate is None:
            continue
        shown = format(scale * estimate.value, form)
        error = estimate.standard_error
        shown += "" if error is None else f" ± {format(scale * error, form.removeprefix('+'))}"
        beside = "" if original is None else f" (as it is {format(scale * original.value, form)})"
        parts.append(f"{title} {shown}{beside}")
    return ", ".join(parts)
