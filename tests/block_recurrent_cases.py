"""Random Block-Recurrent Transformers, and the state dicts that their package would have of them."""

from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from marlin_cli.models.block_recurrent import BlockRecurrent
from marlin_cli.models.block_recurrent_config import BlockRecurrentConfig

SIZES: dict[str, Any] = {
    "d_model": 32, "ffn_dim": 96, "heads": 2, "head_dim": 16, "layers": 3, "recurrent_layers": (0, 2), "block_bytes": 8,
    "state_vectors": 6,
}  # fmt: skip

# Options of every way to update states by meliad's equations.
MELIAD: list[dict[str, Any]] = [
    {"equations": "meliad", "gate": gate, "state_update": update}
    for gate, update in (("bias", "skip"), ("bias", "dual"), ("lstm", "single"), ("lstm", "dual"))
]


def random_block_recurrent(seed: int = 0, **changes: Any) -> BlockRecurrent:
    """A network whose every parameter is random."""
    mx.random.seed(seed)
    network = BlockRecurrent(BlockRecurrentConfig(**{**SIZES, **changes}))
    network.update(
        tree_map(lambda a: mx.random.normal(a.shape) * (0.5 if a.ndim == 1 else a.shape[-1] ** -0.5), network.parameters())
    )
    mx.eval(network.parameters())
    return network


def state_of(network: BlockRecurrent, ffn_dim: int | None = None) -> dict[str, np.ndarray]:
    """Its tensors under the package's names; of a feed-forward the first channels alone."""
    config = network.config
    ffn = ffn_dim or config.ffn_dim
    found: dict[str, mx.array] = {
        "token_emb.weight": network.embedding.weight,
        "to_logits.0.gamma": network.norm.weight,
        "to_logits.0.beta": mx.zeros_like(network.norm.weight),
        "to_logits.1.weight": network.output.weight,
    }
    for index, layer in enumerate(network.layers):
        own, attention = f"layers.{index}", layer.attention
        found |= {
            f"{own}.0.norm.gamma": layer.attention_norm.weight,
            f"{own}.0.norm.beta": mx.zeros_like(layer.attention_norm.weight),
            f"{own}.0.to_q.weight": attention.q_proj.weight,
            f"{own}.0.to_kv.weight": mx.concatenate([attention.k_proj.weight, attention.v_proj.weight]),
            f"{own}.0.to_out.weight": attention.o_proj.weight,
            f"{own}.1.0.gamma": layer.ffn_norm.weight,
            f"{own}.1.0.beta": mx.zeros_like(layer.ffn_norm.weight),
            f"{own}.1.1.weight": mx.concatenate([layer.ffn.up_proj.weight[:ffn], layer.ffn.gate_proj.weight[:ffn]]),
            f"{own}.1.3.weight": layer.ffn.down_proj.weight[:, :ffn],
        }
        if "q_scale" in attention:
            found |= {f"{own}.0.attn.{name}": attention[name] for name in ("q_scale", "k_scale")}
        number = config.states_of(index)
        if number is None:
            continue
        states, theirs = network.states[number], f"{own}.0.state_container"
        found |= {
            f"{theirs}.init_state": states.start,
            f"{theirs}.state_pos_ids": states.positions,
            f"{theirs}.learned_ema_beta": states.decay,
            f"{theirs}.state_norm.gamma": states.norm.weight,
            f"{theirs}.state_norm.beta": mx.zeros_like(states.norm.weight),
            f"{theirs}.q_to_state.weight": attention.state_q_proj.weight,
            f"{theirs}.q_from_state.weight": states.block_q_proj.weight,
            f"{theirs}.state_to_q.weight": states.q_proj.weight,
            f"{theirs}.state_to_kv.weight": mx.concatenate([states.k_proj.weight, states.v_proj.weight]),
            f"{theirs}.to_state_out.weight": states.out_proj.weight,
            f"{theirs}.state_out_to_gate.weight": states.update_proj.weight,
            f"{theirs}.state_out_to_gate.bias": states.update_proj.bias,
        }
        for ours, name in (("read", "to_state_cross_attn"), ("own", "state_self_attn"), ("block", "from_state_cross_attn")):
            found |= {f"{theirs}.{name}.{scale}": states[f"{ours}_{scale}"] for scale in ("q_scale", "k_scale")}
    return {name: np.array(array) for name, array in found.items()}
