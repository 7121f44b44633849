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


@pytest.mark.parametrize("packed", [False, True])
def test_operations_are_not_told_apart(model, packed, monkeypatch):
    """Nor what no decoder of whole patches takes, which is asked for the cache that the model has."""
    asked = []
    monkeypatch.setattr(gpu_parts, "gpu", lambda: "cuda")
    monkeypatch.setattr(gpu_parts, "patch_decoder", lambda network, streams, bits, timed: asked.append((streams, bits, timed)))
    model.cache_bits = CacheBits(8, 8) if packed else CacheBits()
    assert gpu_parts.seconds_by_part(model, ThroughputSettings()) is None
    assert asked == [(1, model.cache_bits, True)]
    monkeypatch.setenv("MARLIN_PATCHES", "operations")
    assert gpu_parts.seconds_by_part(model, ThroughputSettings()) is None and len(asked) == 1
