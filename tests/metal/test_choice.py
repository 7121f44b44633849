"""What the Metal kernels take, and that a machine without Metal may ask."""

import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import pytest

from marlin_cli.ops import Linear, QuantizedLinear, metal, metal_few_rows, reference
from marlin_cli.ops.few_rows import Norm, Place, Projections, Reading, Tail

FLOATS = mx.zeros((1, 2, 1, 64))


def packed(rows, head_dim=64, bits=4):
    return reference.pack_rows(mx.zeros((1, 2, rows, head_dim)), bits)


def test_import_makes_no_kernel():
    script = (
        "import mlx.core as mx; mx.fast.metal_kernel = None\n"
        "import marlin_cli.ops.metal as m; print(m.kernel.cache_info().currsize)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "0\n"


@pytest.mark.parametrize(
    ("head_dim", "total", "options", "taken"),
    [
        (64, 8, {}, True),  # a patch
        (64, 1000, {}, False),  # MLX's own
        (72, 1000, {}, True),  # which it has no kernel for
        (64, 1000, {"window": 9}, True),  # it would need a mask
        (64, 1000, {"lengths": mx.array([9])}, True),
        (12, 8, {}, False),  # not whole pieces
        (264, 8, {}, False),
    ],
)
def test_attention(head_dim, total, options, taken):
    queries, keys = mx.zeros((1, 2, 1, head_dim)), mx.zeros((1, 2, total, head_dim))
    assert metal.takes_attention(queries, keys, keys, 1.0, **options) is taken


def test_attention_of_many_rows_is_left_to_mlx():
    many = mx.zeros((1, 2, 500, 64))
    assert not metal.takes_attention(many, many, many, 1.0, window=9)


def test_paged_attention():
    def takes(keys, values, queries=FLOATS):
        return metal.takes_paged_attention(queries, keys, values, 1.0)

    dense = mx.zeros((1, 2, 4, 64))
    assert takes([packed(4), packed(2)], [dense, dense[:, :, :2]])
    assert not takes([], [])
    assert not takes([packed(4), dense], [dense, dense])  # keys of two kinds
    assert not takes([packed(4, bits=8), packed(4)], [dense, dense])
    assert not takes([dense[:, :, :0]], [dense[:, :, :0]])
    assert not takes([dense.astype(mx.int32)], [dense])
    many = mx.zeros((1, 2, 40, 64))
    assert takes([packed(4)], [dense], many)
    assert not takes([dense], [dense], many)
    assert not takes([packed(4, 256)], [packed(4, 256)], mx.zeros((1, 2, 40, 256)))


def test_embedding_and_pooling():
    assert not metal.takes_patch_embed(mx.zeros((0, 8), dtype=mx.uint8), mx.zeros((256, 4)))
    assert not metal.takes_patch_embed(mx.zeros((1, 8), dtype=mx.uint8), mx.zeros((256, 4), dtype=mx.int32))
    assert metal.takes_strided_pool(mx.zeros((1, 3, 4)), 2, "mean")
    assert not metal.takes_strided_pool(mx.zeros((1, 0, 4)), 2, "mean")


def layers(rows, columns, *, dtype=mx.float32, count=1):
    made = [Linear(columns, rows, bias=False) for _ in range(count)]
    for layer in made:
        layer.weight = layer.weight.astype(dtype)
    return made


def packed_layer(rows=8, columns=64, group_size=64):
    packed = mx.quantize(mx.zeros((rows, columns)), group_size=group_size, bits=4)
    arrays = dict(zip(("weight", "scales", "biases"), packed, strict=True))
    return QuantizedLinear(arrays, group_size=group_size, bits=4, mode="affine")


def test_products_of_few_rows():
    def takes(x, layer):
        return metal_few_rows.takes_linear_added(x, layer, mx.zeros((x.shape[0], 8), dtype=x.dtype))

    x, [dense] = mx.zeros((8, 64)), layers(8, 64)
    assert takes(x, dense) and takes(x, packed_layer())
    assert not takes(mx.zeros((9, 64)), dense)  # for MLX's matrix units
    assert not takes(mx.zeros((0, 64)), dense)
    assert not takes(x.astype(mx.bfloat16), dense)  # rows of another type
    assert not takes(x.astype(mx.bfloat16), packed_layer())  # scales of another type
    assert not takes(mx.zeros((1, 60)), *layers(8, 60))  # not whole pieces
    assert not takes(x, nn.Linear(64, 8))  # of no kind that is known
    rounded = packed_layer()
    rounded.activation_bits = 8
    assert not takes(x, rounded)


def test_projections_of_few_rows():
    def takes(three, head_norms=None, norm=None):
        parts = Projections(*three, 1, 1, 8, head_norms, None, False)
        tail = Tail(mx.zeros((1, 1, 4, 8)), mx.zeros((1, 1, 4, 8)))
        norm = norm or Norm("rmsnorm", nn.RMSNorm(64))
        return metal_few_rows.takes_projections(mx.zeros((1, 64)), norm, parts, tail, Place(mx.array([0, 0]), None))

    three = layers(8, 64, count=3)
    assert takes(three)
    assert not takes(three, head_norms=(nn.RMSNorm(8), nn.RMSNorm(8)))
    assert not takes([*three[:2], packed_layer()])  # of two formats
    assert not takes([packed_layer(), packed_layer(), packed_layer(group_size=32)])
    assert not takes([*three[:2], Linear(64, 8)])  # one with a bias
    assert not takes(three, norm=Norm("layernorm", nn.LayerNorm(64)))  # a norm with one
    assert takes(three, norm=Norm("layernorm", nn.LayerNorm(64, bias=False)))


def test_attention_of_few_rows():
    def takes(heads, head_dim):
        tail = Tail(*[mx.zeros((1, heads, 4, head_dim))] * 2)
        reading = Reading(1.0, None, None, *layers(8, heads * head_dim))
        queries = mx.zeros((1, heads, 1, head_dim))
        place = Place(mx.array([0, 0]), None)
        return metal_few_rows.takes_attention_out(queries, None, tail, place, reading, mx.zeros((1, 8)))

    assert takes(2, 64) and takes(96, 64)
    assert not takes(97, 64) and not takes(1, 264) and not takes(2, 12)
