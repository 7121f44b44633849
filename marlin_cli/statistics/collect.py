"""Measures activations of one window, one input with its answer, or one text. Keeps nothing: `data.pool` adds them up."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from marlin_cli.errors import StatisticsError
from marlin_cli.models import Network, architecture_of, linear_layers, part_of, set_modules, shared_inputs
from marlin_cli.ops import QuantizedLinear
from marlin_cli.statistics.data import Moments, Totals
from marlin_cli.statistics.hessians import HessianAccumulator


@dataclass(frozen=True)
class Sums:
    """Of the rows that a layer saw in one call; what the device has yet to find.

    Attributes:
        count: [groups] rows.
        sum_squares: [groups, channels] float32.
        absolute_maximum: [groups, channels] float32.
    """

    count: npt.NDArray[np.int64]
    sum_squares: mx.array
    absolute_maximum: mx.array


Kept = defaultdict[str, list[Sums]]  # a layer may be called several times in a pass, as those are that write states
Record = Callable[[mx.array], None]


def hessian_channels(network: Network) -> dict[str, int]:
    """Channels of every input that layers which can be packed see, by the path in whose name it is measured."""
    return {source: channels for source, channels in _channels(network).items() if part_of(source) != "head"}


def _channels(network: Network) -> dict[str, int]:
    """Channels of every input, by the path in whose name it is measured."""
    layers = linear_layers(network)
    return {source: _columns(layers[source]) for source in dict.fromkeys(shared_inputs(network).values())}


def _columns(layer: Any) -> int:
    """Channels that a layer takes, however its weight is stored."""
    stored: int = layer["weight"].shape[1]
    return stored * 32 // layer.bits if isinstance(layer, QuantizedLinear) else stored


def measure(network: Network, domain: str, window: npt.NDArray[np.uint8], hessians: HessianAccumulator | None = None) -> Totals:
    """What one window [bytes] does in a network that continues bytes, from an empty context.

    The window is cut to whole units of the architecture (patches), so that no filler is measured, and the cut bytes are
    not counted. Sums over its rows are float32, as the network should be: a window at a time, so that no batch size
    shows in the numbers. Memory: the activations of the few layers that are under way, and their attention scores.

    Args:
        hessians: x^T x of every input is added to it.

    Raises:
        StatisticsError: no whole unit, or activations that are not finite.
    """
    unit = architecture_of(network).unit_bytes(network.config)
    used = len(window) // unit * unit
    if not used:
        raise StatisticsError(f"a window of {len(window)} bytes holds no whole patch of {unit}")
    return _measured(network, domain, window[:used], used, hessians)


def measure_pair(
    network: Network,
    domain: str,
    source: bytes,
    target: bytes,
    size_bytes: int | None = None,
    hessians: HessianAccumulator | None = None,
) -> Totals:
    """As `measure`, of an input and its answer in a network that answers.

    Args:
        size_bytes: what counts as measured bytes; both sides' if None.
    """
    size = len(source) + len(target) if size_bytes is None else size_bytes
    return _measured(network, domain, (source, target), size, hessians)


def measure_text(network: Network, domain: str, text: bytes, hessians: HessianAccumulator | None = None) -> Totals:
    """As `measure`, of a text in a network that encodes. Nothing is padded, so that no filler is measured.

    Raises:
        InputError: it is no UTF-8.
    """
    return _measured(network, domain, text, len(text), hessians)


def _measured(network: Network, domain: str, sample: Any, size_bytes: int, hessians: HessianAccumulator | None) -> Totals:
    architecture = architecture_of(network)
    inputs: Kept = defaultdict(list)
    keys: Kept = defaultdict(list)
    values: Kept = defaultdict(list)

    def watch(path: str, its_keys: mx.array, its_values: mx.array) -> None:
        _keep_heads(keys, path, its_keys)
        _keep_heads(values, path, its_values)

    groups = {path: architecture.rows_of_sequence(path, network.config) for path in linear_layers(network)}
    placed = None if architecture.groups_of is None else architecture.groups_of(network, sample)
    with _observed_inputs(network, inputs, domain, hessians, groups, placed):
        # Nothing is evaluated but by the observers, each of which sends for what leads to it.
        architecture.pass_through(network, sample, watch)
    # A sample may be too short for some: states are written by whole blocks alone.
    for path, channels in _channels(network).items():
        if path not in inputs:
            inputs[path].append(_sums(mx.zeros((0, groups[path], channels))))
    return Totals({domain: size_bytes}, *(_moments(kept) for kept in (inputs, keys, values)))


class _ObservedLinear(nn.Module):
    """A linear layer that shows its input."""

    def __init__(self, layer: nn.Module, record: Record) -> None:
        super().__init__()
        self.layer, self.record = layer, record

    def __call__(self, x: mx.array) -> mx.array:
        self.record(x)
        return self.layer(x)


@contextlib.contextmanager
def _observed_inputs(
    network: Network,
    kept: Kept,
    domain: str,
    hessians: HessianAccumulator | None,
    groups: Mapping[str, int],
    placed: Callable[[str], npt.NDArray[np.int64]] | None = None,
) -> Iterator[None]:
    """Inside the block a forward pass of `network` fills `kept`; after it the network is as it was.

    Args:
        hessians: x^T x of every input is added to it, for `domain`.
        groups: rows of a sequence that the inputs of a layer are told apart by, by path.
        placed: which of them each row counts with, see `Architecture.groups_of`.
    """
    layers = linear_layers(network)
    observed = list(dict.fromkeys(shared_inputs(network).values()))
    add_rows = None if hessians is None else partial(_add_rows, hessians, domain)
    observers: list[tuple[str, nn.Module]] = []
    for path in observed:
        record: Record = partial(_keep_input, kept, path, groups[path], add_rows, placed)
        observers.append((path, _ObservedLinear(layers[path], record)))
    try:
        set_modules(network, observers)
        yield
    finally:
        set_modules(network, [(path, layers[path]) for path in observed])


def _keep_input(
    kept: Kept,
    path: str,
    groups: int,
    add_rows: Callable[[str, mx.array], None] | None,
    placed: Callable[[str], npt.NDArray[np.int64]] | None,
    x: mx.array,
) -> None:
    """Keep the sums over sequences of x [..., channels], whose rows come in sequences of `groups`, or as they are placed."""
    channels = x.shape[-1]
    if placed is None:
        sequences = x.size // (groups * channels) if groups else 0
        kept[path].append(_sums(x.reshape(sequences, groups, channels)))
    else:
        sequences = x.size // channels
        kept[path].append(_sums_by(x.reshape(-1, channels), placed(path), groups))
    if add_rows is not None and sequences:
        add_rows(path, x.reshape(-1, channels))


def _add_rows(hessians: HessianAccumulator, domain: str, path: str, rows: mx.array) -> None:
    hessians.add(path, domain, np.array(rows.astype(mx.float32)))


def _keep_heads(kept: Kept, path: str, x: mx.array) -> None:
    """Keep the sums over batch and rows of x [batch, heads, rows, channels]."""
    heads, channels = x.shape[1], x.shape[-1]
    kept[path].append(_sums(x.swapaxes(1, 2).reshape(-1, heads, channels)))


def _sums_by(rows: mx.array, places: npt.NDArray[np.int64], groups: int) -> Sums:
    """Sums over rows [n, channels] by the group of each."""
    parts = [_sums(rows[mx.array(np.flatnonzero(places == group))][:, None]) for group in range(groups)]
    return Sums(
        np.concatenate([part.count for part in parts]),
        mx.concatenate([part.sum_squares for part in parts]),
        mx.concatenate([part.absolute_maximum for part in parts]),
    )


def _sums(rows: mx.array) -> Sums:
    """Sums over the first axis of rows [n, groups, channels]."""
    count, groups, channels = rows.shape
    if not rows.size:
        return Sums(np.zeros(groups, np.int64), mx.zeros((groups, channels)), mx.zeros((groups, channels)))
    wide = rows.astype(mx.float32)
    found = Sums(np.full(groups, count, np.int64), mx.square(wide).sum(axis=0), mx.abs(wide).max(axis=0))
    # Sent for now, so that the activations behind them are freed as soon as the device has been there; to wait for each would
    # leave a GPU without work a hundred times a window.
    mx.async_eval(found.sum_squares, found.absolute_maximum)  # type: ignore[no-untyped-call]
    return found


def _moments(kept: Mapping[str, Sequence[Sums]]) -> dict[str, Moments]:
    """What was kept of each path, as the moments of a single domain."""
    return {path: _added(path, each) for path, each in kept.items()}


def _added(path: str, calls: Sequence[Sums]) -> Moments:
    moments = Moments(
        count=np.sum([call.count for call in calls], axis=0)[None],
        sum_squares=np.sum([np.array(call.sum_squares).astype(np.float64) for call in calls], axis=0)[None],
        absolute_maximum=np.max([np.array(call.absolute_maximum) for call in calls], axis=0)[None],
    )
    if not np.isfinite(moments.sum_squares).all():
        raise StatisticsError(f"activations at {path!r} are not finite; the model overflows or its weights are damaged")
    return moments
