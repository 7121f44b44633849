"""The rotated network computes the same, and its channels are even where one stood out."""

import byt5_cases
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from marlin_cli.errors import QuantizationError
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.quantization.apply import quantize_network
from marlin_cli.quantization.methods.hadamard import hadamard, rotated
from marlin_cli.quantization.plan import QuantizationSettings

SIZES = {
    "patch_size": 4, "max_bytes": 96, "global_layers": 2, "global_dim": 64, "global_heads": 2,
    "local_layers": 1, "local_dim": 64, "local_heads": 2, "global_ffn_dim": 96, "local_ffn_dim": 96,
}  # fmt: skip
CONFIGS = {
    "swiglu, rope": MegaByteConfig(**SIZES),
    "biases, learned positions, token shift": MegaByteConfig(
        **SIZES, ffn="gelu", ffn_bias=True, global_positions="learned", token_shift=True
    ),
    "shared values": MegaByteConfig(**SIZES, global_kv_heads=1, qk_norm=True),
    "narrow heads": MegaByteConfig(**{**SIZES, "global_heads": 4}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_it_computes_the_same(name, random_network):
    network = random_network(CONFIGS[name])
    other = rotated(network)
    ids = mx.array(np.random.default_rng(0).integers(0, 256, (3, 40)))
    # Random gains make logits of some tens.
    np.testing.assert_allclose(np.array(other(ids)), np.array(network(ids)), rtol=1e-3, atol=2e-3)
    before = dict(tree_flatten(network.parameters()))
    changed = [path for path, array in tree_flatten(other.parameters()) if not mx.allclose(array, before[path]).item()]
    assert "local.layers.0.ffn.down_proj.weight" in changed and "byte_embedding.weight" not in changed


BYT5_KINDS = {name: changes for name, changes in byt5_cases.KINDS.items() if name in ("gated", "pooling")}


@pytest.mark.parametrize("changes", [*BYT5_KINDS.values(), {"head_dim": 16}], ids=[*BYT5_KINDS, "narrow heads"])
def test_a_byt5_answers_the_same(changes):
    network = byt5_cases.random_byt5(**changes)
    other = rotated(network)
    source, target = mx.array([[*range(40, 90), 1]]), mx.array([[0, *range(60, 90)]])
    np.testing.assert_allclose(np.array(other(source, target)), np.array(network(source, target)), rtol=1e-3, atol=2e-3)
    before = dict(tree_flatten(network.parameters()))
    changed = {path for path, array in tree_flatten(other.parameters()) if not mx.allclose(array, before[path]).item()}
    kept = {path for path in before if path.endswith("relative_bias.weight") or "local_bias" in path}
    assert changed == before.keys() - kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_layers": 0}, "an encoder alone cannot be rotated"),
        ({"tied_head": True}, "a tied head cannot be rotated"),
        ({"downsample_factor": 2, "pooling": "max"}, "pools by the maximum"),
        ({"d_model": 48}, "d_model 48 is not divisible by 32"),
    ],
)
def test_a_byt5_that_cannot_be_rotated(changes, message):
    with pytest.raises(QuantizationError, match=message):
        rotated(byt5_cases.random_byt5(**changes))


def test_the_matrix_is_orthogonal_and_symmetric():
    matrix = hadamard(32)
    np.testing.assert_allclose(matrix @ matrix, np.eye(32), atol=1e-6)
    np.testing.assert_array_equal(matrix, matrix.T)


def test_outliers_cost_mxfp4_less_when_rotated(random_network):
    network = random_network(CONFIGS["swiglu, rope"])
    for block in network["global"].layers:
        scale = mx.where(mx.arange(64) % 32 == 5, 50.0, 1.0)
        block.attention_norm.weight = block.attention_norm.weight / scale
        for layer in (block.attention.q_proj, block.attention.k_proj, block.attention.v_proj):
            layer.weight = layer.weight * scale
    settings = QuantizationSettings("mxfp4", "mxfp4")
    ids = mx.array(np.random.default_rng(0).integers(0, 256, (3, 40)))
    expected = np.array(network(ids))

    def error(found) -> float:
        return float(np.square(np.array(quantize_network(found, settings, method="rtn").network(ids)) - expected).mean())

    assert error(rotated(network)) < 0.7 * error(network)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "paper"}, "only layout prefix with rmsnorm"),
        ({"norm": "layernorm"}, "with layernorm"),
        ({"local_dim": 48}, "local_dim 48 is not divisible by 32"),
        ({"global_dim": 96, "global_heads": 2, "token_shift": True}, "global_dim 96 is not divisible by 64"),
    ],
)
def test_what_cannot_be_rotated(changes, message, random_network):
    with pytest.raises(QuantizationError, match=message):
        rotated(random_network(MegaByteConfig(**{**SIZES, **changes})))
