"""A network with its channels rescaled, as `awq` chooses or where they stand out, and by what they were."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from marlin_cli.models import Network, architecture_of, with_weights
from marlin_cli.quantization.encoders import squared_error
from marlin_cli.quantization.methods.awq import Fold, awq_factors, fold, legal_folds
from marlin_cli.quantization.methods.gptq import output_error
from marlin_cli.quantization.methods.mse import mse
from marlin_cli.quantization.methods.outliers import outlier_factors
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
    """A copy that computes the same, and by path of a layer the factors that `awq` multiplied its columns by.

    Only channels whose consumers are all packed are touched. The error is that of the outputs by x^T x where it was
    measured, else by the mean square of each channel.
    """

    def chosen(found: Fold, members: Sequence[LayerPlan], weights: Sequence[mx.array]) -> npt.NDArray[np.float32]:
        mean_square = statistics.mean_square(found.consumers[0], domain_weights)
        hessian = statistics.hessian(found.consumers[0], domain_weights)

        def error_of(index: int, weight: mx.array, scale: npt.NDArray[np.float32]) -> float:
            format = members[index].format
            assert format is not None
            seen = mx.array(mean_square / scale**2)
            candidate = mse(weight, format, members[index].group_size, seen)
            if hessian is None:
                return squared_error(weight, candidate, seen)
            return output_error(np.array(weight), candidate, hessian / np.outer(scale, scale))

        return awq_factors(weights, mean_square, error_of, found.repeats)

    return _folded(network, plans, chosen)


def without_outliers(
    network: AnyNetwork, plans: Sequence[LayerPlan], mean_square: Callable[[str], npt.NDArray[np.float32]]
) -> tuple[AnyNetwork, Factors]:
    """As `rescaled`, with only the channels that stand out brought in line: see `methods.outliers`.

    Args:
        mean_square: path of a layer -> that of each column of its input.
    """

    def chosen(found: Fold, members: Sequence[LayerPlan], weights: Sequence[mx.array]) -> npt.NDArray[np.float32]:
        group_size = max(member.group_size for member in members)
        return outlier_factors(weights, mean_square(found.consumers[0]), group_size, found.repeats)

    return _folded(network, plans, chosen)


def _folded(
    network: AnyNetwork,
    plans: Sequence[LayerPlan],
    choose: Callable[[Fold, Sequence[LayerPlan], Sequence[mx.array]], npt.NDArray[np.float32]],
) -> tuple[AnyNetwork, Factors]:
    """The network with every legal fold by the factors [channels] that are chosen for it; itself where all are 1.

    Args:
        choose: (fold, plans and weights of its consumers) -> its factors.
    """
    parameters = dict(tree_flatten(network.parameters()))
    packed = {plan.path: plan for plan in plans if plan.format is not None}
    factors: Factors = {}
    architecture = architecture_of(network)
    for found in legal_folds(parameters, gated=is_gated(network), norms_lead=architecture.norms_lead):
        if not all(path in packed for path in found.consumers):
            continue
        weights = [parameters[f"{path}.weight"] for path in found.consumers]
        chosen = choose(found, [packed[path] for path in found.consumers], weights)
        if (chosen != 1).any():
            fold(parameters, found, chosen)
            factors.update(dict.fromkeys(found.consumers, np.tile(chosen, found.repeats)))
    if not factors:
        return network, {}
    return with_weights(network, parameters), factors


def is_gated(network: Network) -> bool:
    """Do the feed-forwards multiply two layers' outputs?"""
    return architecture_of(network).is_gated(network.config)
