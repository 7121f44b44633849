"""What a network's activations look like over a corpus: measured once, kept in a file, read by quantisation."""

from marlin_cli.statistics.data import Statistics, merge
from marlin_cli.statistics.store import load_statistics, save_statistics

__all__ = ["Statistics", "load_statistics", "merge", "save_statistics"]
