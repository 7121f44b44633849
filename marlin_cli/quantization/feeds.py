"""How calibration bytes come to a network, by what it does with them: windows to continue, inputs with answers, or texts.

A window or text is taken once; pairs, which are few, come again and again in another order where steps do not end.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from marlin_cli.corpus import CorruptedCorpus, PairCorpus, TextCorpus, open_corpus, open_pairs
from marlin_cli.models import Capability, Network, architecture_of
from marlin_cli.models.pair_batch import PairBatch
from marlin_cli.models.text_batch import TextBatch
from marlin_cli.quantization.pair_batches import BATCH_IDS, pair_batches, pair_batches_by_domain
from marlin_cli.quantization.text_batches import TEXTS_PER_BATCH, text_batches, text_batches_by_domain
from marlin_cli.quantization.windows import WINDOW_BYTES, WINDOWS_PER_BATCH, batches_by_domain, batches_of, window_bytes_of

# (domain, a batch as `Architecture.start` and `.logits` take it).
Batches = list[tuple[str, Any]]


class Feed(Protocol):
    """What steps that run bytes through a network need of them."""

    def by_domain(
        self, network: Network, corpora: Sequence[str], pairs: Sequence[str], max_bytes: int, note: Callable[[str], None]
    ) -> Batches:
        """Batches of at most so many bytes, a domain after the other; `note` is told what is left out.

        Raises:
            CorpusError: a corpus that cannot be read, or no pair that fits the model.
        """

    def endless(self, network: Network, corpora: Sequence[str], pairs: Sequence[str]) -> Iterator[Any]:
        """Batches for as many steps as there may be; a corpus ends."""

    def batch_bytes(self, network: Network) -> int:
        """Bytes of a batch, or a little less: for progress."""

    def sample_text(self, network: Network) -> str:
        """The smallest thing that a corpus must hold, for errors."""

    def batch_text(self, network: Network) -> str:
        """The size of a batch, for config.json."""


class WindowFeed:
    """Windows of whole patches, for networks that continue bytes."""

    def by_domain(
        self, network: Network, corpora: Sequence[str], pairs: Sequence[str], max_bytes: int, note: Callable[[str], None]
    ) -> Batches:
        """See `Feed`."""
        window = window_bytes_of(network)
        return [*batches_by_domain(open_corpus(corpora, sequence_bytes=window, seed=0, max_bytes=max_bytes), window)]

    def endless(self, network: Network, corpora: Sequence[str], pairs: Sequence[str]) -> Iterator[Any]:
        """See `Feed`."""
        window = window_bytes_of(network)
        return batches_of(open_corpus(corpora, sequence_bytes=window, seed=0, max_bytes=None), window)

    def batch_bytes(self, network: Network) -> int:
        """See `Feed`."""
        return WINDOWS_PER_BATCH * window_bytes_of(network)

    def sample_text(self, network: Network) -> str:
        """See `Feed`."""
        return f"window of {window_bytes_of(network)} bytes"

    def batch_text(self, network: Network) -> str:
        """See `Feed`."""
        return f"{WINDOWS_PER_BATCH} x {window_bytes_of(network)} bytes"


class PairFeed:
    """Pairs, or windows of corpora with spans taken out, for networks that answer."""

    def by_domain(
        self, network: Network, corpora: Sequence[str], pairs: Sequence[str], max_bytes: int, note: Callable[[str], None]
    ) -> Batches:
        """See `Feed`."""
        examples = _examples(network, corpora, pairs, 0, max_bytes)
        if isinstance(examples, PairCorpus) and examples.left_out:
            note(f"{examples.left_out} pair(s) are left out: a side is longer than the model's input")
        return [*pair_batches_by_domain(examples, network.config)]

    def endless(self, network: Network, corpora: Sequence[str], pairs: Sequence[str]) -> Iterator[Any]:
        """See `Feed`."""
        for seed in itertools.count() if pairs else (0,):
            yield from pair_batches(_examples(network, corpora, pairs, seed, None), network.config)

    def batch_bytes(self, network: Network) -> int:
        """See `Feed`."""
        return BATCH_IDS

    def sample_text(self, network: Network) -> str:
        """See `Feed`."""
        return "pair"

    def batch_text(self, network: Network) -> str:
        """See `Feed`."""
        return f"at most {BATCH_IDS} ids of pairs"


class TextFeed:
    """Texts, for networks that encode them; what of a corpus is no UTF-8 is left out."""

    def by_domain(
        self, network: Network, corpora: Sequence[str], pairs: Sequence[str], max_bytes: int, note: Callable[[str], None]
    ) -> Batches:
        """See `Feed`."""
        texts = _texts(network, corpora, max_bytes)
        batches: Batches = [*text_batches_by_domain(texts, network.config)]
        if texts.left_out:
            note(f"{texts.left_out} window(s) of the corpus are left out: they are no UTF-8")
        return batches

    def endless(self, network: Network, corpora: Sequence[str], pairs: Sequence[str]) -> Iterator[Any]:
        """See `Feed`."""
        return text_batches(_texts(network, corpora, None), network.config)

    def batch_bytes(self, network: Network) -> int:
        """See `Feed`."""
        return TEXTS_PER_BATCH * window_bytes_of(network)

    def sample_text(self, network: Network) -> str:
        """See `Feed`."""
        return "text (UTF-8)"

    def batch_text(self, network: Network) -> str:
        """See `Feed`."""
        return f"{TEXTS_PER_BATCH} x {window_bytes_of(network)} bytes of text"


FEEDS: dict[Capability, Feed] = {
    Capability.CONTINUES: WindowFeed(),
    Capability.ANSWERS: PairFeed(),
    Capability.ENCODES: TextFeed(),
}


def feed_of(network: Network) -> Feed:
    """How bytes come to a network."""
    return FEEDS[architecture_of(network).capability]


def size_bytes(batch: Any) -> int:
    """Bytes of the corpus that went into a batch."""
    return batch.size_bytes if isinstance(batch, (PairBatch, TextBatch)) else batch.size


def _texts(network: Network, corpora: Sequence[str], max_bytes: int | None) -> TextCorpus:
    return TextCorpus(open_corpus(corpora, sequence_bytes=window_bytes_of(network), seed=0, max_bytes=max_bytes))


def _examples(
    network: Network, corpora: Sequence[str], pairs: Sequence[str], seed: int, max_bytes: int | None
) -> PairCorpus | CorruptedCorpus:
    longest = network.config.max_bytes
    if pairs:
        return open_pairs(pairs, sequence_bytes=longest, seed=seed, max_bytes=max_bytes)
    return CorruptedCorpus(open_corpus(corpora, sequence_bytes=min(WINDOW_BYTES, longest), seed=seed, max_bytes=max_bytes))
