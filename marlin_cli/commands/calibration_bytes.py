"""The bytes that `marlin quantize` runs through a model, as they were named on the command line."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from marlin_cli import console
from marlin_cli.errors import UsageError
from marlin_cli.models import Network
from marlin_cli.quantization.feeds import Batches, feed_of

DEFAULT_CORPUS = "default"


@dataclass(frozen=True)
class CalibrationBytes:
    """What was named on the command line: corpora, or files of pairs; `default` if neither.

    Attributes:
        step: the option's first word, `calibration` or `distill`, for errors.
    """

    step: str
    corpora: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()

    @property
    def names(self) -> str:
        """What was named, for a person."""
        return ", ".join(self.pairs or self._corpora)

    @property
    def _corpora(self) -> tuple[str, ...]:
        return self.corpora or (DEFAULT_CORPUS,)

    def up_to(self, network: Network, max_bytes: int) -> Batches:
        """(domain, batch) of at most so many bytes; those of pairs that are too long are left out.

        Raises:
            UsageError: the corpora hold no whole window.
            CorpusError: no pair that fits the model.
        """
        feed = feed_of(network)
        batches = feed.by_domain(network, self._corpora, self.pairs, max_bytes, console.note)
        if not batches:
            raise UsageError(f"--{self.step}-corpus: no {feed.sample_text(network)} in {self.names}")
        return batches

    def endless(self, network: Network) -> Iterator[Any]:
        """Batches for steps of tuning."""
        return feed_of(network).endless(network, self._corpora, self.pairs)
