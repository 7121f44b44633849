"""Decoding by ranks that share a network (`models.splitting`): all draw from the same logits, and see that they drew the same.

Sums over ranks are the same bits on each, and so is what follows from them on machines of one kind. Were it not, the ranks
would go on with different texts, and wait for each other at different places: so what comes of each step is compared.
"""

import hashlib
from typing import TypeVar

import mlx.core as mx
import numpy as np

from marlin_cli.models import Network
from marlin_cli.models.splitting import share_of
from marlin_cli.ranks import FoundByAll

Told = TypeVar("Told")


def agreed(network: Network, told: Told) -> Told:
    """What a step of a scheduler told, if it is the same on all ranks that share the network.

    Args:
        told: values whose `repr` says all of them, such as pieces.

    Raises:
        DistributedError: it is not.
    """
    share = share_of(network)
    if share is None:
        return told
    own = np.frombuffer(hashlib.sha256(repr(told).encode()).digest(), dtype=np.int32)
    everyone = np.array(mx.distributed.all_gather(mx.array(own[None]), group=share.group))
    different = [rank for rank, theirs in enumerate(everyone) if (theirs != everyone[0]).any()]
    if different or (own != everyone[0]).any():
        rank = different[0] if different else share.rank
        raise FoundByAll(
            f"rank {rank} has drawn other bytes than rank 0: ranks that share a model need its same files,"
            " and machines of one kind"
        )
    return told
