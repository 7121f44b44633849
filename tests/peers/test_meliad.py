"""Block-Recurrent Transformers by meliad's equations against a transcription of its code: states handed on, every gate."""

import mlx.core as mx
import numpy as np
import pytest
from numpy_meliad import NumpyMeliad, Sizes, random_parameters

from marlin_cli.engine.continuation import begin
from marlin_cli.models import build

pytestmark = pytest.mark.peers

TOLERANCE = 1e-5
UPDATES = {"dual": {}, "single": {"recurrent_single_gate": True}, "skip": {"recurrent_skip_ffn": True}}

# marlin's names of what a layer, or the states of one, are made of.
OF_LAYER = {
    "_kvq/pre_attn_layernorm/scale": "attention_norm.weight",
    "_kvq/queries_layer/kernel": "attention.q_proj.weight",
    "_kvq/queries2_layer/kernel": "attention.state_q_proj.weight",
    "_kvq/keys_layer/kernel": "attention.k_proj.weight",
    "_kvq/values_layer/kernel": "attention.v_proj.weight",
    "_kvq/attention_scale": "attention.scale",
    "attention_scale2": "attention.state_scale",
    "post_attn_mlp/output_layer/kernel": "attention.o_proj.weight",
    "pre_ffn_layernorm/scale": "ffn_norm.weight",
    "ffn/hidden0/kernel": "ffn.up_proj.weight",
    "ffn/output_layer/kernel": "ffn.down_proj.weight",
}
OF_STATES = {
    "_kvq/pre_attn_layernorm/scale": "norm.weight",
    "_kvq/position_embeddings": "positions",
    "_kvq/queries_layer/kernel": "q_proj.weight",
    "_kvq/queries2_layer/kernel": "block_q_proj.weight",
    "_kvq/keys_layer/kernel": "k_proj.weight",
    "_kvq/values_layer/kernel": "v_proj.weight",
    "_kvq/attention_scale": "scale",
    "attention_scale2": "block_scale",
    "post_attn_mlp/output_layer/kernel": "out_proj.weight",
    "pre_ffn_layernorm/scale": "ffn_norm.weight",
    "ffn/hidden0/kernel": "ffn.up_proj.weight",
    "ffn/output_layer/kernel": "ffn.down_proj.weight",
    "post_attn_mlp/gate_bias": "gate.bias",
    "ffn/gate_bias": "ffn_gate.bias",
    **{
        f"{mlp}/{name}_gate/{theirs}": f"{gate}.{name}_proj.{ours}"
        for mlp, gate in (("post_attn_mlp", "gate"), ("ffn", "ffn_gate"))
        for name in ("forget", "input")
        for theirs, ours in (("kernel", "weight"), ("bias", "bias"))
    },
}


def network_of(sizes, parameters, update):
    """marlin's network of the same parameters; the tied output, which meliad divides, has a matrix of its own."""
    weights = {
        "embedding.weight": parameters["embed/embedding"],
        "output.weight": parameters["embed/embedding"] / np.sqrt(sizes.embedding_size),
        "norm.weight": parameters["final_layernorm/scale"],
    }
    for name, array in parameters.items():
        layer, _, rest = name.partition("/")
        if not layer.startswith("transformer"):
            continue
        index = int(layer.removeprefix("transformer"))
        module, _, rest = rest.partition("/")
        array = array.T if name.endswith("kernel") else array
        if module == "tbase":
            weights[f"layers.{index}.{OF_LAYER[rest]}"] = array
        elif module == "relative_positions":
            weights[f"layers.{index}.attention.relative_bias"] = array
        else:
            number = sizes.recurrent_layer_indices.index(index)
            weights[f"states.{number}.{OF_STATES[rest] if rest else 'start'}"] = array
    config = {
        "model_type": "block_recurrent", "vocab_size": sizes.vocab_size, "d_model": sizes.embedding_size,
        "ffn_dim": sizes.mlp_dim, "heads": sizes.num_heads, "head_dim": sizes.head_size, "layers": sizes.num_layers,
        "recurrent_layers": list(sizes.recurrent_layer_indices), "block_bytes": sizes.window_length,
        "state_vectors": sizes.recurrent_num_states, "equations": "meliad", "gate": sizes.recurrent_gate_type,
        "state_update": update,
    }  # fmt: skip
    arrays = {name: mx.array(np.ascontiguousarray(array, np.float32)) for name, array in weights.items()}
    return build(config, arrays, where="here", dtype=mx.float32)


def both(gate, update, **changes):
    sizes = Sizes(recurrent_gate_type=gate, **UPDATES[update], **changes)
    parameters = random_parameters(sizes)
    return NumpyMeliad(sizes, parameters), network_of(sizes, parameters, update)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("gate", ["bias", "lstm"])
def test_blocks_and_segments(gate, update):
    model, network = both(gate, update)
    block = model.sizes.window_length
    ids = np.random.default_rng(1).integers(0, 256, (2, 6 * block))
    expected = np.concatenate([model(part) for part in np.split(ids, 3, axis=1)], axis=1)
    found = np.array(network(mx.array(ids)))
    assert np.abs(found - expected).max() < TOLERANCE
    # An end within a block: what comes later is not seen, and meliad reads whole windows alone.
    assert np.abs(np.array(network(mx.array(ids[:, : 4 * block + 3]))) - expected[:, : 4 * block + 3]).max() < TOLERANCE


def test_distances_of_a_wide_block():
    """Every bucket of relative positions, those beyond the last distance too."""
    model, network = both("bias", "skip", window_length=150, num_layers=2, recurrent_layer_indices=(1,))
    ids = np.random.default_rng(2).integers(0, 256, (1, 300))
    assert np.abs(np.array(network(mx.array(ids))) - model(ids)).max() < TOLERANCE


@pytest.mark.parametrize("gate", ["bias", "lstm"])
def test_cached_decoding(gate):
    model, network = both(gate, "dual")
    ids = np.random.default_rng(3).integers(0, 256, (2, 5 * model.sizes.window_length))
    expected = model(ids)
    state = begin(network, [bytes(row[:3].tolist()) for row in ids])
    for position in range(3, ids.shape[1]):
        assert np.abs(np.array(state.logits) - expected[:, position - 1]).max() < TOLERANCE, position
        state.push(mx.array(ids[:, position]))
