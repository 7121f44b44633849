"""The whole path on a tiny random model in a few seconds: calibrate, quantize, generate, score."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from marlin_cli import load
from marlin_cli.checkpoints.writer import write_model
from marlin_cli.models import config_as_mapping
from marlin_cli.models.megabyte_config import MegaByteConfig


@pytest.fixture
def tiny(tmp_path, random_network):
    from mlx.utils import tree_flatten

    network = random_network(
        MegaByteConfig(
            patch_size=4,
            max_bytes=256,
            global_layers=1,
            global_dim=64,
            global_heads=2,
            local_layers=1,
            local_dim=32,
            local_heads=2,
        )  # fmt: skip
    )
    parameters = dict(tree_flatten(network.parameters()))
    write_model(tmp_path / "tiny", config_as_mapping(network.config), parameters, None, None)
    return tmp_path / "tiny"


def test_from_corpus_bytes_to_generated_bytes(tiny, tmp_path):
    from marlin_cli.cli import app

    def marlin(*arguments):
        result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout_bytes

    corpus = tmp_path / "corpus.bin"
    corpus.write_bytes(np.random.default_rng(0).bytes(2000))
    statistics, packed = tmp_path / "s.safetensors", tmp_path / "packed"
    marlin("calibrate", tiny, "--corpus", f"binary={corpus}", "-o", statistics, "--seq-bytes", 256)
    marlin("quantize", tiny, "-o", packed, "--stats", statistics)
    output = marlin("generate", packed, "-p", "abc", "--max-bytes", 9, "--raw")
    assert output == load(packed).generate(b"abc", max_bytes=9)
    document = marlin(
        "bench", packed, "--quality", corpus, "--reference", tiny, "--prompt-bytes", 16, "--decode-bytes", 8,
        "--repeats", 1, "--window-bytes", 200, "--format", "json",
    )  # fmt: skip
    assert json.loads(document.splitlines()[-1])
