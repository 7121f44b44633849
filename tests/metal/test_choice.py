"""What the Metal kernels take, and that a machine without Metal may ask."""

import subprocess
import sys

import mlx.core as mx
import pytest

from marlin_cli.ops import metal, reference

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
