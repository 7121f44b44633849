"""What ranks change in a run of `marlin bench`: they score together, and are not timed."""

import dataclasses
from typing import Any, TypeVar

from marlin_cli import console
from marlin_cli.errors import UsageError
from marlin_cli.ranks import Ranks

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
