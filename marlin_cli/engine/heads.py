"""`heads=auto`: the number of heads that a foreign checkpoint does not tell, by what sample bytes cost under each."""

import dataclasses
import math
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.checkpoints import ImportOptions, possible_heads
from marlin_cli.corpus import open_corpus
from marlin_cli.engine.scoring import bits_of
from marlin_cli.errors import AssumptionWarning, CheckpointError
from marlin_cli.models import build
from marlin_cli.models.megabyte import MegaByte

# The bytes of a trial: of the shipped calibration sample, in windows of so many.
SAMPLE = "default"
SAMPLE_BYTES, WINDOW_BYTES = 8 << 10, 512

# The next best must cost so many bits a byte more, and so many standard errors of the difference between windows.
LEAST_BITS, LEAST_ERRORS = 0.01, 4.0

# What a byte costs where nothing is known of it. A model to which the sample is no cheaper can not be judged by it.
BLIND_BITS = 8.0


def with_heads(path: Path, options: ImportOptions, sample: npt.NDArray[np.uint8] | None = None) -> ImportOptions:
    """`options` with a number in place of heads=auto, as they come where nothing is automatic.

    Args:
        sample: bytes [total] such as the model was trained on; the shipped calibration sample if None.

    Raises:
        CheckpointError: a damaged checkpoint, or bytes that do not tell the number.
        ConfigError: a configuration that cannot be understood.
    """
    if options.heads != "auto":
        return options
    candidates = list(possible_heads(path, options))
    if not candidates:
        return options  # `read_checkpoint` refuses the option where the model says all, and shapes that do not fit
    if len(candidates) == 1:
        return dataclasses.replace(options, heads=candidates[0][0])
    by_heads: dict[int, npt.NDArray[np.float64]] = {}
    for heads, checkpoint in candidates:
        network: Any = build(checkpoint.config, checkpoint.weights, where=str(path), dtype=mx.float32)
        window = _window_bytes(network)
        if sample is None:
            sample = _shipped_sample(window)
        whole = sample[: len(sample) // window * window]
        by_heads[heads] = bits_of(network, whole, window).reshape(-1, window).mean(axis=1)
    best, said = _best(by_heads, path)
    warnings.warn(f"{path}: took heads={best}: {said}", AssumptionWarning, stacklevel=2)
    return dataclasses.replace(options, heads=best, heads_by_trial=True)


def _best(by_heads: dict[int, npt.NDArray[np.float64]], path: Path) -> tuple[int, str]:
    """The number under which the windows [n] cost fewest bits, and by how much."""
    best, second, *_ = sorted(by_heads, key=lambda heads: float(by_heads[heads].mean()))
    bits = float(by_heads[best].mean())
    more = by_heads[second] - by_heads[best]
    error = float(more.std(ddof=1)) / math.sqrt(len(more)) if len(more) > 1 else math.inf
    said = f"sample bytes cost {bits:.3f} bits each, and {more.mean():.3f} more with the next best, {second}"
    if not bits < BLIND_BITS:
        raise CheckpointError(
            f"{path}: heads=auto cannot tell: {said}; a model of other bytes, or none: give the number of heads"
        )
    if not more.mean() > max(LEAST_BITS, LEAST_ERRORS * error):
        raise CheckpointError(f"{path}: heads=auto cannot tell: {said}, within noise; give the number of heads")
    return best, said


def _window_bytes(network: MegaByte) -> int:
    patch = network.config.patch_size
    return max(min(WINDOW_BYTES, network.config.max_bytes) // patch, 1) * patch


def _shipped_sample(window: int) -> npt.NDArray[np.uint8]:
    corpus = open_corpus((SAMPLE,), sequence_bytes=window, seed=0, max_bytes=SAMPLE_BYTES)
    return np.concatenate([each.bytes for each in corpus if len(each.bytes) == window])
