"""Streams that go on beyond a model's context: a window that moves with them, or the last half of the context read again."""

from dataclasses import dataclass
from typing import Any

from marlin_cli.errors import UsageError
from marlin_cli.models import ARCHITECTURES, Reading
from marlin_cli.text import with_article

# Ids of a stream that nothing bounds: more than any run has.
ENDLESS = 1 << 62

# The leading row is in every sequence of training, so every model has learned to look at it where nothing else matters.
DEFAULT_SINKS = 1


@dataclass(frozen=True)
class Window:
    """How a stream goes on beyond the model's context.

    Raises:
        UsageError: a size below 1, or sinks beside a context that is read again.
    """

    bytes: int | None = (
        None  # what stays in view, sinks included; None: the last half of the context is read again when it is full
    )
    sinks: int | None = None  # rows from the beginning that stay in view: the leading row and the first patches; None: as suits

    def __post_init__(self) -> None:
        if self.bytes is not None and self.bytes < 1:
            raise UsageError(f"--window must be at least 1, found {self.bytes}")
        if self.sinks is not None and self.sinks < 0:
            raise UsageError(f"--sinks must be 0 or more, found {self.sinks}")
        if self.sinks is not None and self.restarts:
            raise UsageError("--sinks: --window restart reads the context again and keeps nothing beside it; leave --sinks out")

    @property
    def restarts(self) -> bool:
        """Is the context read again, from its last half on, whenever it is full?"""
        return self.bytes is None


@dataclass(frozen=True)
class Reach:
    """Which rows before it a row of the global stage sees."""

    window: int  # right before it
    sinks: int  # from the beginning, wherever it stands

    @property
    def farthest(self) -> int:
        """The place from which rows on the sinks are seen: with them and the window before it, as far as any row sees."""
        return self.sinks + self.window


def reach_of(config: Any, window: Window) -> Reach:
    """What a window of bytes means for a network of this configuration.

    The window is in whole patches. A row beyond it sees the sinks as if they stood right before the window (StreamingLLM, arXiv
    2309.17453): so no row is seen from farther than in training, and up to the end of the window all is as without one.

    Raises:
        UsageError: a network that cannot have one, or a size that it cannot have.
    """
    architecture = ARCHITECTURES[config.model_type]
    assert window.bytes is not None
    if architecture.continuing is None or architecture.continuing.reading is not Reading.PATCHES:
        raise UsageError(
            f"--window BYTES is of the patches of a MegaByte, and this is {with_article(architecture.title)};"
            " use --window restart, which reads the last half of the context again"
        )
    patch, stage = config.patch_size, config.stages[0]
    if stage.learned:
        raise UsageError(
            f"--window BYTES: this model learned a position for each of its {stage.length:,} patches and has none beyond;"
            " use --window restart, which reads the last half of the context again"
        )
    if config.attention_window is not None:
        seen = patch * (config.attention_window + 1)
        if window.bytes < seen:
            raise UsageError(
                f"--window: the model's own attention sees {seen:,} bytes, found {window.bytes:,}; give that or more"
            )
        if window.sinks:
            raise UsageError("--sinks: a model whose attention has a window of its own has learned to do without; leave it out")
        return Reach(config.attention_window, 0)
    sinks = DEFAULT_SINKS if window.sinks is None else window.sinks
    least = patch * (sinks + 1)
    if not least <= window.bytes <= config.max_bytes:
        beside = f" with {sinks} sinks" if sinks > 1 else ""
        raise UsageError(
            f"--window must be {least:,} to {config.max_bytes:,} bytes for this model{beside}, found {window.bytes:,}"
        )
    return Reach(window.bytes // patch - sinks - 1, sinks)


def most_ids_of(config: Any, window: Window | None) -> int:
    """How many ids a stream may have."""
    return int(config.max_bytes) if window is None else ENDLESS
