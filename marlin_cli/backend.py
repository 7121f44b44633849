"""Is MLX there, with a backend? The one place that turns its absence into advice."""

import sys

from marlin_cli.errors import BackendError


def require_mlx() -> None:
    """Import MLX.

    Raises:
        BackendError: MLX is missing, or is installed without a backend; the message names the extra to install.
    """
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        extra = "marlin-cli" if sys.platform == "darwin" else "marlin-cli[cpu] (or marlin-cli[cuda] for NVIDIA GPUs)"
        problem = " ".join(str(error).split())
        raise BackendError(f"MLX has no usable backend here ({problem}); run: pip install {extra}") from None
