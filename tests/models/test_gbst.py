"""GBST: charformer-pytorch's order written out slowly, texts alone and with filler, and the configuration's bounds."""

import math

import mlx.core as mx
import numpy as np
import pytest
from decoder_cases import GBST, random_gbst

from marlin_cli.errors import ConfigError
from marlin_cli.models.gbst import GbstConfig


def softmax(x):
    grown = np.exp(x - x.max(axis=-1, keepdims=True))
    return grown / grown.sum(axis=-1, keepdims=True)


def slow_front(front, x, real):
    """One text [rows, d_model], byte by byte; `real` counts those under the mask, None without one."""
    kernel, bias = np.array(front.kernel), np.array(front.kernel_bias)
    rows, width = len(x), len(kernel)
    ahead = np.concatenate([x, np.zeros((width - 1, x.shape[1]))])
    y = np.stack([(ahead[at : at + width] * kernel).sum(0) for at in range(rows)]) + bias
    y = y @ np.array(front.proj.weight).T + np.array(front.proj.bias)
    total = math.ceil(rows / front.multiple) * front.multiple
    y = np.concatenate([y, np.zeros((total - rows, y.shape[1]))])
    blocks = np.zeros((total, len(front.block_kinds), y.shape[1]))
    seen = np.zeros((total, len(front.block_kinds)), dtype=bool)
    for kind, (size, offset) in enumerate(front.block_kinds):
        for at in range(total):
            first = (at + (size - offset if offset else 0)) // size * size - (size - offset if offset else 0)
            members = [place for place in range(first, first + size) if 0 <= place < (total if real is None else real)]
            if members:
                blocks[at, kind] = y[members].sum(0) / (size if real is None else len(members))
                seen[at, kind] = True
            elif real is None:
                seen[at, kind] = True
    scores = blocks @ np.array(front.score.weight)[0] + np.array(front.score.bias)[0]
    choices = softmax(np.where(seen, scores, -1e38))
    if front.consensus:
        alike = choices @ choices.T
        if real is not None:
            alike[:, real:] = -1e38
        choices = softmax(alike) @ choices
    mixed = (blocks * choices[..., None]).sum(1)
    if real is not None:
        mixed[real:] = 0
    found = []
    for start in range(0, rows, front.factor):
        part = mixed[start : start + front.factor]
        count = front.factor if real is None else max(1, min(real, start + front.factor) - start)
        found.append(part.sum(0) / count)
    return np.stack(found)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{}, {"bytes_in_row": 1}, {"consensus": False}, {"block_sizes": (4, 2, 3), "block_offsets": (1, 0, 2), "bytes_in_row": 4}],
)
def test_the_front_end_byte_by_byte(changes, masked):
    front = random_gbst(**changes).front
    rng = np.random.default_rng(0)
    for rows in (1, 3, 12, 17):
        x = rng.standard_normal((1, rows, 32)).astype(np.float32)
        found = np.array(front(mx.array(x), mx.array([rows]) if masked else None))[0]
        assert np.abs(found - slow_front(front, x[0], rows if masked else None)).max() < 1e-4


@pytest.mark.parametrize("bytes_in_row", [1, 3, 4])
def test_a_text_is_what_it_is_alone(bytes_in_row):
    network = random_gbst(bytes_in_row=bytes_in_row)
    rng = np.random.default_rng(1)
    ids = mx.array(rng.integers(3, 259, (3, 20)))
    target = mx.array(rng.integers(3, 259, (3, 5)))
    lengths = (20, 7, 1)
    padded = mx.where(mx.arange(20) < mx.array(lengths)[:, None], ids, 0)
    together = network(padded, target, mx.array(lengths))
    for row, length in enumerate(lengths):
        alone = network(ids[row : row + 1, :length], target[row : row + 1])
        assert mx.allclose(alone[0], together[row], atol=1e-4)
    reading = random_gbst(bytes_in_row=bytes_in_row, reads_filler=True)
    assert not mx.allclose(reading(padded, target, mx.array(lengths))[1], together[1], atol=1e-3)


def test_a_row_of_more_bytes_than_all_blocks_hold_evenly():
    """Where the reference crashes: 5 bytes a row and blocks that fill a text up to 8."""
    network = random_gbst(block_sizes=(1, 2, 8), bytes_in_row=5)
    assert network.encode(mx.array([[5] * 7])).shape == (1, 2, 32)
    assert mx.isfinite(network.encode(mx.array([[5] * 8]))).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"downsample_factor": 2}, "bytes_in_row says"),
        ({"block_sizes": ()}, "block_sizes must be"),
        ({"block_sizes": (0, 4)}, "block_sizes must be"),
        ({"block_sizes": (251, 241, 239)}, "common multiple"),
        ({"block_offsets": (0,)}, "as many as block_sizes"),
        ({"block_offsets": (1, 0, 0, 0)}, "less than its block's size"),
        ({"bytes_in_row": 5}, "bytes_in_row must be"),
        ({"bytes_in_row": 0}, "bytes_in_row must be"),
        ({"d_model": 0}, "d_model must be"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        GbstConfig(**GBST | changes)
