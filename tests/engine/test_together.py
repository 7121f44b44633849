"""Sequences that stand at unlike places go through a stack together: each has what it has alone, and nothing moves."""

import mlx.core as mx
import numpy as np
import pytest
from byt5_cases import random_byt5
from decoder_cases import random_bygpt5

from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.fused import fuse
from marlin_cli.engine.fused_bygpt5 import fuse_bygpt5
from marlin_cli.engine.fused_byt5 import SELF_CACHE_ROWS, fuse_byt5
from marlin_cli.engine.sampling import Sampling, draw, kernel_drawing
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops import cpu

MODULE = cpu.kernels()[0]
pytestmark = pytest.mark.skipif(MODULE is None, reason=f"no CPU kernels here: {cpu.kernels()[1]}")

# By call, how many rows each stream has in it; a stream that is not there has none in it.
CALLS = [{0: 5, 1: 1}, {1: 3}, {0: 1, 1: 1, 2: 140}, {2: 1, 0: 1}, {0: 300, 2: 2, 1: 1}, {1: 1, 2: 1}]


def close(found, expected):
    return np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.fixture(params=[True, False], ids=["exact", "fast"])
def same(request):
    """Whether results are the same: to the bit where rows are exact."""
    MODULE.set_exact_rows(request.param)
    yield (
        np.array_equal
        if request.param
        else lambda found, expected: np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()
    )
    MODULE.set_exact_rows(cpu.rows_are_exact())


def rows_of(width, seed=0):
    """All that each stream reads, [rows, width]."""
    totals = {stream: sum(call.get(stream, 0) for call in CALLS) for stream in range(3)}
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((total, width)).astype(np.float32) for total in totals.values()]


@pytest.mark.parametrize("bits", [(16, 16), (8, 4)], ids=["float32", "packed"])
def test_a_stream_has_the_rows_that_it_has_alone(random_network, each_config, small_sizes, bits, same):
    changes = {"global_dim": 64, "layout": each_config.layout, "max_bytes": 4096}
    kept = {name: getattr(each_config, name) for name in (
        "global_positions", "token_shift", "norm", "qk_norm", "attention_window", "rope_interleaved", "global_kv_heads",
        "byte_dim", "start_tokens", "middle", "patch_size", "ffn_bias", "ffn",
    )}  # fmt: skip
    fused = fuse(random_network(MegaByteConfig(**{**small_sizes, **kept, **changes})))
    rows = rows_of(64)
    alone = [np.array(fused.new_cache(0, 1, [], CacheBits(*bits)).run(mx.array(each[None])))[0] for each in rows]
    caches = [fused.new_cache(0, 1, [], CacheBits(*bits)) for _ in rows]
    seen = [0, 0, 0]
    for call in CALLS:
        parts = [rows[stream][seen[stream] : seen[stream] + count] for stream, count in call.items()]
        hidden = np.array(
            fused.run_together(0, mx.array(np.concatenate(parts)), list(call.values()), [caches[n] for n in call])
        )
        for stream, count in call.items():
            found, hidden = hidden[:count], hidden[count:]
            assert same(found, alone[stream][seen[stream] : seen[stream] + count])
            seen[stream] += count
    assert sum(cache.nbytes for cache in caches) > 0


def test_texts_have_the_logits_that_they_have_alone(same):
    """Rows of prompts and single ids in one call: the relative bias of each depends on its own place."""
    network = random_bygpt5(relative_buckets=8, relative_distance=16)
    fused, config = fuse_bygpt5(network), network.config
    parts = fused._stack, network.embedding.weight, fused._head
    texts = [np.random.default_rng(n).integers(0, 384, len(rows)).tolist() for n, rows in enumerate(rows_of(1))]

    def new_cache():
        return MODULE.StackCache(config.layers, 1, config.heads, config.head_dim, 32, 32, SELF_CACHE_ROWS, [])

    caches, seen, alone = [new_cache() for _ in texts], [0, 0, 0], [new_cache() for _ in texts]
    for call in CALLS:
        asked = [texts[stream][seen[stream] : seen[stream] + count] for stream, count in call.items()]
        logits = np.array(MODULE.answer_decode(*parts, sum(asked, []), [len(ids) for ids in asked], [caches[n] for n in call]))
        for row, (stream, ids) in enumerate(zip(call, asked, strict=True)):
            seen[stream] += len(ids)
            for value in ids:
                expected = np.array(MODULE.answer_decode(*parts, [value], [1], [alone[stream]]))
            assert same(logits[row], expected[0])


def test_answers_at_unlike_places_read_inputs_of_their_own(same):
    """An input's beams share its memory, and stand beside the answers of other inputs."""
    network = random_byt5(d_model=64)
    fused, config = fuse_byt5(network), network.config
    parts = fused._decoder, network.embedding.weight, fused._head
    beams, rng = [1, 3, 2], np.random.default_rng(3)

    def begun():
        states = [fused.encode(mx.array(np.arange(3, 3 + length)[None])) for length in (5, 40, 17)]
        memories = [fused._decoder.remember(each, [], bits) for each, bits in zip(states, (32, 8, 4), strict=True)]
        shape = config.heads, config.head_dim, 32, 32, SELF_CACHE_ROWS, []
        caches = [MODULE.StackCache(config.decoder_layers, count, *shape) for count in beams]
        return memories, caches

    (memories, caches), (own_memories, own_caches) = begun(), begun()
    for call in [{0: 4}, {0: 1, 1: 2}, {0: 1, 1: 1, 2: 1}, {2: 5, 1: 1}, {0: 1, 2: 1}]:
        ids = {n: rng.integers(0, 384, beams[n] * count).tolist() for n, count in call.items()}
        logits = np.array(MODULE.answer_decode(
            *parts, sum(ids.values(), []), list(call.values()), [caches[n] for n in call], [memories[n] for n in call]
        ))  # fmt: skip
        for n, count in call.items():
            expected = np.array(MODULE.answer_decode(*parts, ids[n], [count], [own_caches[n]], [own_memories[n]]))
            found, logits = logits[: beams[n]], logits[beams[n] :]
            assert same(found, expected)
        if 1 in call:  # a beam goes on twice
            for cache in (caches[1], own_caches[1]):
                cache.keep([1, 1, 0])


def test_an_encoder_of_unlike_inputs_can_be_cut_between_layers(same):
    network = random_byt5(d_model=64, encoder_layers=3)
    encoder = fuse_byt5(network).encoder
    inputs = [mx.array(np.arange(3, 3 + length)[None]) for length in (1, 70, 300, 12)]
    counts = [each.shape[1] for each in inputs]
    rows = mx.concatenate([network.rows(each, None)[0] for each in inputs])
    for first, end in ((0, 1), (1, 3)):
        rows = encoder.ragged(rows, counts, [], [], first, end)
    start = 0
    for ids, count in zip(inputs, counts, strict=True):
        assert same(np.array(rows[start : start + count]), np.array(encoder(network.rows(ids, None), None)[0]))
        start += count


def test_what_does_not_go_together_is_no_call():
    network = random_byt5(d_model=64, encoder_layers=2)
    encoder = fuse_byt5(network).encoder
    cache = MODULE.StackCache(2, 1, 2, 32, 32, 32, 64, [])
    for rows, counts, caches, layers in [
        (3, [1, 1], [], (0, 2)), (2, [2, 0], [], (0, 2)), (2, [1, 1], [cache], (0, 2)), (2, [2], [cache], (0, 1)),
        (2, [2], [], (0, 3)),
    ]:  # fmt: skip
        with pytest.raises(ValueError):
            encoder.ragged(mx.zeros((rows, 64)), counts, caches, [], *layers)


SETTINGS = [Sampling(), Sampling(0.7, top_k=5), Sampling(1.3, top_p=0.8), Sampling(1.0, min_p=0.1), Sampling(0.7, top_k=5)]


def test_each_row_is_drawn_by_settings_of_its_own():
    logits, noise = mx.array(np.random.default_rng(0).standard_normal((2, 5, 300)).astype(np.float32) * 3)
    noise, forbidden = -mx.log(-mx.log(mx.abs(noise) / 20)), [[], [7], [], [1, 2], []]
    for by_row in (noise, noise[:1]):
        ids, costs = draw(logits, forbidden, SETTINGS, by_row)
        for row, settings in enumerate(SETTINGS):
            own = by_row[row : row + 1] if by_row.shape[0] > 1 else by_row
            assert draw(logits[row : row + 1], [forbidden[row]], [settings], own) == ([ids[row]], [costs[row]])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("marlin_cli.engine.sampling.kernels", lambda: (None, ""))
            found, nats = draw(logits, forbidden, SETTINGS, by_row)
            assert found == ids and np.allclose(nats, costs, atol=1e-5)


def test_a_patch_is_drawn_from_wherever_each_stream_stands(random_network, each_config, same):
    """Streams with unlike numbers of ids given, drawn by settings of their own; the logits come with them."""
    network = random_network(each_config)
    fused, stage = fuse(network), network.config.stages[-1]
    lucid = network.config.layout == "megabyte_pytorch"
    places = stage.length + lucid
    rng = np.random.default_rng(0)
    condition = mx.array(
        rng.standard_normal(
            (5, network.config.stages[-1].length if network.config.layout != "prefix" else 1, stage.dim)
        ).astype(np.float32)
    )
    lead = network.leading_row(len(network.stages) - 1, 5, condition, mx.array([9, 8, 7, 6, 5]))[:, 0]
    given = mx.array(rng.integers(0, 256, (5, places)).astype(np.int32))
    known = [1, 0, places, places - 1, 2] if not lucid else [1, 1, places, places - 1, 2]
    noise = [mx.random.gumbel((places, 256), key=mx.random.key(n)) for n in range(5)]
    additions = network.additions(condition)

    def run(rows):
        of = mx.array(rows)
        drawings = [kernel_drawing(MODULE, SETTINGS[row]) for row in rows]
        return MODULE.local_patch_decode(
            fused._stacks[-1], fused._table, fused._head, lead[of], additions if additions.shape[0] == 1 else additions[of],
            given[of], [known[row] for row in rows], places, [noise[row] for row in rows], drawings, True,
        )  # fmt: skip

    ids, logits = map(np.array, run([0, 1, 2, 3, 4]))
    for row in range(5):
        alone, own = map(np.array, run([row]))
        assert (ids[row, : known[row]] == np.array(given)[row, : known[row]]).all()
        assert (ids[row] == alone[0]).all() and (ids[row] >= 0).all()
        if known[row] < places:
            assert same(logits[row, known[row] :], own[0, known[row] :])
