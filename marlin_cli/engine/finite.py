"""Numbers that no network should give, as an error."""

import numpy as np
import numpy.typing as npt

from marlin_cli.errors import CheckpointError


def finite(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Scores as they are.

    Raises:
        CheckpointError: they are not finite.
    """
    if not np.isfinite(scores).all():
        raise not_finite()
    return scores


def not_finite(name: str = "the model", what: str = "its predictions") -> CheckpointError:
    """The error of a network whose numbers are none."""
    return CheckpointError(f"{name}: {what} are not finite; its weights are damaged or overflow")
