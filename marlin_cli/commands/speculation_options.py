"""`--speculate` and what goes with it, as more than one command takes them."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from marlin_cli.engine.speculation import Speculated, Speculation

SPECULATE_HELP = (
    "Draft ahead what repeats the prompt or the output, verify it, and write the same bytes: auto, off, or patches (ByT5:"
    " bytes) at once. With it the CPU kernels keep rows apart, as MARLIN_ROWS=exact says."
)


def keep_rows_apart(speculate: str) -> None:
    """Say to the CPU kernels, which are not built yet, that drafts will be verified: see `ops.cpu.rows_are_exact`."""
    if speculate != "off":
        os.environ.setdefault("MARLIN_ROWS", "exact")


def speculation_given(speculate: str, prediction_file: str | None) -> "Speculation":
    """What the options ask for.

    Raises:
        UsageError: another value, or a prediction that cannot be read.
    """
    from marlin_cli.commands.prompts import bytes_of_file
    from marlin_cli.engine.speculation import speculation_of

    return speculation_of(speculate, b"" if prediction_file is None else bytes_of_file(prediction_file))


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
