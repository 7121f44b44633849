"""Decoded copies of packed weights: made once, kept while their weight lives and there is room. No GPU is needed."""

import mlx.core as mx
import pytest

from marlin_cli.errors import UsageError
from marlin_cli.ops.cuda_decoded import Copies, share


def copy_of(copies, weight, made, dtype=mx.bfloat16):
    def make():
        made.append(1)
        return weight.astype(dtype)

    return copies.of(weight, dtype, weight.size * dtype.size, make)


def test_a_weight_is_decoded_once():
    copies, weight, made = Copies(1 << 20, 1 << 60), mx.arange(8), []
    first = copy_of(copies, weight, made)
    assert copy_of(copies, weight, made) is first and made == [1]
    assert first.tolist() == list(range(8)) and copies.bytes == 16
    assert copy_of(copies, weight, made, mx.float16).dtype == mx.float16 and copies.bytes == 32


def test_a_copy_goes_with_its_weight():
    copies, weight = Copies(1 << 20, 1 << 60), mx.arange(8)
    copy_of(copies, weight, [])
    del weight
    assert copies.bytes == 0
    assert copy_of(copies, mx.zeros((4,)), []).tolist() == [0] * 4


def test_without_room_nothing_is_decoded():
    made = []
    copies, weights = Copies(16, 1 << 60), [mx.arange(8), mx.arange(8)]
    assert copy_of(copies, weights[0], made) is not None
    assert copy_of(copies, weights[1], made) is None and made == [1]
    assert copy_of(Copies(1 << 20, 0), weights[1], made) is None and made == [1]


def test_a_copy_is_no_part_of_a_graph_that_is_traced():
    copies, weight, made = Copies(1 << 20, 1 << 60), mx.ones((4, 4)), []
    run = mx.compile(lambda x: x @ copy_of(copies, weight, made, mx.float32))
    assert run(mx.ones((1, 4))).tolist() == run(mx.ones((1, 4))).tolist() == [[4.0] * 4]
    assert copy_of(copies, weight, made, mx.float32).sum().item() == 16 and made == [1]


def test_the_share_of_memory(monkeypatch):
    monkeypatch.delenv("MARLIN_DECODED", raising=False)
    assert share() == 0.25
    monkeypatch.setenv("MARLIN_DECODED", "0")
    assert share() == 0
    for wrong in ("-0.1", "1.5", "much", "nan"):
        monkeypatch.setenv("MARLIN_DECODED", wrong)
        with pytest.raises(UsageError, match="MARLIN_DECODED must be a share"):
            share()
