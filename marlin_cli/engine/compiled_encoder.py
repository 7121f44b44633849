"""ByT5's encoder as compiled graphs on an NVIDIA GPU, where the host takes longer to ask for its operations than they take."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_flatten

from marlin_cli.models.byt5 import ByT5, PlainMemory

MOST_SHAPES = 64  # of inputs that graphs are kept for


@dataclass(frozen=True, eq=False)
class _Graphs:
    """Graphs hold the weights that they were traced with."""

    weights: list[mx.array]
    shapes: set[tuple[tuple[int, ...], bool]]
    encode: Callable[..., mx.array]
    memory: Callable[[mx.array], list[tuple[mx.array, mx.array]]]

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A copy of the network has none."""
        return type(None), ()


class CompiledEncoder:
    """The encoder of a network, and what its decoder reads of the states."""

    def __init__(self, network: ByT5) -> None:
        self._network = network

    def encode(self, ids: mx.array, lengths: mx.array | None) -> mx.array:
        """See `ByT5.encode`."""
        graphs = self._graphs((ids.shape, lengths is not None))
        states: mx.array = graphs.encode(ids, *(() if lengths is None else (lengths,)))
        return states

    def memory(self, states: mx.array, lengths: mx.array | None) -> list[PlainMemory]:
        """See `ByT5.memory`; all in rows."""
        found = self._graphs(None).memory(states)
        lengths = self._network.state_lengths(lengths)
        return [PlainMemory(keys, values, lengths) for keys, values in found]

    def _graphs(self, shape: tuple[tuple[int, ...], bool] | None) -> _Graphs:
        network = self._network
        weights = [array for _, array in tree_flatten(network.parameters())]
        kept: _Graphs | None = vars(network).get("_graphs")
        same = kept is not None and len(kept.weights) == len(weights)
        same = same and all(a is b for a, b in zip(kept.weights, weights, strict=True))  # type: ignore[union-attr]
        if kept is None or not same or len(kept.shapes) >= MOST_SHAPES:

            def memory(states: mx.array) -> list[tuple[mx.array, mx.array]]:
                pairs = [layer.cross.keys_values(states) for layer in network.decoder.layers]
                return [(mx.contiguous(keys), mx.contiguous(values)) for keys, values in pairs]

            kept = _Graphs(weights, set(), mx.compile(lambda ids, *lengths: network.encode(ids, *lengths)), mx.compile(memory))
            object.__setattr__(network, "_graphs", kept)
        if shape is not None:
            kept.shapes.add(shape)
        return kept
