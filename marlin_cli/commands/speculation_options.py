"""`--speculate` and what goes with it, as more than one command takes them."""

import os
from typing import TYPE_CHECKING, Any

from marlin_cli.commands.options import about
from marlin_cli.errors import UsageError

if TYPE_CHECKING:
    from marlin_cli.continuing_model import ContinuingModel
    from marlin_cli.engine.speculation import Speculated, Speculation

SPECULATE_HELP = (
    "Draft ahead what repeats the prompt or the output, verify it, and write the same bytes: auto, off, or patches (ByT5:"
    " bytes) at once. With it the CPU kernels keep rows apart, as MARLIN_ROWS=exact says."
)


def keep_rows_apart(speculate: str) -> None:
    """Say to the CPU kernels, which are not built yet, that drafts will be verified: see `ops.cpu.rows_are_exact`."""
    if speculate != "off":
        os.environ.setdefault("MARLIN_ROWS", "exact")


def speculation_given(speculate: str, prediction_file: str | None, draft: str | None = None) -> "Speculation":
    """What the options ask for.

    Raises:
        UsageError: another value, a prediction that cannot be read, or drafts where they are off.
    """
    for option, value in (("--prediction-file", prediction_file), ("--draft", draft)):
        if speculate == "off" and value is not None:
            raise UsageError(f"{option} has no use with --speculate off; leave one of them out")
    from marlin_cli.commands.prompts import bytes_of_file
    from marlin_cli.engine.speculation import speculation_of

    with about("--prediction-file"):
        prediction = b"" if prediction_file is None else bytes_of_file(prediction_file)
    return speculation_of(speculate, prediction)


def drafting_model(model: str, ranks: int, *, device: str) -> "ContinuingModel":
    """The model of `--draft`.

    Raises:
        UsageError: it is none that continues bytes, or several ranks run.
        MarlinError: it is not there or cannot be read.
    """
    from marlin_cli.api import capability_of
    from marlin_cli.continuing_model import ContinuingModel
    from marlin_cli.engine.draft_model import drafts_of
    from marlin_cli.models import Capability

    if ranks > 1:
        raise UsageError(f"--draft is for one process, and {ranks} ranks run; leave it out")
    with about("--draft"):
        if capability_of(model) is not Capability.CONTINUES:
            raise UsageError(f"{model}: it does not continue bytes; name a MegaByte")
        drafting = ContinuingModel.from_pretrained(model, device=device)
        with about(f"{model}:"):
            drafts_of(drafting.network)
    return drafting


def as_mapping(speculated: "Speculated", generated_bytes: int) -> dict[str, Any]:
    """What came of drafts, for JSON."""
    return {
        "drafted_bytes": speculated.drafted_bytes,
        "accepted_bytes": speculated.accepted_bytes,
        "passes": speculated.passes,
        "passes_per_byte": speculated.passes / generated_bytes if generated_bytes else None,
    }


def in_words(speculated: "Speculated") -> str:
    """What came of drafts, for a line."""
    return (
        f"{speculated.accepted_bytes} of {speculated.drafted_bytes} drafted bytes accepted,"
        f" {speculated.passes} passes of the model"
    )
