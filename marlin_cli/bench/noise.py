"""The line about a machine that did other things while models were timed."""

from collections.abc import Iterable

from marlin_cli import console
from marlin_cli.bench.spreads import Spread

# Interquartile range over median of speeds, beyond which a run is said to be noisy.
NOISY = 0.1


def say_if_noisy(speeds: Iterable[Spread], what: str) -> None:
    """A line on stderr where repeats of a speed lie far apart; `what` names the speeds."""
    widest = max((speed.relative_range for speed in speeds), default=0.0)
    if widest > NOISY:
        console.note(f"the machine was noisy: the middle half of the {what} spans {widest:.0%} of their median")
