"""A network with its channels rescaled as `awq` chooses, and the statistics of the rescaled inputs."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from marlin_cli.models import Network
from marlin_cli.models.byt5 import ByT5
from marlin_cli.quantization.encoders import squared_error
from marlin_cli.quantization.methods.awq import awq_factors, fold, legal_folds
from marlin_cli.quantization.methods.gptq import output_error
from marlin_cli.quantization.methods.mse import mse
from marlin_cli.quantization.plan import LayerPlan
from marlin_cli.statistics import Statistics

Factors = dict[str, npt.NDArray[np.float32]]
AnyNetwork = TypeVar("AnyNetwork", bound=Network)


def rescaled(
    network: AnyNetwork,
    plans: Sequence[LayerPlan],
    statistics: Statistics,
    domain_weights: Mapping[str, float] | None = None,
) -> tuple[AnyNetwork, Factors]:
    """A copy that computes the same, and by path of a layer the factors that its columns were multiplied by.

    Only channels whose consumers are all packed are touched. The error is that of the outputs by x^T x where it was
    measured, else by the mean square of each channel.
    """
    parameters = dict(tree_flatten(network.parameters()))
    packed = {plan.path: plan for plan in plans if plan.format is not None}
    factors: Factors = {}
    for found in legal_folds(parameters, gated=is_gated(network)):
        if not all(path in packed for path in found.consumers):
            continue
        members = [packed[path] for path in found.consumers]
        mean_square = statistics.mean_square(found.consumers[0], domain_weights)
        hessian = statistics.hessian(found.consumers[0], domain_weights)

        def error_of(
            index: int,
            weight: mx.array,
            scale: npt.NDArray[np.float32],
            members: list[LayerPlan] = members,
            mean_square: npt.NDArray[np.float32] = mean_square,
            hessian: npt.NDArray[np.float64] | None = hessian,
        ) -> float:
            format = members[index].format
            assert format is not None
            seen = mx.array(mean_square / scale**2)
            candidate = mse(weight, format, members[index].group_size, seen)
            if hessian is None:
                return squared_error(weight, candidate, seen)
            return output_error(np.array(weight), candidate, hessian / np.outer(scale, scale))

        weights = [parameters[f"{path}.weight"] for path in found.consumers]
        chosen = awq_factors(weights, mean_square, error_of, found.repeats)
        if (chosen != 1).any():
            fold(parameters, found, chosen)
            factors.update(dict.fromkeys(found.consumers, np.tile(chosen, found.repeats)))
    copy = type(network)(network.config)  # type: ignore[arg-type]  # its own configuration
    copy.load_weights(list(parameters.items()))
    copy.eval()
    return copy, factors


def is_gated(network: Network) -> bool:
    """Do the feed-forwards multiply two layers' outputs?"""
    return network.config.gated_ffn if isinstance(network, ByT5) else network.config.ffn == "swiglu"
