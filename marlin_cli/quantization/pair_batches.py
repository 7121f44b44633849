"""Inputs with their answers as padded batches, for the steps that run calibration bytes through a network that answers."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from marlin_cli.corpus import Example
from marlin_cli.models.byt5_config import ByT5Config
from marlin_cli.models.byt5_ids import ids_of_bytes, padded
from marlin_cli.models.pair_batch import PairBatch

# Ids of inputs and answers in a batch, filler among them; a single longer pair is a batch too.
BATCH_IDS = 8192


def batch_of(examples: Sequence[Example], config: ByT5Config) -> PairBatch:
    """All of these examples, of which there is at least one, as one batch."""
    source, lengths = padded([[*ids_of_bytes(each.source), config.end_id] for each in examples], config.pad_id)
    target, _ = padded([[config.start_id, *ids_of_bytes(each.target)] for each in examples], config.pad_id)
    rows = np.array([len(each.target) + 1 for each in examples])
    return PairBatch(source, lengths, target, rows, sum(each.size_bytes for each in examples))


def pair_batches(examples: Iterable[Example], config: ByT5Config) -> Iterator[PairBatch]:
    """The examples in their order, as many in a batch as `BATCH_IDS` hold."""
    found: list[Example] = []
    for example in examples:
        together = [*found, example]
        longest = max(len(each.source) + 1 for each in together) + max(len(each.target) + 1 for each in together)
        if found and len(together) * longest > BATCH_IDS:
            yield batch_of(found, config)
            together = [example]
        found = together
    if found:
        yield batch_of(found, config)


def pair_batches_by_domain(examples: Iterable[Example], config: ByT5Config) -> list[tuple[str, PairBatch]]:
    """All examples, those of a domain together, the longest first so that little is filler; domain after domain."""
    found: dict[str, list[Example]] = {}
    for example in examples:
        found.setdefault(example.domain, []).append(example)
    return [
        (domain, batch)
        for domain, each in sorted(found.items())
        for batch in pair_batches(sorted(each, key=lambda one: -len(one.source) - len(one.target)), config)
    ]
