"""Error feedback (GPTQ, arXiv 2210.17323) under fixed scales, then coordinate descent over codes.

Scales are chosen first, from the original weights, so columns can be taken in any order while groups stay where they
are: the file's layout does not change and nothing is permuted at run time. What is minimised is the squared error of
the layer's output over the calibration rows, trace((Q - W) H (Q - W)^T) with H the mean of x^T x.
"""

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from marlin_cli.quantization.encoders import Packed, decode
from marlin_cli.quantization.formats import Format
from marlin_cli.quantization.grids import Floats, Grid, grid_of
from marlin_cli.quantization.methods.mse import mse

DAMPING = 0.01  # of the mean diagonal, added to it; ten times more after each failure
DAMPING_TRIES = 4
BLOCK_COLUMNS = 64  # rounded one by one in numpy; everything between blocks is a matrix product
INVERSE_COLUMNS = 128  # triangles up to this size are inverted as general matrices
DESCENT_SWEEPS = 3
RESCALE_SWEEPS = 1
SCALE_STEPS = (-2, -1, 0, 1, 2)  # neighbours of a group's scale that are tried


def gptq(
    weight: mx.array,
    format: Format,
    group_size: int,
    importance: mx.array | None = None,
    hessian: npt.NDArray[np.float64] | None = None,
) -> Packed:
    """Pack `weight` [rows, columns] with the least output error found; never more than `mse` leaves.

    Args:
        hessian: mean of x^T x [columns, columns]; without it this is `mse`.
    """
    plain = mse(weight, format, group_size, importance)
    if hessian is None:
        return plain
    original = np.array(weight.astype(mx.float32))
    grid = grid_of(plain)
    best, least = plain, output_error(original, plain, hessian)
    factor = inverse_factor(hessian)
    if factor is not None:
        square = hessian.astype(np.float32)
        levels = _descend(original, grid, _feed_back(original, grid, *factor), square)
        for _ in range(RESCALE_SWEEPS):
            grid, levels = _rescale(original, grid, levels, square)
            levels = _descend(original, grid, levels, square)
        candidate = grid.pack(levels)
        error = output_error(original, candidate, hessian)
        if error < least:
            best = candidate
    return best


def output_error(weight: Floats, packed: Packed, hessian: npt.NDArray[np.float64]) -> float:
    """trace((Q - W) H (Q - W)^T): the mean squared error of the layer's output, summed over its rows."""
    error = np.array(decode(packed)) - weight
    return float(np.einsum("ij,ij->", error @ hessian.astype(np.float32), error, dtype=np.float64))


def inverse_factor(hessian: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.intp], Floats] | None:
    """An order of columns, the most used first, and the upper Cholesky factor of the damped inverse in that order.

    None where no damping makes H positive definite.
    """
    order = np.argsort(-np.diag(hessian), kind="stable")
    ordered = hessian[np.ix_(order, order)].copy()
    mean = float(np.mean(np.diag(ordered)))
    if not mean > 0:
        return None
    diagonal = np.einsum("ii->i", ordered)
    diagonal[diagonal == 0] = mean  # channels that are always 0 are rounded to nearest
    damping = DAMPING
    before = diagonal.copy()
    for _ in range(DAMPING_TRIES):
        diagonal[:] = before + damping * mean
        try:
            # chol(inv(H)) upper = inverse of the factor of H with rows and columns reversed.
            lower = np.linalg.cholesky(ordered[::-1, ::-1])
            _invert_lower(lower)
            if np.isfinite(lower).all():
                return order, np.ascontiguousarray(lower[::-1, ::-1], dtype=np.float32)
        except np.linalg.LinAlgError:
            pass
        damping *= 10
    return None


def _invert_lower(lower: npt.NDArray[np.floating]) -> None:
    """Replace a lower triangle by its inverse, halves first: all but the smallest are matrix products."""
    size = len(lower)
    if size <= INVERSE_COLUMNS:
        lower[:] = np.tril(np.linalg.inv(lower))
        return
    half = size // 2
    first, last, below = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    _invert_lower(first)
    _invert_lower(last)
    below[:] = -(last @ below) @ first


def _feed_back(weight: Floats, grid: Grid, order: npt.NDArray[np.intp], factor: Floats) -> Floats:
    """Levels [rows, columns], columns rounded one by one, each error spread over the columns not yet rounded."""
    scales, biases = grid.expanded()
    # Transposed: a column is then contiguous.
    rest = np.ascontiguousarray(weight[:, order].T)
    scale = np.ascontiguousarray(scales[:, order].T)
    bias = biases if isinstance(biases, float) else np.ascontiguousarray(biases[:, order].T)
    levels = np.empty_like(rest)
    for start in range(0, len(rest), BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, len(rest))
        # The rows of columns that are done hold their errors.
        rest[start:end] -= factor[:start, start:end].T @ rest[:start]
        for i in range(start, end):
            offset = bias if isinstance(bias, float) else bias[i]
            levels[i] = grid.round_levels((rest[i] - offset) / scale[i])
            rest[i] = (rest[i] - (levels[i] * scale[i] + offset)) / factor[i, i]
            rest[i + 1 : end] -= factor[i, i + 1 : end, None] * rest[i]
    result = np.empty_like(weight)
    result[:, order] = levels.T
    return result


def _descend(weight: Floats, grid: Grid, levels: Floats, hessian: Floats) -> Floats:
    """Round each column again to what is best given all the others, a few times over; the error never grows."""
    scales, biases = grid.expanded()
    scale = np.ascontiguousarray(scales.T)
    bias = biases if isinstance(biases, float) else np.ascontiguousarray(biases.T)
    levels = np.ascontiguousarray(levels.T)
    columns = np.ascontiguousarray(weight.T)
    error = levels * scale + bias - columns
    for _ in range(DESCENT_SWEEPS):
        for start in range(0, len(levels), BLOCK_COLUMNS):
            end = min(start + BLOCK_COLUMNS, len(levels))
            gradient = hessian[start:end] @ error
            for i in range(start, end):
                if hessian[i, i] <= 0:
                    continue
                offset = bias if isinstance(bias, float) else bias[i]
                wanted = error[i] - gradient[i - start] / hessian[i, i] + columns[i]
                rounded = grid.round_levels((wanted - offset) / scale[i])
                change = (rounded - levels[i]) * scale[i]
                if change.any():
                    levels[i] = rounded
                    error[i] += change
                    # Those before are rounded again in the next sweep only, from a new gradient.
                    gradient[i + 1 - start :] += hessian[i + 1 : end, i, None] * change
    return np.ascontiguousarray(levels.T)


def _rescale(weight: Floats, grid: Grid, levels: Floats, hessian: Floats) -> tuple[Grid, Floats]:
    """Give each group in turn the scale, and the levels under it, that are best given all others; the error never grows."""
    size = grid.packed.group_size
    expanded, offsets = grid.expanded()
    scales, biases = grid.scales.T.copy(), None if grid.biases is None else grid.biases.T.copy()
    steps = grid.scale_steps()
    levels = np.ascontiguousarray(levels.T)
    error = np.ascontiguousarray((levels.T * expanded + offsets - weight).T)
    for group in range(len(scales)):
        columns = slice(group * size, (group + 1) * size)
        within = hessian[columns, columns]
        if not np.diag(within).any():
            continue
        gradient = hessian[columns] @ error
        if steps is None:
            assert biases is not None
            change = _fitted_line(levels[columns], gradient, within, grid, scales, biases, group)
        else:
            change = _other_steps(levels, columns, gradient, within, grid, scales, group, steps)
        error[columns] += change
    return grid.with_scales(scales.T, None if biases is None else biases.T), np.ascontiguousarray(levels.T)


def _other_steps(
    levels: Floats, columns: slice, gradient: Floats, within: Floats, grid: Grid, scales: Floats, group: int, steps: Floats
) -> Floats:
    """Move to the best of nearby scales, with the levels as they are or rounded anew: the change of values [size, rows]."""
    old, before = levels[columns].copy(), scales[group].copy()
    damped = within + DAMPING * np.diag(within).mean() * np.eye(len(within), dtype=np.float32)
    wanted = old * before - np.linalg.solve(damped, gradient)
    curvature = np.einsum("ij,ij->j", old, within @ old)
    fitted = before - np.einsum("ij,ij->j", old, gradient) / np.maximum(curvature, 1e-30)
    at = np.searchsorted(steps, before * (1 - 1e-6))
    best, least = np.zeros_like(gradient), np.zeros_like(before)
    nearest = np.searchsorted((steps[1:] + steps[:-1]) / 2, fitted)
    candidates = [(steps[nearest], old)]
    for step in SCALE_STEPS:
        scale = steps[np.clip(at + step, 0, len(steps) - 1)]
        candidates.append((scale, grid.round_levels(wanted / scale)))
    for scale, found in candidates:
        change = found * scale - old * before
        gain = np.einsum("ij,ij->j", change, 2 * gradient + within @ change)
        better = gain < least
        least = np.where(better, gain, least)
        best = np.where(better, change, best)
        scales[group] = np.where(better, scale, scales[group])
        levels[columns] = np.where(better, found, levels[columns])
    return best


def _fitted_line(
    levels: Floats, gradient: Floats, within: Floats, grid: Grid, scales: Floats, biases: Floats, group: int
) -> Floats:
    """Move scale and bias to the least error for the levels as they are: the change of values [size, rows]."""
    spread = within @ levels
    a, b = np.einsum("ij,ij->j", levels, spread), spread.sum(axis=0)
    c = np.float32(within.sum())
    toward, along = np.einsum("ij,ij->j", levels, gradient), gradient.sum(axis=0)
    determinant = a * c - b * b
    usable = determinant > 1e-6 * a * c
    safe = np.where(usable, determinant, 1)
    stored = grid.packed.scales.dtype
    scale, bias = (
        np.array(mx.array(value).astype(stored).astype(mx.float32))
        for value in (scales[group] - (c * toward - b * along) / safe, biases[group] - (a * along - b * toward) / safe)
    )
    change = (scale - scales[group]) * levels + (bias - biases[group])
    gain = np.einsum("ij,ij->j", change, 2 * gradient + within @ change)
    better = usable & (gain < 0) & (scale != 0)
    scales[group] = np.where(better, scale, scales[group])
    biases[group] = np.where(better, bias, biases[group])
    return np.where(better, change, np.float32(0))
