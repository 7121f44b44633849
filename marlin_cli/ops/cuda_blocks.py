"""What the paper's MegaByte has in place of layers that the whole-stage kernels know: none, or one for each slice of a row."""

import mlx.core as mx

from marlin_cli.ops.cuda_arrays import LinearArrays, dense_arrays


def identity(width: int, dtype: mx.Dtype) -> LinearArrays:
    """A layer that changes nothing."""
    return dense_arrays(mx.eye(width, dtype=dtype), None)


def block_diagonal(layer: LinearArrays, count: int) -> LinearArrays:
    """A layer that takes each of `count` slices of a row by itself: its rows below each other, zeros beside them."""
    parts = mx.split(layer.weight, layer.group, axis=1) if layer.kind == "dense" else [layer.weight]
    weight = mx.concatenate([_blocks(part, count) for part in parts], axis=1)
    scales, zeros = (None if array is None else _blocks(array, count) for array in (layer.scales, layer.zeros))
    bias = None if layer.bias is None else mx.tile(layer.bias, count)
    return LinearArrays(weight, layer.kind, scales, zeros, bias, layer.factor, layer.group)


def _blocks(array: mx.array, count: int) -> mx.array:
    rows, columns = array.shape
    made = mx.zeros((count, rows, count, columns), dtype=array.dtype)
    for i in range(count):
        made[i, :, i] = array
    return made.reshape(count * rows, count * columns)
