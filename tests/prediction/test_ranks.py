"""Plans of ranks: what one holds follows from the cut, and each sum costs what the link says."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from marlin_cli.errors import UsageError
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.prediction.arithmetic import costs_of
from marlin_cli.prediction.ranks import Held, Link, by_split, by_streams, held_by_one, parse_link
from marlin_cli.prediction.sizes import bytes_by_part

CONFIG = MegaByteConfig(
    patch_size=4, max_bytes=64, global_layers=3, global_dim=64, global_heads=4, global_kv_heads=2, global_ffn_dim=128,
    local_layers=1, local_dim=16, local_heads=2,
)  # fmt: skip


def weights() -> dict[str, mx.array]:
    return dict(tree_flatten(MegaByte(CONFIG).parameters()))


def test_a_rank_holds_its_part_of_blocks_and_the_rest_whole() -> None:
    blocks = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)
    norms_and_projections = 3 * 2 * 64 + 64 + 64 * 64 + 64 * 16
    expected = (blocks / 2 + norms_and_projections) / (blocks + norms_and_projections)
    held = held_by_one(CONFIG, weights(), 2, "m")
    assert (held.part, held.cache) == ("global", 0.5)
    assert held.weights == pytest.approx(expected)


def test_ranks_that_are_more_than_heads_of_keys_hold_them_together() -> None:
    assert held_by_one(CONFIG, weights(), 4, "m").cache == 0.5


def test_so_many_that_cannot_share_are_refused() -> None:
    with pytest.raises(UsageError, match="4 heads, which 3 ranks cannot share; start 2 or 4 ranks"):
        held_by_one(CONFIG, weights(), 3, "m")


def test_streams_multiply_and_a_split_divides_what_it_shares_and_waits_for_sums() -> None:
    sizes: dict[str, float] = dict(bytes_by_part(weights()))
    costs = costs_of(CONFIG, sizes, 64)
    seconds = {"global": 4.0, "global cache": 2.0, "local": 1.0}
    streams = by_streams(costs, sizes, seconds, 2)
    assert streams.seconds_per_byte == 7.0
    assert streams.bytes_per_second == pytest.approx(2 / 7)
    assert streams.memory_bytes == sum(sizes.values()) + sum(costs.cache_bytes.values())
    split = by_split(costs, sizes, seconds, Held(2, "global", 0.5, 0.5), CONFIG, Link(0.4, 64 * 4.0))
    a_sum = 0.4 + 64 * 4 / 256
    assert split.seconds_per_byte == pytest.approx(2 + 1 + 1 + 2 * 3 * a_sum / 4)
    saved = 0.5 * sizes["global"] + 0.5 * costs.cache_bytes["global"]
    assert split.memory_bytes == pytest.approx(streams.memory_bytes - saved)


def test_a_sum_over_more_ranks_takes_longer() -> None:
    link = Link(1e-4, 1e9)
    assert link.sum_seconds(0, 2) == 1e-4
    assert link.sum_seconds(0, 8) == pytest.approx(7e-4)
    assert link.sum_seconds(1e9, 4) == pytest.approx(3e-4 + 1.5)


def test_a_tree_is_as_deep_as_its_logarithm() -> None:
    assert parse_link("300,1") == Link(300e-6, 1e9)
    assert parse_link("10,100,tree") == Link(10e-6, 100e9, tree=True)
    assert parse_link("10,100,tree").sum_seconds(0, 8) == pytest.approx(30e-6)


@pytest.mark.parametrize("text", ["", "tree", "1,2,ring", "1", "1,2,3", "a,b", "0,1", "1,-1", "nan,1", "1,inf"])
def test_a_link_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--link"):
        parse_link(text)
