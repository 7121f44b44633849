"""Decoding by ranks that share a network (`models.splitting`): all draw from the same logits, and see that they drew the same.

Sums over ranks are the same bits on each, and so is what follows from them on machines of one kind. Were it not, the ranks
would go on with different texts, and wait for each other at different places: so what comes of each step is compared, over the
connections by which ranks watch each other. A collective of MLX would take longer than a step of a fast GPU, and would wait
there for kernels that wait for other ranks themselves.
"""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

from marlin_cli.models import Network
from marlin_cli.models.splitting import share_of

Told = TypeVar("Told", bound=Sequence[object])


def agreed(network: Network, told: Told, *, ends: bool) -> Told:
    """What a step of a scheduler told. Where it is not the same on all ranks that share the network, their job ends.

    Args:
        told: pieces, whose `repr` says all of them.
        ends: does a stream end with it? Then ranks wait until all are known to have told the same; else they go on at once.
    """
    share = share_of(network)
    if share is not None and share.ranks is not None:
        share.ranks.drew(hashlib.sha256(repr(told).encode()).hexdigest(), wait=ends)
    return told
