"""Keys without outlying channels: q_proj and k_proj scaled against each other, so that 4-bit keys lose less.

A few channels of a key can be many times larger than the others. The rotation of a packed cache spreads them over all
channels, which then all have the error of the large ones; made small beforehand, by what calibration saw, they leave
none. Channels that are not much larger stay as they are: the rotation alone does better there. What is looked up stays
the same to the last bit: factors are powers of two, and two channels that the positions rotate together have one. The
cache and its kernels know nothing of it.
"""

from typing import TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from marlin_cli.errors import QuantizationError, StatisticsError
from marlin_cli.models import Network, architecture_of, with_weights
from marlin_cli.statistics import Statistics

AnyNetwork = TypeVar("AnyNetwork", bound=Network)

# Channels this many times the usual one or more are made like it.
LEAST_OUTLIER = 4.0

# A factor is at most 2 to this power, beyond which float16 weights would run out of exponents.
MOST_EXPONENT = 8


def with_balanced_keys(network: AnyNetwork, statistics: Statistics) -> AnyNetwork:
    """A copy that computes the same, whose keys have no outlying channels where a packed cache holds them.

    Raises:
        QuantizationError: keys that other things than queries read, which scaling would change.
        StatisticsError: the statistics hold no keys of a layer, or keys of another shape.
    """
    parameters = dict(tree_flatten(network.parameters()))
    keys_of = architecture_of(network).packed_keys(network.config)
    if not keys_of.queries_alone:
        title = architecture_of(network).title
        raise QuantizationError(f"--balance-keys: not queries alone read the keys of an {title}; leave it out")
    shape = keys_of.heads, keys_of.head_dim
    for path in keys_of.paths:
        if path not in statistics.totals.keys:
            raise StatisticsError(f"the statistics hold no keys of {path!r}; they belong to another model")
        largest = statistics.totals.keys[path].absolute_maximum.max(axis=0, initial=0.0)
        if largest.shape != shape:
            raise StatisticsError(
                f"the statistics have keys of {largest.shape[0]} heads of {largest.shape[1]} channels in {path!r}, the"
                f" model {shape[0]} of {shape[1]}; they belong to another model"
            )
        # Gains of norms come last where there are any, and all heads share them.
        normed = f"{path}.k_norm.weight" in parameters
        factors = balancing_factors(largest, rotated=keys_of.rotated, interleaved=keys_of.interleaved, shared=normed)
        queries, keys = (f"{path}.{name}_{'norm' if normed else 'proj'}.weight" for name in "qk")
        if normed:
            for_queries = for_keys = factors[0]
        else:
            readers = parameters[queries].shape[0] // parameters[keys].shape[0]  # query heads of a key head
            for_queries, for_keys = np.repeat(factors, readers, axis=0).reshape(-1), factors.reshape(-1)
        parameters[queries] = _scaled(parameters[queries], for_queries)
        parameters[keys] = _scaled(parameters[keys], np.reciprocal(for_keys))
    return with_weights(network, parameters)


def balancing_factors(
    largest: npt.NDArray[np.float32], *, rotated: bool = False, interleaved: bool = False, shared: bool = False
) -> npt.NDArray[np.float32]:
    """The power of two [heads, head_dim] by which each channel of a key is divided; 1 unless it is an outlier of its head.

    Args:
        largest: absolute value of each channel [heads, head_dim].
        rotated: do positions rotate channels, in pairs of the two halves of a head (interleaved: of neighbours)?
        shared: do all heads have the same factors?
    """
    heads, width = largest.shape
    sizes = largest.max(axis=0, keepdims=True) if shared else largest
    if rotated:
        axis = 2 if interleaved else 1
        pairs = sizes.reshape((len(sizes), width // 2, 2) if interleaved else (len(sizes), 2, width // 2))
        sizes = np.broadcast_to(pairs.max(axis=axis, keepdims=True), pairs.shape).reshape(len(sizes), width)
    exponents = np.full(sizes.shape, np.nan)
    np.log2(sizes, out=exponents, where=sizes > 0)
    usual = np.array([np.median(row[np.isfinite(row)]) if np.isfinite(row).any() else 0.0 for row in exponents])
    above = np.nan_to_num(exponents - usual[:, None])  # a channel that was never anything but 0 is no outlier
    steps = np.where(above >= np.log2(LEAST_OUTLIER), np.minimum(np.rint(above), MOST_EXPONENT), 0.0)
    return np.broadcast_to(np.exp2(steps).astype(np.float32), (heads, width))


def _scaled(array: mx.array, factors: npt.NDArray[np.float32]) -> mx.array:
    factor = mx.array(factors[:, None] if array.ndim == 2 else factors)
    return (array.astype(mx.float32) * factor).astype(array.dtype)
