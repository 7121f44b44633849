"""Scoring: what a network thinks of given bytes, in windows that fit its context."""

import math
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.engine.continuation import way_of
from marlin_cli.engine.finite import not_finite
from marlin_cli.models import Network, continuing_of

# Bytes scored in one forward pass; bounds the memory of activations. Kernels that keep no logits take more.
BYTES_PER_PASS = 16384
BYTES_PER_FUSED_PASS = 65536


def windows_of(total_bytes: int, window_bytes: int) -> Iterator[tuple[int, int]]:
    """Disjoint windows (start, end) over `total_bytes`; each is scored from an empty context."""
    for start in range(0, total_bytes, window_bytes):
        yield start, min(start + window_bytes, total_bytes)


def predictions(network: Network, windows: mx.array) -> mx.array:
    """Logits [n, length, vocab] float32 of windows of bytes [n, length]: row i predicts byte i from those before it."""
    fused = way_of(network).fuse(network)
    return continuing_of(network).predictions(network, windows) if fused is None else fused.predictions(windows)


def log2_probabilities(network: Network, windows: mx.array) -> mx.array:
    """Base-2 logarithms of the probabilities of every id at every byte of windows [n, length].

    Returns:
        [n, length, vocab] float32; row i is the prediction of byte i from those before it.
    """
    logits = predictions(network, windows)
    return (logits - mx.logsumexp(logits, axis=-1, keepdims=True)) / math.log(2)


def log2_predictions(network: Network, windows: npt.NDArray[np.uint8]) -> mx.array:
    """`log2_probabilities` of bytes [n, length] as they come from a corpus."""
    return log2_probabilities(network, mx.array(windows.astype(np.int32)))


def costs(network: Network, windows: mx.array) -> mx.array:
    """Bits that each byte of windows [n, length] costs: [n, length] float32. Kernels keep no distribution of it."""
    fused = way_of(network).fuse(network)
    if fused is not None and windows.size:
        return fused.costs(windows) / math.log(2)
    logits = predictions(network, windows)
    return (mx.logsumexp(logits, axis=-1) - of_bytes(network, logits, windows)) / math.log(2)


def of_bytes(network: Network, rows: mx.array, windows: mx.array) -> mx.array:
    """Of rows [n, length, vocab] the columns of the bytes of windows [n, length]: [n, length]."""
    columns = windows.astype(mx.int32) + continuing_of(network).first_byte
    return mx.take_along_axis(rows, columns[..., None], axis=-1)[..., 0]


def bits_of(network: Network, data: npt.NDArray[np.uint8], window_bytes: int) -> npt.NDArray[np.float64]:
    """Bits that each byte of `data` [total] costs, in disjoint windows: [total].

    Every byte value counts, 0x00 too. Windows of equal length share a pass.

    Raises:
        CheckpointError: predictions that are not finite.
    """
    bits = np.empty(len(data), dtype=np.float64)
    full = len(data) // window_bytes
    fused = way_of(network).fuse(network)
    per_pass = max(1, (BYTES_PER_PASS if fused is None else BYTES_PER_FUSED_PASS) // window_bytes)
    for first in range(0, full, per_pass):
        last = min(first + per_pass, full)
        part = data[first * window_bytes : last * window_bytes].reshape(last - first, window_bytes)
        bits[first * window_bytes : last * window_bytes] = _bits(network, part).reshape(-1)
    if full * window_bytes < len(data):
        bits[full * window_bytes :] = _bits(network, data[None, full * window_bytes :])[0]
    return bits


def _bits(network: Network, windows: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    bits = np.array(costs(network, mx.array(windows.astype(np.int32)))).astype(np.float64)
    if not np.isfinite(bits).all():
        raise not_finite()
    return bits
