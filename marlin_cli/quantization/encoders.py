"""Encoders for every format, in MLX's exact packing, with scales chosen by the squared error they leave.

MLX's own encoders take the scale from a group's largest weight. These try a few scales around it and keep the one
with the least error, weighted by the mean square of each input channel when that is known: the error that the
layer's output sees. nvfp4 also gets a power of two for the whole tensor, since its E4M3 scales cannot reach
below 2^-9 (weights of standard deviation 0.02 lose precision there, and of 0.001 vanish).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from marlin_cli.errors import QuantizationError
from marlin_cli.quantization.formats import Format

# Weights encoded at once: some twenty float32 arrays of this size are alive, about 80 MB.
CHUNK_WEIGHTS = 1 << 20

E2M1_LARGEST, E4M3_LARGEST = 6.0, 448.0

# Codes of E4M3 tried for an nvfp4 scale, around the one that maps the group's largest weight to 6. The upper ones
# map it to 4, below which the grid is finer.
NVFP4_STEPS = range(-3, 6)

# The largest nvfp4 scale before the steps above: room for them below 448.
NVFP4_LARGEST_SCALE = 256.0

# Shares of a group's range tried for int4 and int8: a narrower one clips the extremes and is finer inside.
AFFINE_SHARES = {4: (1.0, 0.95, 0.9, 0.85, 0.8), 8: (1.0,)}


@dataclass(frozen=True)
class Packed:
    """A packed weight [rows, columns].

    Attributes:
        weight: [rows, columns * bits / 32] uint32, the first weight in the lowest bits.
        scales: [rows, columns / group_size], uint8 codes or floats.
        biases: as scales, for int4 and int8.
        global_scale: multiplies the decoded weights (nvfp4); a power of two, unless another tool packed them.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array | None
    global_scale: float | None
    format: Format
    group_size: int

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        arrays = self.weight.nbytes + self.scales.nbytes + (0 if self.biases is None else self.biases.nbytes)
        return arrays + (0 if self.global_scale is None else 4)


def encode(weight: mx.array, format: Format, group_size: int | None = None, importance: mx.array | None = None) -> Packed:
    """Pack `weight` [rows, columns] with the scales that leave the least squared error.

    Args:
        importance: [columns] weight of each input channel in the error, as its mean square; all equal if None.

    Raises:
        QuantizationError: columns that the group does not divide, or weights that are NaN or infinite.
    """
    rows, columns = weight.shape
    group_size = group_size or format.group_size_for(columns)
    if group_size is None or columns % group_size:
        raise QuantizationError(f"{columns} columns are not divisible into groups of {format.name}")
    largest = scalar(mx.abs(weight).max())
    if not math.isfinite(largest):
        raise QuantizationError("holds NaN or infinite weights")
    lift = nvfp4_lift(largest) if format.mode == "nvfp4" else 0
    channel_weights = _channel_weights(importance, columns).reshape(-1, group_size)
    encoder = ENCODERS[format.mode]
    parts: list[tuple[mx.array, ...]] = []
    rows_per_chunk = max(1, CHUNK_WEIGHTS // columns)
    for start in range(0, rows, rows_per_chunk):
        groups = weight[start : start + rows_per_chunk].reshape(-1, columns // group_size, group_size)
        codes, *others = encoder(groups, channel_weights, format.bits, lift)
        encoded = (pack_codes(codes.reshape(-1, columns), format.bits), *others)
        mx.eval(encoded)
        parts.append(encoded)
    arrays = [mx.concatenate(list(pieces)) if len(parts) > 1 else pieces[0] for pieces in zip(*parts, strict=True)]
    packed, scales = arrays[0], arrays[1].reshape(rows, -1)
    return Packed(
        weight=packed,
        scales=scales,
        biases=arrays[2].reshape(rows, -1) if len(arrays) > 2 else None,
        global_scale=math.ldexp(1.0, -lift) if format.mode == "nvfp4" else None,
        format=format,
        group_size=group_size,
    )


def decode(packed: Packed, dtype: mx.Dtype = mx.float32) -> mx.array:
    """The weights [rows, columns] that a packed weight stands for."""
    if packed.scales.size % 2:  # MLX 0.32.4 cannot unpack an odd number of groups: give it a row more
        more = dataclasses.replace(
            packed,
            weight=_with_last_row_twice(packed.weight),
            scales=_with_last_row_twice(packed.scales),
            biases=None if packed.biases is None else _with_last_row_twice(packed.biases),
        )
        return decode(more, dtype)[:-1]
    # MLX computes in the type of float scales; in 16 bits that would add an error of its own.
    scales = packed.scales if packed.biases is None else packed.scales.astype(mx.float32)
    weight = mx.dequantize(
        packed.weight,
        scales,
        None if packed.biases is None else packed.biases.astype(mx.float32),
        group_size=packed.group_size,
        bits=packed.format.bits,
        mode=packed.format.mode,
        dtype=mx.float32,
    ).astype(mx.float32)
    if packed.global_scale is not None:
        weight = weight * packed.global_scale
    return weight.astype(dtype)


def mlx_encode(weight: mx.array, format: Format, group_size: int) -> Packed:
    """What `mx.quantize` makes of it: the baseline."""
    parts: list[list[mx.array]] = []
    for rows in _row_chunks(weight):
        part = weight[rows]
        # MLX 0.32.4 cannot pack an odd number of groups either.
        arrays = mx.quantize(_with_last_row_twice(part), group_size=group_size, bits=format.bits, mode=format.mode)
        parts.append([array[: part.shape[0]] for array in arrays])
        if len(part) < len(weight):
            mx.eval(parts[-1])  # on a CPU it is made of operations, whose results would all be there at once
    packed, scales, *biases = (
        mx.concatenate(list(pieces)) if len(parts) > 1 else pieces[0] for pieces in zip(*parts, strict=True)
    )
    return Packed(packed, scales, biases[0] if biases else None, None, format, group_size)


def _with_last_row_twice(array: mx.array) -> mx.array:
    return mx.concatenate([array, array[-1:]]) if array.shape[0] % 2 else array


def squared_error(weight: mx.array, packed: Packed, importance: mx.array | None = None) -> float:
    """Sum over all weights of the squared error, each channel weighted by `importance` [columns]."""
    total = 0.0
    for rows in _row_chunks(weight):
        part = dataclasses.replace(
            packed,
            weight=packed.weight[rows],
            scales=packed.scales[rows],
            biases=None if packed.biases is None else packed.biases[rows],
        )
        error = mx.square(weight[rows].astype(mx.float32) - decode(part))
        total += scalar((error if importance is None else error * importance).sum())
    return total


def squared_sum(weight: mx.array) -> float:
    """Sum over all weights of their squares."""
    return sum(scalar(mx.square(weight[rows].astype(mx.float32)).sum()) for rows in _row_chunks(weight))


def _row_chunks(weight: mx.array) -> Iterator[slice]:
    """Slices of the rows of a matrix that are a few megabytes in float32."""
    rows = max(1, CHUNK_WEIGHTS // weight.shape[1])
    return (slice(start, start + rows) for start in range(0, weight.shape[0], rows))


def scalar(array: mx.array) -> float:
    """The one real number in an array."""
    return float(np.array(array.astype(mx.float32)))


def relative_error(weight: mx.array, packed: Packed) -> float:
    """RMS error over RMS weight."""
    total = squared_sum(weight)
    return math.sqrt(squared_error(weight, packed) / total) if total else 0.0


def pack_codes(codes: mx.array, bits: int) -> mx.array:
    """Codes [rows, columns] as uint32 [rows, columns * bits / 32], the first in the lowest bits."""
    per_word = 32 // bits
    words = codes.astype(mx.uint32).reshape(codes.shape[0], -1, per_word)
    return (words << (mx.arange(per_word, dtype=mx.uint32) * bits)).sum(axis=-1).astype(mx.uint32)


def nvfp4_lift(largest: float) -> int:
    """The power of two that brings the scale of a tensor's largest weight into (128, 256]."""
    return 0 if largest == 0 else math.floor(math.log2(NVFP4_LARGEST_SCALE * E2M1_LARGEST / largest))


def round_e2m1(magnitude: mx.array) -> mx.array:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 (ties to the even code) of non-negative numbers."""
    fine = mx.round(magnitude * 2) * 0.5
    coarse = mx.minimum(mx.round(magnitude * 0.5) * 2, E2M1_LARGEST)
    return mx.where(magnitude < 2, fine, mx.where(magnitude < 4, mx.round(magnitude), coarse))


def e2m1_codes(values: mx.array, rounded: mx.array) -> mx.array:
    """Codes of numbers whose magnitudes were rounded to E2M1: the sign in bit 3."""
    index = mx.where(rounded < 2, rounded * 2, mx.where(rounded < 4, rounded + 2, rounded * 0.5 + 4))
    return index.astype(mx.uint8) + mx.where(values < 0, 8, 0).astype(mx.uint8)


def _channel_weights(importance: mx.array | None, columns: int) -> mx.array:
    """Importance with mean 1, and never 0, so that unseen channels still get sensible scales."""
    if importance is None:
        return mx.ones((columns,))
    importance = importance.astype(mx.float32)
    mean = importance.mean()
    return mx.where(mean > 0, importance / mx.maximum(mean, 1e-38), 1.0) + 1e-4


def _best(
    groups: mx.array, channel_weights: mx.array, candidates: list[mx.array], rounded: Callable[[mx.array], mx.array]
) -> tuple[mx.array, mx.array]:
    """For each group the candidate scale code's index with the least weighted error, and that error.

    Args:
        groups: [rows, n, group] float32 magnitudes.
        candidates: scales [rows, n, 1], each tried on every group.
    """
    best_error: mx.array | None = None
    best = mx.zeros((*groups.shape[:2], 1), dtype=mx.int32)
    for index, scale in enumerate(candidates):
        error = mx.square(groups - rounded(groups / scale) * scale) * channel_weights
        total = error.sum(axis=-1, keepdims=True)
        if best_error is None:
            best_error = total
        else:
            better = total < best_error
            best = mx.where(better, index, best)
            best_error = mx.where(better, total, best_error)
        mx.eval(best, best_error)
    assert best_error is not None
    return best, best_error


def _encode_nvfp4(groups: mx.array, channel_weights: mx.array, bits: int, lift: int) -> tuple[mx.array, ...]:
    # In two steps: the power of two alone may lie beyond float32.
    values = groups.astype(mx.float32) * math.ldexp(1.0, lift // 2) * math.ldexp(1.0, lift - lift // 2)
    magnitude = mx.abs(values)
    largest = magnitude.max(axis=-1, keepdims=True)
    middle = mx.to_fp8(largest / E2M1_LARGEST).astype(mx.int32)
    codes = [mx.clip(middle + step, 1, 126) for step in NVFP4_STEPS]
    scales = [mx.from_fp8(code.astype(mx.uint8), mx.float32) for code in codes]
    best, _ = _best(magnitude, channel_weights, scales, round_e2m1)
    code = mx.clip(middle + NVFP4_STEPS.start + best, 1, 126).astype(mx.uint8)
    rounded = round_e2m1(magnitude / mx.from_fp8(code, mx.float32))
    return e2m1_codes(values, rounded), code[..., 0]


def _encode_microscaling(groups: mx.array, channel_weights: mx.array, bits: int, lift: int) -> tuple[mx.array, ...]:
    values = groups.astype(mx.float32)
    magnitude = mx.abs(values)
    largest = magnitude.max(axis=-1, keepdims=True)
    top, rounded = (E2M1_LARGEST, round_e2m1) if bits == 4 else (E4M3_LARGEST, _round_e4m3)
    exact = mx.log2(mx.maximum(largest, 2.0**-126) / top)
    # Powers of two below and above: the lower one clips the largest weight, and is finer for the others.
    lower = mx.clip(mx.floor(exact), -126, 126)
    exponents = [mx.ceil(mx.clip(exact, -126, 126)), lower]
    best, _ = _best(magnitude, channel_weights, [mx.power(2.0, exponent) for exponent in exponents], rounded)
    exponent = mx.where(best == 0, exponents[0], exponents[1])
    scaled = values / mx.power(2.0, exponent)
    codes = e2m1_codes(values, round_e2m1(mx.abs(scaled))) if bits == 4 else mx.to_fp8(scaled)
    return codes, (exponent[..., 0] + 127).astype(mx.uint8)


def _round_e4m3(magnitude: mx.array) -> mx.array:
    return mx.from_fp8(mx.to_fp8(magnitude), mx.float32)


def _encode_affine(groups: mx.array, channel_weights: mx.array, bits: int, lift: int) -> tuple[mx.array, ...]:
    """w ~ scale * q + bias: MLX's own choice, then narrower ranges, each refitted by weighted least squares."""
    stored = groups.dtype
    values = groups.astype(mx.float32)
    steps = (1 << bits) - 1
    low, high = values.min(axis=-1, keepdims=True), values.max(axis=-1, keepdims=True)
    rows, count, size = groups.shape
    _, mlx_scales, mlx_biases = mx.quantize(groups.reshape(rows, -1), group_size=size, bits=bits)
    scale, bias = mlx_scales.reshape(rows, count, 1), mlx_biases.reshape(rows, count, 1)
    error = _affine_error(values, channel_weights, scale, bias, steps)
    for share in AFFINE_SHARES[bits]:
        middle, half = (low + high) / 2, (high - low) / 2 * share
        tried_scale, tried_bias = 2 * half / steps, middle - half
        for _ in range(2):
            tried_scale, tried_bias = _refit(values, channel_weights, tried_scale, tried_bias, steps)
            tried_scale, tried_bias = tried_scale.astype(stored), tried_bias.astype(stored)
            tried_error = _affine_error(values, channel_weights, tried_scale, tried_bias, steps)
            better = tried_error < error
            scale, bias = mx.where(better, tried_scale, scale), mx.where(better, tried_bias, bias)
            error = mx.where(better, tried_error, error)
            mx.eval(scale, bias, error)
    codes = _affine_codes(values, scale, bias, steps)
    return codes.astype(mx.uint8), scale[..., 0], bias[..., 0]


def _affine_codes(values: mx.array, scale: mx.array, bias: mx.array, steps: int) -> mx.array:
    scale, bias = scale.astype(mx.float32), bias.astype(mx.float32)
    safe = mx.where(scale == 0, 1.0, scale)
    return mx.clip(mx.round((values - bias) / safe), 0, steps)


def _affine_error(values: mx.array, weights: mx.array, scale: mx.array, bias: mx.array, steps: int) -> mx.array:
    codes = _affine_codes(values, scale, bias, steps)
    decoded = codes * scale.astype(mx.float32) + bias.astype(mx.float32)
    return (mx.square(values - decoded) * weights).sum(axis=-1, keepdims=True)


def _refit(values: mx.array, weights: mx.array, scale: mx.array, bias: mx.array, steps: int) -> tuple[mx.array, mx.array]:
    """The scale and bias of least weighted squared error for the codes that the given ones lead to."""
    codes = _affine_codes(values, scale, bias, steps)
    total = weights.sum(axis=-1, keepdims=True)
    mean_code = (codes * weights).sum(axis=-1, keepdims=True) / total
    mean_value = (values * weights).sum(axis=-1, keepdims=True) / total
    spread = (mx.square(codes - mean_code) * weights).sum(axis=-1, keepdims=True)
    joint = ((codes - mean_code) * (values - mean_value) * weights).sum(axis=-1, keepdims=True)
    slope = mx.where(spread > 0, joint / mx.where(spread > 0, spread, 1.0), scale.astype(mx.float32))
    return slope, mean_value - slope * mean_code


ENCODERS: dict[str, Callable[[mx.array, mx.array, int, int], tuple[mx.array, ...]]] = {
    "nvfp4": _encode_nvfp4,
    "mxfp4": _encode_microscaling,
    "mxfp8": _encode_microscaling,
    "affine": _encode_affine,
}
