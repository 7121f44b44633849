"""A GPU's time is told by part where whole patches are decoded there; the kernels' own account is tested in tests/cuda."""

from types import SimpleNamespace

import pytest

from marlin_cli.bench import gpu_parts
from marlin_cli.bench.throughput import ThroughputSettings
from marlin_cli.engine.cache import CacheBits
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.models.megabyte_config import MegaByteConfig

SMALL = {"patch_size": 4, "byte_dim": 8, "global_layers": 1, "global_dim": 32, "global_heads": 2, "local_layers": 1}


@pytest.fixture
def model():
    return SimpleNamespace(network=MegaByte(MegaByteConfig(**SMALL, local_dim=16, local_heads=1)), cache_bits=CacheBits())


def test_without_a_gpu_nothing_tells_parts_apart(model):
    assert gpu_parts.seconds_by_part(model, ThroughputSettings()) is None


@pytest.mark.parametrize("taken", [False, True])
def test_operations_and_packed_caches_are_not_told_apart(model, taken, monkeypatch):
    """Nor what no decoder of whole patches takes."""
    asked = []
    monkeypatch.setattr(gpu_parts, "gpu", lambda: "cuda")
    monkeypatch.setattr(gpu_parts, "patch_decoder", lambda network, streams, timed: asked.append((streams, timed)))
    if not taken:
        model.cache_bits = CacheBits(8, 8)
    assert gpu_parts.seconds_by_part(model, ThroughputSettings()) is None
    assert asked == ([(1, True)] if taken else [])
    monkeypatch.setenv("MARLIN_PATCHES", "operations")
    assert gpu_parts.seconds_by_part(model, ThroughputSettings()) is None and len(asked) == taken
