"""Decoding by ranks that share a network (`models.splitting`): all draw from the same logits, and see that they drew the same.

Sums over ranks are the same bits on each, and so is what follows from them on machines of one kind. Were it not, the ranks
would go on with different texts, and wait for each other at different places: so each batch of ids is compared.
"""

import hashlib

import mlx.core as mx
import numpy as np

from marlin_cli.models import Network
from marlin_cli.models.splitting import share_of
from marlin_cli.ranks import FoundByAll


def agreed(network: Network, ids: mx.array | np.ndarray) -> mx.array | np.ndarray:
    """The ids [streams, n] that this rank has drawn, if those of all ranks that share the network are the same.

    Raises:
        DistributedError: they are not.
    """
    share = share_of(network)
    if share is not None:
        own = np.array(ids).astype(np.int32)
        _compare(own, np.array(mx.distributed.all_gather(mx.array(own[None]), group=share.group)))
    return ids


def agreed_bytes(network: Network, data: bytes) -> None:
    """As `agreed`, of bytes of any length.

    Raises:
        DistributedError: they are not the same on all ranks.
    """
    share = share_of(network)
    if share is not None:
        own = np.frombuffer(hashlib.sha256(data).digest(), dtype=np.int32)
        _compare(own, np.array(mx.distributed.all_gather(mx.array(own[None]), group=share.group)))


def _compare(own: np.ndarray, everyone: np.ndarray) -> None:
    """Raise `DistributedError` unless all rows of `everyone` are alike, this rank's own among them."""
    different = [rank for rank, theirs in enumerate(everyone) if (theirs != everyone[0]).any()]
    if different or (own != everyone[0]).any():
        rank = different[0] if different else 0
        raise FoundByAll(
            f"rank {rank} has drawn other bytes than rank 0: ranks that share a model need its same files,"
            " and machines of one kind"
        )
