"""Texts as padded batches, for the steps that run calibration bytes through a network that encodes."""

from collections.abc import Iterable, Iterator

from marlin_cli.corpus import Text
from marlin_cli.models.canine import CanineConfig
from marlin_cli.models.la_canine import LaCanineConfig
from marlin_cli.models.text_batch import TextBatch, batch_of

TEXTS_PER_BATCH = 8


def text_batches(texts: Iterable[Text], config: CanineConfig | LaCanineConfig) -> Iterator[TextBatch]:
    """The texts in their order, `TEXTS_PER_BATCH` in a batch and perhaps fewer in the last, as if padded without end."""
    found: list[bytes] = []
    for text in texts:
        found.append(text.data)
        if len(found) == TEXTS_PER_BATCH:
            yield batch_of(found, config, settled=True)
            found = []
    if found:
        yield batch_of(found, config, settled=True)


def text_batches_by_domain(texts: Iterable[Text], config: CanineConfig | LaCanineConfig) -> list[tuple[str, TextBatch]]:
    """All texts, those of a domain together, the longest first so that little is filler; domain after domain."""
    found: dict[str, list[Text]] = {}
    for text in texts:
        found.setdefault(text.domain, []).append(text)
    return [
        (domain, batch)
        for domain, each in sorted(found.items())
        for batch in text_batches(sorted(each, key=lambda one: -len(one.data.decode())), config)
    ]
