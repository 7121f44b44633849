"""Channels that stand out from their group brought in line, by a rule without a search: what `gptq` does first.

A group has one scale. Where a channel's inputs are many times larger than those beside it and its weights as much
smaller, the scale is of the others, its weights round to 0, and no method that keeps to the scale's grid helps. Such a
channel is scaled up in the layer and down in what feeds it, as `awq` does; `awq` searches factors for every channel,
this touches none that does not stand out by both, so that an ordinary network is packed as without it.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.quantization.methods.awq import channel_size, column_square

# Times its group's median by which a channel's inputs are larger, and its weights smaller, to stand out. In the trained
# demo models no channel's weights are more than 1.6 times smaller, though inputs are up to 20 times larger.
STANDS_OUT = 4.0

# More would take a gain out of the range of 16-bit types.
LARGEST_FACTOR = 1024.0


def outlier_factors(
    weights: Sequence[mx.array], mean_square: npt.NDArray[np.float32], group_size: int, repeats: int = 1
) -> npt.NDArray[np.float32]:
    """The factor of each input channel [channels] of layers that see one input: 1, or a power of two where it stands out.

    Args:
        weights: [rows, channels * repeats] of each layer; read only where inputs stand out.
        mean_square: of each of their columns.
        group_size: columns that share a scale.
        repeats: see `awq.Fold`.
    """
    inputs = channel_size(mean_square, repeats)
    larger = inputs / _median_of_group(inputs, group_size)
    factors = np.ones_like(inputs)
    if not (larger > STANDS_OUT).any():
        return factors
    columns = channel_size(column_square(weights), repeats)
    smaller = _median_of_group(columns, group_size) / columns
    out = (larger > STANDS_OUT) & (smaller > STANDS_OUT)
    # Both say how far the channel is out; what it is scaled by lies between them.
    factors[out] = np.exp2(np.rint(np.log2(np.sqrt(larger[out] * smaller[out]))))
    return np.minimum(factors, np.float32(LARGEST_FACTOR))


def _median_of_group(sizes: npt.NDArray[np.float32], group_size: int) -> npt.NDArray[np.float32]:
    """The median of each channel's group [channels]; of all where groups do not divide them."""
    groups = sizes.reshape(-1, group_size if len(sizes) % group_size == 0 else len(sizes))
    medians: npt.NDArray[np.float32] = np.repeat(np.median(groups, axis=1), groups.shape[1])
    return medians
