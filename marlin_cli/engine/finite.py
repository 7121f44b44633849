"""Numbers that no network should give, as an error."""

from marlin_cli.errors import CheckpointError


def not_finite(name: str = "the model", what: str = "its predictions") -> CheckpointError:
    """The error of a network whose numbers are none."""
    return CheckpointError(f"{name}: {what} are not finite; its weights are damaged or overflow")
