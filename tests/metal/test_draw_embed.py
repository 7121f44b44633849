"""draw_embed on the emulator: the ids that plain MLX draws, their rows, and what stood before."""

import itertools
import math

import few_rows_cases as cases
import mlx.core as mx
import pytest
from kernel_cases import DTYPES

from marlin_cli.engine.sampling import Noise, Sampling, filter_numbers, sample
from marlin_cli.ops import few_rows, metal_few_rows
from marlin_cli.ops.few_rows import Drawing

pytestmark = pytest.mark.metal

FILTERS = [
    {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    for top_k, top_p, min_p in itertools.product((0, 7), (1.0, 0.6), (0.0, 0.1))
]


def drawing_of(sampling, vocab, steps):
    def choose(logits, noise):
        return sample(logits, sampling, noise)

    if not sampling.temperature:
        return Drawing(choose, None, None)
    return Drawing(choose, mx.array(filter_numbers(sampling)), Noise(sampling.seed, vocab).take(steps))


def both(emulated, logits, sampling, *, dtype=mx.float32, width=40, steps=4, step=1, positions=True, **how):
    """What the kernel gives, checked against plain MLX."""
    streams, vocab = logits.shape
    table = mx.random.normal((vocab, width), key=mx.random.key(1)).astype(dtype)
    places = mx.random.normal((steps, width), key=mx.random.key(2)).astype(dtype) if positions else None
    before = mx.random.randint(0, vocab, (streams, steps), key=mx.random.key(3)).astype(mx.int32)
    arguments = logits, drawing_of(sampling, vocab, steps), step, before, table, places
    assert metal_few_rows.takes_draw_embed(*arguments)
    ids, rows = emulated(lambda: metal_few_rows.draw_embed(*arguments), **how).result
    expected_ids, expected_rows = few_rows.draw_embed(*arguments)
    assert mx.array_equal(ids, expected_ids), (ids, expected_ids)
    if step + 1 < steps:
        assert mx.array_equal(rows, expected_rows)
    return ids


def logits_of(streams, vocab, seed=0):
    return 2 * mx.random.normal((streams, vocab), key=mx.random.key(seed))


@pytest.mark.parametrize("sanitized", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["orders", "sanitized"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_result(emulated, request, dtype, temperature, sanitized):
    if dtype != mx.bfloat16:
        request.applymarker(pytest.mark.slow)
    for shape in ((3, 256, 40), (1, 2, 3), (2, 259, 300), (1, 1024, 8)):
        streams, vocab, width = shape
        both(emulated, logits_of(streams, vocab), Sampling(temperature), dtype=dtype, width=width, sanitized=sanitized)
    both(emulated, logits_of(2, 256), Sampling(temperature), dtype=dtype, steps=1, step=0, positions=False, sanitized=sanitized)


@pytest.mark.parametrize("filters", FILTERS, ids=map(str, FILTERS))
def test_filters(emulated, filters):
    drawn = set()
    for seed in range(3):
        ids = both(emulated, logits_of(8, 256, seed), Sampling(1.5, seed=seed, **filters), step=seed)
        drawn |= set(ids[:, seed].tolist())
    assert len(drawn) > 3


def test_of_equal_logits_the_first_is_taken(emulated):
    logits = mx.zeros((2, 256))
    logits[1, 17] = logits[1, 200] = 1.0
    assert both(emulated, logits, Sampling(), step=0)[:, 0].tolist() == [0, 17]


def test_equal_logits_stay_together(emulated):
    """Of three that share the second place top_k 2 keeps all, as sorting does."""
    logits = mx.full((8, 256), -50.0)
    logits[:, 3], logits[:, 9:12] = 2.0, 1.0
    for sampling in (Sampling(3.0, top_k=2), Sampling(3.0, top_p=0.7)):
        assert set(both(emulated, logits, sampling, step=0)[:, 0].tolist()) <= {3, 9, 10, 11}


def test_no_numbers_draw_the_first_id(emulated):
    table, before = mx.zeros((256, 8)), mx.zeros((1, 8), dtype=mx.int32)
    for sampling in (Sampling(), Sampling(1.0)):
        arguments = mx.full((1, 256), math.nan), drawing_of(sampling, 256, 8), 2, before, table, None
        assert emulated(lambda given=arguments: metal_few_rows.draw_embed(*given)).result[0][0, 2] == 0


def test_what_is_left_to_mlx():
    def takes(vocab, dtype=mx.float32, table=mx.float32):
        logits, ids = mx.zeros((1, vocab), dtype=dtype), mx.zeros((1, 8), dtype=mx.int32)
        return metal_few_rows.takes_draw_embed(
            logits, drawing_of(Sampling(), vocab, 8), 0, ids, mx.zeros((vocab, 8), table), None
        )

    assert takes(256) and not takes(1025) and not takes(256, dtype=mx.float16) and not takes(256, table=mx.int32)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(6))
def test_barriers(emulated, number):
    sampling = Sampling(3.0, top_k=200, top_p=0.3)
    cases.check_barrier(lambda **how: both(emulated, logits_of(8, 300), sampling, **how), number)
