"""The bytes that `marlin quantize` runs through a model: windows for a MegaByte; pairs, or spans taken out, for a ByT5."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from marlin_cli import console
from marlin_cli.corpus import CorruptedCorpus, PairCorpus, open_corpus, open_pairs
from marlin_cli.errors import UsageError
from marlin_cli.models import Network
from marlin_cli.models.byt5 import ByT5
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.quantization.pair_batches import BATCH_IDS, pair_batches, pair_batches_by_domain
from marlin_cli.quantization.windows import WINDOW_BYTES, WINDOWS_PER_BATCH, batches_by_domain, batches_of, window_bytes_of

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
        return ", ".join(self.pairs or self.corpora or (DEFAULT_CORPUS,))


def batches_up_to(network: Network, chosen: CalibrationBytes, max_bytes: int) -> list[tuple[str, Any]]:
    """(domain, batch) of at most so many bytes, see `quantization.passes`; those of pairs that are too long are left out.

    Raises:
        UsageError: the corpora hold no whole window.
        CorpusError: no pair that fits the model.
    """
    if isinstance(network, ByT5):
        examples = _examples(network, chosen, 0, max_bytes)
        if isinstance(examples, PairCorpus) and examples.left_out:
            console.note(f"{examples.left_out} pair(s) are left out: a side is longer than the model's input")
        return [*pair_batches_by_domain(examples, network.config)]
    window = window_bytes_of(network)
    corpus = open_corpus(chosen.corpora or (DEFAULT_CORPUS,), sequence_bytes=window, seed=0, max_bytes=max_bytes)
    batches = batches_by_domain(corpus, window)
    if not batches:
        raise UsageError(f"--{chosen.step}-corpus: no window of {window} bytes in {chosen.names}")
    return [*batches]


def endless_batches(network: Network, chosen: CalibrationBytes) -> Iterator[Any]:
    """Batches for steps of tuning: windows until a corpus ends, pairs in another order again and again."""
    if isinstance(network, MegaByte):
        window = window_bytes_of(network)
        corpus = open_corpus(chosen.corpora or (DEFAULT_CORPUS,), sequence_bytes=window, seed=0, max_bytes=None)
        yield from batches_of(corpus, window)
    elif chosen.pairs:
        for seed in itertools.count():
            yield from pair_batches(_examples(network, chosen, seed, None), network.config)
    else:
        yield from pair_batches(_examples(network, chosen, 0, None), network.config)


def batch_bytes(network: Network) -> int:
    """Bytes of a batch, or a little less: for progress."""
    return BATCH_IDS if isinstance(network, ByT5) else WINDOWS_PER_BATCH * window_bytes_of(network)


def batch_size_text(network: Network) -> str:
    """The size of a batch, for config.json."""
    if isinstance(network, ByT5):
        return f"at most {BATCH_IDS} ids of pairs"
    return f"{WINDOWS_PER_BATCH} x {window_bytes_of(network)} bytes"


def _examples(network: ByT5, chosen: CalibrationBytes, seed: int, max_bytes: int | None) -> PairCorpus | CorruptedCorpus:
    if chosen.pairs:
        return open_pairs(chosen.pairs, sequence_bytes=network.config.max_bytes, seed=seed, max_bytes=max_bytes)
    window = min(WINDOW_BYTES, network.config.max_bytes)
    corpus = open_corpus(chosen.corpora or (DEFAULT_CORPUS,), sequence_bytes=window, seed=seed, max_bytes=max_bytes)
    return CorruptedCorpus(corpus)
