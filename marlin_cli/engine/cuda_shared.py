"""Whole patches on NVIDIA GPUs whose ranks share the global stage: its steps go in one launch on each, or by operations."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from marlin_cli.engine import cuda_patches
from marlin_cli.engine.cache import CacheBits, KeyValueCache
from marlin_cli.engine.cuda_layers import say_once
from marlin_cli.engine.cuda_noise import bytes_of
from marlin_cli.engine.cuda_patches import Patch, PatchDecoder
from marlin_cli.engine.sampling import Noise, Sampling
from marlin_cli.errors import BackendError
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.ops.cuda_arrays import StageArrays
from marlin_cli.ops.cuda_exchange import NoExchange, exchange_among
from marlin_cli.ops.cuda_stages import addresses
from marlin_cli.ranks import Ranks


def shared_patch_decoder(network: MegaByte, ranks: Ranks, streams: int, bits: CacheBits) -> PatchDecoder | None:
    """The decoder of whole patches of a network that ranks share, which all must ask for at the same time; None as elsewhere.

    Raises:
        DistributedError: the ranks lost their connection.
    """
    local = cuda_patches.local_stage(network)
    if local is None or cuda_patches.why_operations(network, streams, bits) is not None:
        return None
    exchange = exchange_among(ranks)
    if not isinstance(exchange, NoExchange):
        return cuda_patches.patch_decoder(network, streams, bits, exchange)
    say_once(f"the stage that ranks share goes operation by operation: {exchange}")
    try:
        return SharedByOperations(network, local, cuda_patches.added_rows(network), streams)
    except BackendError as error:
        say_once(f"patches are decoded operation by operation: {error}")
        return None


class SharedByOperations(PatchDecoder):
    """The local stage in one launch, the steps of a global one that ranks share by operations of MLX, which sum over ranks.

    A step is taken when something asks for what it makes.
    """

    def __init__(self, network: MegaByte, local: StageArrays, added: mx.array, streams: int) -> None:
        super().__init__((None, local), added, streams)
        self._network = network
        self._open: tuple[Sequence[KeyValueCache], int] | None = None  # caches and slot of a patch without what follows it

    def enter(
        self, condition: mx.array, before: mx.array, given: mx.array, caches: Sequence[KeyValueCache], padding: mx.array | None
    ) -> None:
        self._open, self._filler = None, padding
        super().enter(condition, before, given, caches, padding)

    def queue(self, caches: Sequence[KeyValueCache], sampling: Sampling, noise: Noise, more: bool) -> Patch:
        self._close()
        return super().queue(caches, sampling, noise, more)

    def condition(self, patch: Patch) -> mx.array:
        self._close()
        return super().condition(patch)

    def take_back(self, patch: Patch, sampling: Sampling, steps: int) -> None:
        self._open = None
        if sampling.temperature:
            self._noise.give_back(steps)

    def count(self, caches: Sequence[KeyValueCache]) -> None:
        self._close()  # MLX counts

    def _follow(self, caches: Sequence[KeyValueCache], slot: int) -> None:
        self._open = caches, slot

    def _close(self) -> None:
        if self._open is None:
            return
        (caches, slot), self._open = self._open, None
        data = self._queue.read(self._ids_of(slot), 4 * self._streams * self._steps)  # filler is not read
        ids = mx.array(np.frombuffer(data, np.int32).reshape(self._streams, 1, self._steps))
        before: int | mx.array = caches[0].rows - 1  # patches
        if self._filler is not None:
            before = before - self._filler
        stage = self._network.stages[0]
        hidden = stage.stack(self._network.token_rows(0, ids, before, None), caches)[:, -1]
        condition = self._network.to_next(0, hidden).astype(self._stages[1].table.dtype)
        self._queue.write(self._condition_of(slot), bytes_of(condition))
        self._queue.wait()  # the bytes are there no longer
        self._lead = self._condition_of(slot)

    def _give_room(self, caches: Sequence[KeyValueCache], *others: mx.array) -> list[int]:
        return addresses(others)
