"""A model that computes the same as another, whose channels are scaled by up to 100 between producer and consumer.

Trained networks grow such channels: a few inputs of a layer are many times larger than the others, and the weights that read
them as much smaller. A 4-bit group then has one scale for weights that lie a hundred times apart.
"""

from typing import TypeVar

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from marlin_cli.models import Network
from marlin_cli.quantization.methods.awq import fold, legal_folds
from marlin_cli.quantization.scaled import is_gated

AnyNetwork = TypeVar("AnyNetwork", bound=Network)

LARGEST_FACTOR = 100.0
# The power that a uniform number is raised to before it is an exponent: one channel in ten is more than ten times larger.
RARITY = 6


def with_outliers(network: AnyNetwork, seed: int = 1) -> AnyNetwork:
    """The same function in float32, with every channel that passes from one linear part to the next scaled by 1 to 100.

    Norms to the layers that read them, values to the attention's output, `up_proj` to `down_proj` where they are gated,
    embeddings to the patch projection. Outside the layers each factor is exact to float32's rounding.
    """
    generator = np.random.default_rng(seed)
    parameters = {path: array.astype(mx.float32) for path, array in tree_flatten(network.parameters())}
    for found in legal_folds(parameters, gated=is_gated(network)):
        channels = parameters[f"{found.consumers[0]}.weight"].shape[1] // found.repeats
        # Of the weights, which become smaller, as the inputs grow.
        fold(parameters, found, (LARGEST_FACTOR ** -(generator.random(channels) ** RARITY)).astype(np.float32))
    other = type(network)(network.config)
    other.load_weights(list(parameters.items()))
    other.eval()
    return other
