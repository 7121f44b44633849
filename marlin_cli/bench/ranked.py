"""What ranks change in a run of `marlin bench`: they score together, and are not timed."""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from marlin_cli import console
from marlin_cli.checkpoints import sketch
from marlin_cli.checkpoints.location import locate_model
from marlin_cli.errors import UsageError
from marlin_cli.ranks import Ranks
from marlin_cli.version import __version__

AnyRequest = TypeVar("AnyRequest", bound=Any)


def of_ranks(request: AnyRequest, ranks: Ranks) -> AnyRequest:
    """A request as ranks take it: speed is left out.

    Raises:
        UsageError: there is no quality in it.
    """
    if ranks.size == 1:
        return request
    if request.quality is None:
        raise UsageError(f"{ranks.size} ranks share a quality run; give --quality, or measure speed in one process")
    if request.throughput is None:
        return request
    console.note(f"speed is not measured: {ranks.size} ranks would disturb each other")
    return dataclasses.replace(request, throughput=None)


def check_alike(ranks: Ranks, models: Sequence[str | None], data: Iterable[bytes]) -> None:
    """See that all ranks score the same models on the same bytes.

    Raises:
        DistributedError: they do not.
    """
    if ranks.size == 1:
        return
    digest = hashlib.sha256()
    for each in data:
        digest.update(len(each).to_bytes(8, "little") + each)
    sketches = [sketch(locate_model(name)) for name in models if name is not None]
    ranks.check_alike(version=__version__, models=" ".join(sketches), corpus=digest.hexdigest())
