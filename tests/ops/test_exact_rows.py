"""Where rows have to be exact: the same bits whichever rows are beside them, in products, attention and whole models."""

import mlx.core as mx
import numpy as np
import pytest
from byt5_cases import random_byt5

from marlin_cli.engine.answer_requests import Answer, AnswerLimits
from marlin_cli.engine.answering import answer
from marlin_cli.engine.decoding import CacheBits, Lockstep
from marlin_cli.engine.generation import generate
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.stopping import Stopping
from marlin_cli.models.megabyte import MegaByteConfig
from marlin_cli.ops import cpu
from marlin_cli.ops.dispatch import attention, linear, paged_attention
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.encoders import encode
from marlin_cli.quantization.formats import FORMATS
from marlin_cli.quantization.plan import QuantizationSettings

MODULE = cpu.kernels()[0]
pytestmark = pytest.mark.skipif(MODULE is None, reason=f"no CPU kernels here: {cpu.kernels()[1]}")
ROWS = (1, 2, 3, 4, 5, 8, 9, 16, 33)
EACH_FORMAT = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS.keys())


@pytest.fixture(autouse=True)
def exact_rows():
    MODULE.set_exact_rows(True)
    yield
    MODULE.set_exact_rows(cpu.rows_are_exact())
    MODULE.set_threads(cpu.thread_count())


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def extreme_rows(depth):
    """Rows of ordinary size, with some that no fixed point holds, outliers, zeros and what is not finite among them."""
    x = random(max(ROWS), depth)
    x[5] *= 1e30
    x[7] *= 1e-30
    x[9] = 0
    x[11, 3] = 1e4
    x[13, depth // 2 :] *= 1e-20
    x[21, 1] = np.inf
    x[29, depth - 1] = np.nan
    return x


def assert_rows_alike(product, x):
    """Each row of `product` is the same bits in all batches, wherever it stands and on however many threads."""
    expected = [np.array(product(mx.array(x[m : m + 1]))).tobytes() for m in range(len(x))]
    for threads in (1, 2):
        MODULE.set_threads(threads)
        for count in ROWS:
            for start in {0, 4, len(x) - count}:
                found = np.array(product(mx.array(x[start : start + count])))
                assert [row.tobytes() for row in found] == expected[start : start + count], (threads, count, start)


@pytest.mark.parametrize("activation_bits", [16, 8])
@pytest.mark.parametrize("depth", [128, 256, 1472, 3584])
@EACH_FORMAT
def test_a_row_of_a_packed_product_is_the_same_bits_in_every_batch(format, depth, activation_bits):
    packed = encode(mx.array(random(45, depth, seed=1)), format)
    floats = packed.biases is not None
    scales = packed.scales.astype(mx.float32) if floats else packed.scales
    biases = packed.biases.astype(mx.float32) if floats else None
    kind = getattr(MODULE.Kind, format.name)
    assert_rows_alike(
        lambda x: MODULE.marlin_gemm(x, packed.weight, scales, biases, kind, packed.group_size, activation_bits),
        extreme_rows(depth),
    )


@pytest.mark.parametrize("depth", [20, 128, 1472])
def test_a_row_of_a_dense_product_is_the_same_bits_in_every_batch(depth):
    weight = mx.array(random(61, depth, seed=1))
    assert_rows_alike(lambda x: linear(x, weight), extreme_rows(depth))


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("padding", [0, 28])
def test_attention_of_a_sequence_is_the_same_bits_behind_padding_and_in_parts(window, padding):
    """Pages, blocks of queries and the ends of windows fall elsewhere; tiles of keys do not."""
    heads, length, width = 2, 300, 32
    queries, keys, values = (random(1, heads, length, width, seed=seed) for seed in range(3))
    whole = np.array(attention(*map(mx.array, (queries, keys, values)), 0.2, window=window))

    def behind(rows, seed):
        return np.concatenate([random(1, heads, padding, width, seed=seed), rows], axis=2)

    pages = [
        [mx.array(behind(rows, 5)[:, :, start : start + 128]) for start in range(0, length + padding, 128)]
        for rows in (keys, values)
    ]
    for first in (0, 1, 200, 299):
        found = paged_attention(mx.array(queries[:, :, first:]), *pages, 0.2, window=window, left_padding=mx.array([padding]))
        assert np.array_equal(np.array(found), whole[:, :, first:])


PROMPTS = [bytes(range(40, 40 + length)) for length in (1, 7, 8, 9, 40, 41, 17, 33, 3, 25, 16, 31, 2, 64, 5, 70)]
EACH_WEIGHT = pytest.mark.parametrize("name", [None, *FORMATS])


def packed(network, name):
    if name is None:
        return network
    parts = ("global", "local", "encoder", "decoder", "cross", "wo")
    settings = QuantizationSettings(**{f"{part}_format": name for part in parts})
    return quantize_network(network, settings).network


@pytest.mark.parametrize("streams", [2, 5, 16])
@EACH_WEIGHT
def test_a_stream_has_the_same_logits_and_bytes_alone_as_in_a_batch(random_network, small_sizes, name, streams):
    """Prompts of unlike lengths, so that rows stand elsewhere in each batch; streams end one after another."""
    sizes = {**small_sizes, "global_dim": 64, "local_dim": 64, "max_bytes": 160}
    network = packed(random_network(MegaByteConfig(**sizes)), name)

    def generated(prompts):
        out = [b""] * len(prompts)
        for piece in generate(network, prompts, Stopping(24), Sampling(), CacheBits(8, 4)):
            out[piece.stream] += piece.data
        return out

    prompts = PROMPTS[:streams]
    alike = [prompt for prompt in prompts if len(prompt) % network.config.patch_size == 1]  # as much of a patch is left of each
    logits = np.array(Lockstep(network, alike).logits)
    assert all(
        np.array_equal(np.array(Lockstep(network, [prompt]).logits)[0], row) for prompt, row in zip(alike, logits, strict=True)
    )
    assert generated(prompts) == [generated([prompt])[0] for prompt in prompts]


@pytest.mark.parametrize("inputs", [2, 5, 16])
@EACH_WEIGHT
def test_an_answer_has_the_same_ids_and_score_alone_as_in_a_batch(name, inputs):
    network = packed(random_byt5(d_model=64), name)
    sources = [[3 + byte for byte in prompt] for prompt in PROMPTS[:inputs]]

    def answers(some):
        news = (new for step in answer(network, some, AnswerLimits(max_length=20)) for new in step)
        return {stream: (found.ids, found.score, found.stop_reason) for stream, found in news if isinstance(found, Answer)}

    together = answers(sources)
    assert len(together) == inputs
    assert together == {stream: answers([source])[0] for stream, source in enumerate(sources)}
