"""The published arithmetic of MegaByte, with its factor-of-eight slip in the flat caches corrected."""

import pytest

from marlin_cli.errors import UsageError
from marlin_cli.models import ARCHITECTURES
from marlin_cli.models.bygpt5 import ByGPT5Config
from marlin_cli.models.bygpt5_steps import BYGPT5
from marlin_cli.models.byt5_config import ByT5Config
from marlin_cli.models.megabyte_config import MegaByteConfig, StageConfig
from marlin_cli.prediction.arithmetic import attention_pairs, cache_bytes, costs_of

GIB, KIB = 1 << 30, 1 << 10

LARGE = MegaByteConfig(
    patch_size=8, max_bytes=32768, global_layers=32, global_dim=4096, global_heads=32,
    local_layers=4, local_dim=1024, local_heads=8,
)  # fmt: skip


def test_attention_of_patches_against_bytes():
    assert attention_pairs(LARGE, 32768) == 4096**2 + 32768 * 8
    costs = costs_of(LARGE, {}, 32768)
    assert costs.flat_attention_pairs == 2**30
    assert costs.flat_attention_pairs / costs.attention_pairs == pytest.approx(63.0, abs=0.05)


def test_caches_of_flat_models():
    assert cache_bytes(layers=32, heads=8, rows=4096, head_dim=128) == 0.5 * GIB
    assert cache_bytes(layers=32, heads=8, rows=32768, head_dim=128) == 4 * GIB


def test_caches_by_level_and_bits():
    assert costs_of(LARGE, {}, 32768).cache_bytes == {"global": 2 * GIB, "local": 128 * KIB}
    assert costs_of(LARGE, {}, 32768).flat_cache_bytes == 16 * GIB
    packed = costs_of(LARGE, {}, 32768, cache_bits=4).cache_bytes
    assert packed == {"global": 2 * GIB * 4.5 / 16, "local": 128 * KIB}  # a scale of 8 bits for 16 numbers
    assert costs_of(LARGE, {}, 32768, cache_bits=8).cache_bytes["global"] == 2 * GIB * 8.25 / 16


def test_time_of_a_byte_at_a_bandwidth():
    # 3 GB of global weights and 2 GiB of cache once in 8 bytes, 100 MB of local weights each byte, at 400 GB/s.
    costs = costs_of(LARGE, {"global": 3e9, "local": 100e6, "embeddings": 1e9}, 32768)
    assert costs.read_bytes["global"] + costs.read_bytes["global cache"] == (3e9 + 2 * GIB) / 8
    assert costs.read_bytes["local"] / 400e9 == pytest.approx(0.25e-3)
    assert "embeddings" not in costs.read_bytes
    assert costs.seconds_per_byte(400e9) == pytest.approx(1.859e-3, rel=1e-3)


def test_a_window_bounds_what_is_read_and_not_what_is_kept():
    config = MegaByteConfig(attention_window=16)
    whole, bounded = costs_of(MegaByteConfig(), {}, 8192), costs_of(config, {}, 8192)
    assert bounded.cache_bytes == whole.cache_bytes
    assert bounded.read_bytes["global cache"] == whole.read_bytes["global cache"] * 16 / 1024


def test_stages_between_count_once_in_their_sequences():
    config = MegaByteConfig(
        layout="megabyte_pytorch", patch_size=16, max_bytes=1024, middle=(StageConfig(4, 2, 64, 1, 128),)
    )  # fmt: skip
    assert attention_pairs(config, 1024) == 64**2 + 64 * 4**2 + 256 * 4**2
    assert costs_of(config, {"middle": 800.0}, 1024).read_bytes["middle"] == 200.0


def test_a_model_without_patches_reads_all_of_its_weights_and_rows_for_each_byte(monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "bygpt5", BYGPT5)
    config = ByGPT5Config(layers=4, heads=6, head_dim=64, max_bytes=1024)
    costs = costs_of(config, {"decoder": 1e6, "head": 1e3, "embeddings": 1e9}, 1000)
    assert costs.attention_pairs == costs.flat_attention_pairs == 1000**2
    rows = 2 * 4 * 6 * 64 * 1000 * 2
    assert costs.cache_bytes == {"decoder": rows} and costs.flat_cache_bytes == rows
    assert costs.read_bytes == {"decoder": 1e6, "head": 1e3, "decoder cache": rows}


def test_an_architecture_that_does_not_say_is_refused():
    with pytest.raises(UsageError, match="the arithmetic of a ByT5 is not known"):
        costs_of(ByT5Config(), {}, 16)


@pytest.mark.parametrize("context", [0, 8193])
def test_a_context_outside_the_model_is_refused(context):
    with pytest.raises(UsageError, match="the model's context is 1 to 8192 bytes"):
        costs_of(MegaByteConfig(), {}, context)


def test_unknown_bits_are_refused():
    with pytest.raises(UsageError, match="5 bits: known are 4, 8, 16, 32"):
        costs_of(MegaByteConfig(), {}, 1024, cache_bits=5)
