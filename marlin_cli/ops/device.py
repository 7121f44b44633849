"""The device that operations run on, and why it was chosen."""

import os
from dataclasses import dataclass

import mlx.core as mx

from marlin_cli.errors import BackendError, UsageError
from marlin_cli.ops.mlx_caches import use_private_caches


@dataclass(frozen=True)
class Device:
    """A device and the reason it was chosen; `name` is metal, cuda or cpu."""

    name: str
    reason: str

    @property
    def dtype(self) -> mx.Dtype | None:
        """The type of weights and activations: float32 on a CPU (16-bit is slower there), as stored elsewhere."""
        return mx.float32 if self.name == "cpu" else None


def choose_device(wanted: str = "auto") -> Device:
    """Make `wanted` (auto, metal, cuda, cpu) MLX's default device.

    Raises:
        UsageError: a name that is none of these; or MARLIN_CACHE is needed and no absolute path.
        BackendError: the installed MLX has no such device.
    """
    available = {"metal": mx.metal.is_available(), "cuda": mx.cuda.is_available(), "cpu": True}
    if wanted == "auto":
        name = next(name for name, here in available.items() if here)
        absent = [other for other, here in available.items() if not here]
        reason = f"auto: no {' and no '.join(absent)} here" if name == "cpu" else f"auto: {name} is available"
    elif wanted not in available:
        raise UsageError(f"--device {wanted!r} is not one of auto, {', '.join(available)}")
    elif not available[wanted]:
        extra = "a Mac with Apple silicon" if wanted == "metal" else "an NVIDIA GPU and `pip install marlin-cli[cuda]`"
        raise BackendError(f"--device {wanted}: not available; it needs {extra}")
    else:
        name, reason = wanted, "asked for"
    use_private_caches(name)
    if name == "cuda":
        os.environ.setdefault("MLX_ENABLE_TF32", "0")  # float32 is asked for where its digits count: statistics, packing
    mx.set_default_device(mx.cpu if name == "cpu" else mx.gpu)
    return Device(name, reason)
