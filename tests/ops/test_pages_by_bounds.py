"""Attention that leaves out pages by bounds on their keys: what it reads, and that what is left weighs no more than it may."""

import mlx.core as mx
import numpy as np
import pytest

from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.decoding import Lockstep
from marlin_cli.engine.fused import fuse
from marlin_cli.engine.generation import generate
from marlin_cli.engine.sampling import Sampling
from marlin_cli.engine.stopping import Stopping
from marlin_cli.errors import UsageError
from marlin_cli.models.megabyte_config import MegaByteConfig

SIZES = {
    "patch_size": 4, "max_bytes": 4096, "global_layers": 2, "global_dim": 64, "global_heads": 2, "global_positions": "none",
    "local_layers": 1, "local_dim": 16, "local_heads": 1,
}  # fmt: skip
DATA = np.random.default_rng(0).integers(0, 256, 3000, dtype=np.uint8).tobytes()


@pytest.fixture(scope="module")
def network():
    from small_networks import random_weights

    return random_weights(MegaByteConfig(**SIZES))


def sharp(network):
    """Keys and queries so large that few rows have all of a softmax."""
    from mlx.utils import tree_map

    copy = type(network)(network.config)
    copy.update(tree_map(lambda a: a, network.parameters()))
    for layer in copy["global"].layers:
        layer.attention.q_proj.weight = layer.attention.q_proj.weight * 400
    return copy


def hidden_rows(network, bits, counts, rows=600):
    fused = fuse(network)
    cache = fused.new_cache(0, 1, [], bits)
    # The rows of a page are alike, so that its bounds say much.
    kinds = mx.random.normal((1, rows // 128 + 1, 64), key=mx.random.key(0))
    x = mx.repeat(kinds, 128, axis=1)[:, :rows] + 0.02 * mx.random.normal((1, rows, 64), key=mx.random.key(1))
    found, start = [], 0
    for count in [*counts, rows - sum(counts)]:
        found.append(np.array(cache.run(x[:, start : start + count])[0]))
        start += count
    return np.concatenate(found), fused.pages_read


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("share", [0.0, 2.0**-24, 1e-2])
def test_what_is_left_out_weighs_no_more_than_it_may(network, bits, share):
    for each in (network, sharp(network)):
        whole, nothing = hidden_rows(each, CacheBits(bits, bits), [500])
        own, pages = hidden_rows(each, CacheBits(bits, bits, share_left=share), [500])
        assert nothing == [(0, 0)] * 2 and all(0 < read <= there for read, there in pages)
        assert np.abs(own - whole).max() <= (1e-4 if share < 1e-3 else 30 * share) * np.abs(whole).max()
        if share == 0:
            assert all(read == there for read, there in pages)
    if share:
        assert pages[0][0] < 0.8 * pages[0][1]  # the sharp one leaves some out


def test_each_row_chooses_its_own_pages_whatever_comes_with_it(network):
    bits = CacheBits(share_left=1e-2)
    alone, pages = hidden_rows(sharp(network), bits, [1] * 599)
    together, same = hidden_rows(sharp(network), bits, [100, 300, 7])
    assert pages == same and np.abs(alone - together).max() < 1e-4


def test_bounds_are_taken_anew_where_a_cache_is_cut_back(network):
    each = sharp(network)
    fused = fuse(each)
    x = mx.random.normal((1, 400, 64), key=mx.random.key(1))
    plain, cut = (fused.new_cache(0, 1, [], CacheBits(share_left=1e-3)) for _ in range(2))
    plain.run(x[:, :300])
    cut.run(x[:, :300])
    draft = cut.held.copy()
    cut.run(100 * x[:, 300:350])
    cut.held.cut(300, [])
    assert np.array_equal(np.array(plain.run(x[:, 300:])), np.array(cut.run(x[:, 300:])))
    assert draft.rows == 300


def test_bytes_are_the_same_where_nothing_of_weight_is_left_out(network):
    def made(bits):
        pieces = generate(network, [DATA[:2500]], Stopping(60), Sampling(0.8, seed=1), bits)
        return b"".join(piece.data for piece in pieces)

    assert made(CacheBits(share_left=2.0**-24)) == made(CacheBits())


def test_it_is_refused_where_no_kernel_reads_pages(network, monkeypatch):
    from marlin_cli.engine import schedulers

    monkeypatch.setattr(schedulers, "fused_stages", lambda network, bits: None)
    with pytest.raises(UsageError, match="by the CPU kernels alone"):
        schedulers.check_cache(network, CacheBits(share_left=0.1))
    with pytest.raises(UsageError, match="less than 1"):
        CacheBits(share_left=1.0)
    assert Lockstep(network, [b"x"], CacheBits(share_left=0.5)).logits.shape == (1, 256)
