"""The smallest network, and a corpus of two domains on disk."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from marlin_cli.models.megabyte import MegaByte
from marlin_cli.models.megabyte_config import MegaByteConfig


@pytest.fixture
def network(random_network: Callable[[MegaByteConfig], MegaByte], small_sizes: dict[str, int]) -> MegaByte:
    return random_network(MegaByteConfig(**small_sizes))


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    """Names of a corpus of about 1.4 kB."""
    rng = np.random.default_rng(1)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, size in (("code", 742), ("binary", 641)):
        (folder / name).write_bytes(rng.integers(0, 256, size, dtype=np.uint8).tobytes())
    return [f"{name}={folder / name}" for name in ("code", "binary")]
