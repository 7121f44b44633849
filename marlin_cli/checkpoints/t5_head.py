"""The head of a T5 in transformers' layout: is it the table of embeddings, and is its input scaled?

These are two facts, and the versions of transformers tell them by different rules; a checkpoint is read by those of the
version that wrote it, by `transformers_version` of config.json.

- 4 has one flag, `tie_word_embeddings` (where it is left out: true for t5, false for mt5). True: the head is the table
  and scaled, and a stored `lm_head.weight` gives way to it. False: a head of its own, not scaled, which must be stored.
- 5 ties always: the head is the table, unless an `lm_head.weight` that differs from it is stored. mt5 is never scaled. t5
  is as `scale_decoder_outputs` says, and where that is left out unless `tie_word_embeddings` is false. What 5 writes
  has `tie_word_embeddings` true whatever the head is, and mostly no `lm_head.weight`.

Where no version is named but `scale_decoder_outputs` is, 5 wrote it. Where neither is, 5's rules hold, and where 4 would
do otherwise that is said.
"""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import mlx.core as mx

from marlin_cli.config import describe
from marlin_cli.errors import AssumptionWarning, CheckpointError, ConfigError
from marlin_cli.text import quoted

TIE, SCALE, VERSION = "tie_word_embeddings", "scale_decoder_outputs", "transformers_version"
HEAD = "lm_head.weight"

# What the file holds under the head's name: nothing, the table once more, or another matrix.
Stored = Literal["nothing", "the table", "its own"]


class Head(NamedTuple):
    """What the logits are computed with."""

    tied: bool  # the table of embeddings, not a matrix of its own
    scaled: bool  # hidden rows are multiplied by d_model ** -0.5


@dataclass(frozen=True)
class HeadFlags:
    """What config.json says that a head depends on; None where it says nothing."""

    model_type: str
    tie: bool | None
    scale: bool | None
    version: str | None  # of the transformers that wrote it

    @property
    def major(self) -> int | None:
        """4 or 5, whose rules hold; None where nothing tells it. Nothing older knows T5 over bytes."""
        number = re.match(r"(\d{1,9})\.", self.version or "")
        if number is None:
            return None if self.scale is None else 5
        return 5 if int(number[1]) >= 5 else 4

    def head(self, stored: Stored) -> Head | None:
        """The head by the rules that hold; None where they ask for a matrix that is not stored."""
        return self.by_4(stored) if self.major == 4 else self.by_5(stored)

    def by_4(self, stored: Stored) -> Head | None:
        """As transformers 4 has it."""
        if self.model_type == "t5" if self.tie is None else self.tie:
            return Head(tied=True, scaled=True)
        return None if stored == "nothing" else Head(tied=stored == "the table", scaled=False)

    def by_5(self, stored: Stored) -> Head:
        """As transformers 5 has it."""
        scaled = self.model_type == "t5" and (self.tie is not False if self.scale is None else self.scale)
        return Head(tied=stored != "its own", scaled=scaled)


def head_flags(document: Mapping[str, Any], where: Path) -> HeadFlags:
    """The flags of config.json, which stands at `where`.

    Raises:
        ConfigError: a flag that is neither true nor false.
    """
    for name in (TIE, SCALE):
        if name in document and not isinstance(document[name], bool):
            raise ConfigError(f"{where}: {name} should be true or false, found {describe(document[name])}")
    version = document.get(VERSION)
    known = version if isinstance(version, str) else None
    return HeadFlags(str(document.get("model_type")), document.get(TIE), document.get(SCALE), known)


def stored_head(head: mx.array | None, table: mx.array) -> Stored:
    """What stands under the head's name, beside this table of embeddings."""
    if head is None:
        return "nothing"
    return "the table" if head.shape == table.shape and mx.array_equal(head, table).item() else "its own"


def choose_head(flags: HeadFlags, stored: Stored, path: Path) -> Head:
    """The head of the checkpoint at `path`; what is assumed of it is said as an `AssumptionWarning`.

    Raises:
        CheckpointError: it has a head of its own, which is not stored.
    """
    head = flags.head(stored)
    if head is None:
        raise CheckpointError(
            f"{path}: the tensor {HEAD!r} is missing; {_said(flags)} transformers {quoted(flags.version)} gives it a head of"
            " its own, which is random where none is stored; save it with T5ForConditionalGeneration"
        )
    if flags.major is None and head != flags.by_4(stored):
        warnings.warn(
            f"{path}: config.json names neither {VERSION} nor {SCALE}; read as by transformers 5, {_named(head)};"
            f" transformers 4 makes of it {_named(flags.by_4(stored))}",
            AssumptionWarning,
            stacklevel=2,
        )
    if flags.major == 4 and head.tied and stored == "its own":
        warnings.warn(
            f"{path}: {HEAD!r} is left out, as transformers {quoted(flags.version)}, which wrote config.json, leaves it out"
            f" {_said(flags)}; transformers 5 takes it",
            AssumptionWarning,
            stacklevel=2,
        )
    return head


def _said(flags: HeadFlags) -> str:
    return f"without {TIE}" if flags.tie is None else f"with {TIE} {str(flags.tie).lower()}"


def _named(head: Head | None) -> str:
    if head is None:
        return "a random head"
    return f"{'tied to the embeddings' if head.tied else 'with a head of its own'} and {'' if head.scaled else 'not '}scaled"
