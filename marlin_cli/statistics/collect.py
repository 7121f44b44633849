"""Measures the activations of one window of bytes in a MegaByte, and what any network's layers see.

It keeps nothing: `data.pool` adds windows up.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from marlin_cli.errors import StatisticsError
from marlin_cli.models import Network, linear_layers, part_of, set_modules
from marlin_cli.models.megabyte import LayerCache, MegaByte, MegaByteConfig
from marlin_cli.ops import attention, delay_one_row
from marlin_cli.statistics.data import Moments, Totals
from marlin_cli.statistics.hessians import HessianAccumulator

# A layer whose input is that of its neighbour, which is measured in its place.
SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "gate_proj": "up_proj"}

# Keys and values of a ByT5's input come from the encoder's states in every layer of the decoder: measured in the first.
ENCODER_STATES = "decoder.layers.0.cross.k_proj"

Kept = dict[str, Moments]
Record = Callable[[mx.array], None]


def shared_inputs(network: Network) -> dict[str, str]:
    """Path of every linear layer -> path of the layer in whose name its input is measured."""
    shared = {}
    for path in linear_layers(network):
        parent, _, name = path.rpartition(".")
        if part_of(path) == "cross" and name in ("k_proj", "v_proj"):
            shared[path] = ENCODER_STATES
        else:
            shared[path] = f"{parent}.{SAME_INPUT[name]}" if name in SAME_INPUT else path
    return shared


def hessian_channels(network: Network) -> dict[str, int]:
    """Channels of every input that layers which can be packed see, by the path in whose name it is measured."""
    layers = linear_layers(network)
    return {
        source: int(layers[source]["weight"].shape[1])
        for source in dict.fromkeys(shared_inputs(network).values())
        if part_of(source) != "head"
    }


def rows_of_sequence(path: str, config: MegaByteConfig) -> int:
    """Rows of a sequence that the inputs of a linear layer are told apart by; 1 where all rows are alike."""
    part = part_of(path)
    if part in ("local", "head"):
        return config.stages[-1].length + (1 if config.layout == "megabyte_pytorch" else 0)
    if part == "middle":
        names = path.split(".")
        # The last token of a sequence is never embedded: it would only predict beyond the end.
        return config.stages[1 + int(names[1])].length - (1 if names[2] == "patch_projection" else 0)
    if path == "global_to_local" and config.layout == "paper":
        return config.patch_size  # a slice of the global state for each byte
    return 1


def measure(
    network: MegaByte, domain: str, window: npt.NDArray[np.uint8], hessians: HessianAccumulator | None = None
) -> Totals:
    """What one window [bytes] does in the network, from an empty context.

    The window is cut to whole patches, so that no filler is measured, and the cut bytes are not counted. Sums over
    its rows are float32, as the network should be: a window at a time, so that no batch size shows in the numbers.
    Memory: the activations of one layer, and its attention scores (of the global stage, heads x patches^2).

    Args:
        hessians: x^T x of every input is added to it.

    Raises:
        StatisticsError: no whole patch, or activations that are not finite.
    """
    patch = network.config.patch_size
    used = len(window) // patch * patch
    if not used:
        raise StatisticsError(f"a window of {len(window)} bytes holds no whole patch of {patch}")
    inputs: Kept = {}
    keys: Kept = {}
    values: Kept = {}
    groups = {path: rows_of_sequence(path, network.config) for path in linear_layers(network)}
    with observed_inputs(network, inputs, domain, hessians, groups):
        # The logits are never evaluated: each observer evaluates what leads to it.
        caches = _observing_caches(network, keys, values)
        network(mx.array(window[:used].astype(np.int32))[None], lambda n, rows: network.stages[n].stack(rows, caches[n]))
    return Totals({domain: used}, inputs, keys, values)


class _ObservedLinear(nn.Module):
    """A linear layer that shows its input."""

    def __init__(self, layer: nn.Module, record: Record) -> None:
        super().__init__()
        self.layer, self.record = layer, record

    def __call__(self, x: mx.array) -> mx.array:
        self.record(x)
        return self.layer(x)


class _ObservingCache:
    """A `LayerCache` for one call, which shows what a real one would hold after it."""

    offset = 0

    def __init__(self, record_keys: Record, record_values: Record) -> None:
        self._record_keys, self._record_values = record_keys, record_values

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float, window: int | None) -> mx.array:
        self._record_keys(keys)
        self._record_values(values)
        return attention(queries, keys, values, scale, window=window)

    def delay(self, slot: int, rows: mx.array) -> mx.array:
        return delay_one_row(rows)


@contextlib.contextmanager
def observed_inputs(
    network: Network,
    kept: Kept,
    domain: str,
    hessians: HessianAccumulator | None = None,
    groups: Mapping[str, int] | None = None,
) -> Iterator[None]:
    """Inside the block a forward pass of `network` fills `kept`; after it the network is as it was.

    Args:
        hessians: x^T x of every input is added to it, for `domain`.
        groups: rows of a sequence that the inputs of a layer are told apart by, by path; 1 for all if None.
    """
    layers = linear_layers(network)
    observed = list(dict.fromkeys(shared_inputs(network).values()))
    add_rows = None if hessians is None else partial(_add_rows, hessians, domain)
    observers: list[tuple[str, nn.Module]] = []
    for path in observed:
        record: Record = partial(_keep_input, kept, path, 1 if groups is None else groups[path], add_rows)
        observers.append((path, _ObservedLinear(layers[path], record)))
    try:
        set_modules(network, observers)
        yield
    finally:
        set_modules(network, [(path, layers[path]) for path in observed])


def _observing_caches(network: MegaByte, keys: Kept, values: Kept) -> list[list[LayerCache]]:
    """A cache for each layer of each stage; a forward pass with them fills `keys` and `values`."""
    names = ["global", *(f"middle.{index}" for index in range(len(network.config.middle))), "local"]
    caches: list[list[LayerCache]] = []
    for name, stage in zip(names, network.config.stages, strict=True):
        paths = [f"{name}.layers.{index}.attention" for index in range(stage.layers)]
        caches.append([_ObservingCache(partial(keep_heads, keys, path), partial(keep_heads, values, path)) for path in paths])
    return caches


def _keep_input(kept: Kept, path: str, groups: int, add_rows: Callable[[str, mx.array], None] | None, x: mx.array) -> None:
    """Keep the sums over sequences of x [..., channels], whose rows come in sequences of `groups`."""
    channels = x.shape[-1]
    sequences = x.size // (groups * channels) if groups else 0
    kept[path] = _moments(x.reshape(sequences, groups, channels), path)
    if add_rows is not None and sequences:
        add_rows(path, x.reshape(-1, channels))


def _add_rows(hessians: HessianAccumulator, domain: str, path: str, rows: mx.array) -> None:
    hessians.add(path, domain, np.array(rows.astype(mx.float32)))


def keep_heads(kept: Kept, path: str, x: mx.array) -> None:
    """Keep the sums over batch and rows of x [batch, heads, rows, channels]."""
    heads, channels = x.shape[1], x.shape[-1]
    kept[path] = _moments(x.swapaxes(1, 2).reshape(-1, heads, channels), path)


def _moments(rows: mx.array, path: str) -> Moments:
    """Sums over the first axis of rows [n, groups, channels], as those of a single domain."""
    count, groups, channels = rows.shape
    if not rows.size:
        shape = (1, groups, channels)
        return Moments(np.zeros((1, groups), np.int64), np.zeros(shape, np.float64), np.zeros(shape, np.float32))
    wide = rows.astype(mx.float32)
    sum_squares, largest = mx.square(wide).sum(axis=0), mx.abs(wide).max(axis=0)
    # Evaluated now, so that the activations behind them can be freed.
    mx.eval(sum_squares, largest)
    moments = Moments(
        count=np.full((1, groups), count, np.int64),
        sum_squares=np.array(sum_squares)[None].astype(np.float64),
        absolute_maximum=np.array(largest)[None],
    )
    if not np.isfinite(moments.sum_squares).all():
        raise StatisticsError(f"activations at {path!r} are not finite; the model overflows or its weights are damaged")
    return moments
