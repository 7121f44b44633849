"""Sequential packing: each layer fitted to what the packed layers before it leave, in every layout."""

import mlx.core as mx
import numpy as np
import pytest
from decoder_cases import random_gbst
from mlx.utils import tree_flatten

from marlin_cli.errors import QuantizationError
from marlin_cli.models.megabyte_config import MegaByteConfig, StageConfig
from marlin_cli.quantization import sequential
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.plan import QuantizationSettings
from marlin_cli.quantization.sequential import quantize_sequentially

SMALL = {
    "patch_size": 4,
    "max_bytes": 96,
    "global_layers": 2,
    "global_dim": 32,
    "global_heads": 2,
    "local_layers": 1,
    "local_dim": 32,
    "local_heads": 2,
    "global_ffn_dim": 64,
    "local_ffn_dim": 64,
}
CONFIG = MegaByteConfig(**SMALL)
LAYOUTS = {
    "prefix": CONFIG,
    "paper": MegaByteConfig(**{**SMALL, "global_dim": 128}, layout="paper"),
    "megabyte_pytorch": MegaByteConfig(
        **{**SMALL, "patch_size": 8}, layout="megabyte_pytorch", middle=(StageConfig(2, 1, 32, 2, 64),), token_shift=True
    ),
}
FORMAT = QuantizationSettings("mxfp4", "mxfp4")


def batches(seed: int, count: int = 4, windows: int = 8) -> list[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    # Bytes with some structure: the inputs of layers are then correlated.
    return [
        ("text" if n % 2 else "code", rng.integers(0, 32 + 64 * (n % 2), (windows, 48), dtype=np.uint8)) for n in range(count)
    ]


def divergence(network, other) -> float:
    """Mean KL divergence in nats on bytes that were not packed on."""
    total = 0.0
    for _, windows in batches(99):
        ids = mx.array(windows.astype(np.int32))
        p, q = (a - mx.logsumexp(a, axis=-1, keepdims=True) for a in (network(ids), other(ids)))
        total += (mx.exp(p) * (p - q)).sum(axis=-1).mean().item()
    return total


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_network_predicts_more_nearly_what_it_did(layout, random_network):
    network = random_network(LAYOUTS[layout])
    plain = quantize_network(network, FORMAT)
    found = quantize_sequentially(network, FORMAT, batches(1))
    assert found.quantization == plain.quantization
    assert [layer.plan for layer in found.layers] == [layer.plan for layer in plain.layers]
    assert divergence(network, found.network) < 0.8 * divergence(network, plain.network)


def test_a_layer_makes_up_for_those_before_it(random_network, monkeypatch):
    network = random_network(CONFIG)
    fitted = divergence(network, quantize_sequentially(network, FORMAT, batches(1, 8)).network)
    monkeypatch.setattr("marlin_cli.quantization.sequential.FIT_DAMPING", 1e9)
    assert fitted < 0.95 * divergence(network, quantize_sequentially(network, FORMAT, batches(1, 8)).network)


@pytest.mark.parametrize("method", ["rtn", "mse", "gptq", "gptq+hadamard"])
def test_two_runs_give_the_same_arrays(method, random_network):
    network = random_network(CONFIG)
    one, two = (
        dict(tree_flatten(quantize_sequentially(network, FORMAT, batches(1), method=method).network.parameters()))
        for _ in range(2)
    )
    assert one.keys() == two.keys()
    for path, array in one.items():
        assert mx.array_equal(array, two[path]).item(), path


def test_domain_weights_choose_among_the_bytes(random_network):
    network = random_network(CONFIG)
    chosen = quantize_sequentially(network, FORMAT, batches(1), domain_weights={"text": 1.0})
    text = [batch for batch in batches(1) if batch[0] == "text"]
    alone = quantize_sequentially(network, FORMAT, text)
    for path, array in tree_flatten(alone.network.parameters()):
        assert mx.allclose(array, dict(tree_flatten(chosen.network.parameters()))[path]).item(), path
    with pytest.raises(QuantizationError, match="no domain 'txt'"):
        quantize_sequentially(network, FORMAT, batches(1), domain_weights={"txt": 1.0})


def test_what_cannot_be_rotated_says_so_before_bytes_are_read(monkeypatch):
    monkeypatch.setattr(sequential, "_input_squares", lambda *_: pytest.fail("bytes were read"))
    with pytest.raises(QuantizationError, match="GBST cannot be rotated"):
        quantize_sequentially(random_gbst(), FORMAT, batches(1), method="gptq+hadamard")


def test_no_bytes(random_network):
    with pytest.raises(QuantizationError, match="no calibration bytes"):
        quantize_sequentially(random_network(CONFIG), FORMAT, [])
