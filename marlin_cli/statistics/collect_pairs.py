"""Measures the activations of one input and its answer in a ByT5, teacher-forced. Keeps nothing, as `collect`."""

import mlx.core as mx

from marlin_cli.models.byt5 import ByT5, PlainMemory
from marlin_cli.models.byt5_ids import ids_of_bytes
from marlin_cli.statistics.collect import Kept, keep_heads, observed_inputs
from marlin_cli.statistics.data import Totals
from marlin_cli.statistics.hessians import HessianAccumulator


def measure_pair(
    network: ByT5,
    domain: str,
    source: bytes,
    target: bytes,
    size_bytes: int | None = None,
    hessians: HessianAccumulator | None = None,
) -> Totals:
    """What one input and its answer do in the network: the encoder reads the input, the decoder the answer so far.

    Rows are those of every byte, of the input's end, and of the decoder's start. Keys and values are those that the
    decoder holds: of its own rows, and of the encoder's states. An encoder alone sees the input and nothing else.
    Memory: the activations of one layer, and its attention scores.

    Args:
        size_bytes: what counts as measured bytes; both sides' if None.
        hessians: x^T x of every input of a layer is added to it.

    Raises:
        StatisticsError: activations that are not finite.
    """
    config = network.config
    inputs: Kept = {}
    keys: Kept = {}
    values: Kept = {}
    with observed_inputs(network, inputs, domain, hessians):
        # Nothing is evaluated but by the observers, each of which evaluates what leads to it.
        states = network.encode(mx.array([[*ids_of_bytes(source), config.end_id]]))
        if config.decoder_layers:
            memory = network.memory(states)
            caches = []
            for index, each in enumerate(memory):
                _keep(keys, values, f"decoder.layers.{index}.cross", each)
                caches.append(_ObservingCache(keys, values, f"decoder.layers.{index}.attention"))
            target_ids = mx.array([[config.start_id, *ids_of_bytes(target)]])
            network.head(network.decode(target_ids, memory, caches))
    return Totals({domain: len(source) + len(target) if size_bytes is None else size_bytes}, inputs, keys, values)


class _ObservingCache:
    """A `SelfCache` for one call, which shows what a real one would hold after it."""

    def __init__(self, keys: Kept, values: Kept, path: str) -> None:
        self._keys, self._values, self._path = keys, values, path

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        keep_heads(self._keys, self._path, keys)
        keep_heads(self._values, self._path, values)
        return keys, values


def _keep(keys: Kept, values: Kept, path: str, memory: PlainMemory) -> None:
    keep_heads(keys, path, memory.keys)
    keep_heads(values, path, memory.values)
