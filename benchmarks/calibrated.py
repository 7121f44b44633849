"""Statistics and windows of calibration bytes for benchmarks; statistics are measured once and kept in a file."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from marlin_cli.corpus import Corpus, open_corpus, parse_source
from marlin_cli.models import Network
from marlin_cli.quantization.windows import WINDOW_BYTES, Batch, batches_by_domain
from marlin_cli.statistics import Statistics
from marlin_cli.statistics.collect import hessian_channels
from marlin_cli.statistics.hessians import HessianAccumulator
from marlin_cli.statistics.run import calibrate

SEQUENCE_BYTES = 2048


def corpus_of(corpora: Sequence[str], max_bytes: int, domain: str | None = None) -> Corpus:
    """Windows of the corpora (as calibrate's --corpus), or of one of their domains alone."""
    sources = [source for text in corpora for source in parse_source(text) if domain in (None, source.domain)]
    return Corpus(sources, sequence_bytes=SEQUENCE_BYTES, seed=0, max_bytes=max_bytes)


def statistics_of(network: Network, corpus: Corpus, file: Path) -> Statistics:
    """Statistics of the network on the corpus with x^T x, measured unless `file` has them."""
    with tempfile.TemporaryDirectory() as folder:
        sums = HessianAccumulator(hessian_channels(network), len(corpus.domains), Path(folder))
        return calibrate(network, corpus, file, model=file.stem, resume=True, hessians=sums)


def calibration_batches(corpora: Sequence[str], max_bytes: int) -> list[Batch]:
    """Windows for sequential packing, as `marlin quantize --sequential` takes them."""
    corpus = open_corpus(corpora, sequence_bytes=WINDOW_BYTES, seed=0, max_bytes=max_bytes)
    return batches_by_domain(corpus, WINDOW_BYTES)
