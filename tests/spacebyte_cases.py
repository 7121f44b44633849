"""Random SpaceBytes, and checkpoints of them as kjslag/spacebyte's train.py saves them."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from checkpoints.torch_writer import tensor, write_zip
from mlx.utils import tree_map

from marlin_cli.models.spacebyte import SpaceByte
from marlin_cli.models.spacebyte_config import SpaceByteConfig

SIZES: dict[str, Any] = {
    "max_bytes": 127, "max_patches": 64, "global_layers": 2, "global_dim": 64, "global_heads": 4, "global_ffn_dim": 128,
    "initial_layers": 1, "final_layers": 2, "local_dim": 32, "local_heads": 2, "local_ffn_dim": 64, "local_window": 16,
    "positions": "learned",
}  # fmt: skip
ACTIVATIONS = {"relu": "ReLU", "gelu_tanh": "GELU", "silu": "SiLU"}
NORMS = {"layernorm": "LayerNorm", "variance": "RMSNorm"}


def random_spacebyte(seed: int = 0, **changes: Any) -> SpaceByte:
    """A network whose every parameter is random."""
    mx.random.seed(seed)
    network = SpaceByte(SpaceByteConfig(**{**SIZES, **changes}))
    network.update(
        tree_map(lambda a: mx.random.normal(a.shape) * (0.5 if a.ndim == 1 else a.shape[-1] ** -0.5), network.parameters())
    )
    mx.eval(network.parameters())
    return network


def model_config_of(config: SpaceByteConfig) -> dict[str, Any]:
    """Its model_config, with what marlin does not read."""
    grouped = config.global_kv_heads not in (None, config.global_heads)
    return {
        "vocab_size": config.vocab_size, "BOS": config.start_id, "tokenizer": None, "d_model": config.global_dim,
        "context_size": config.ids, "d_key": config.global_stage.width_of_head, "d_ff_mult": 2,
        "n_layers": config.global_layers,
        "tie_embedding": False, "qk_layer_norm": config.qk_norm, "init": "simple", "nonlinear": ACTIVATIONS[config.ffn],
        "rope": config.positions == "learned+rope", "position_encoding": True,
        "attention_groups": config.global_kv_heads if grouped else None, "attention_window": config.global_window,
        "sparse_attention": None, "layer_norm": NORMS[config.norm], "patch_method": config.patch_rule,
        "global_context_size": config.max_patches, "d_local": config.local_dim, "n_initial_layers": config.initial_layers,
        "n_local_layers": config.initial_layers + config.final_layers, "local_attention_window": config.local_window,
        "print_patches": 0,
    }  # fmt: skip


def tensors_of(network: SpaceByte) -> dict[str, np.ndarray]:
    """Its tensors under its authors' names."""
    found = {
        "token_embedding.weight": network.byte_embedding.weight,
        "local_position_encoding": network.local_positions.weight,
        "global_position_encoding": network.global_positions.weight,
        "logits.layer_norm.scale": network.norm.weight,
        "logits.logits_linear.weight": network.output.weight,
    }
    for stack in ("initial", "global", "final"):
        for index, layer in enumerate(network[stack].layers):
            own, attention = f"{stack}_blocks.{index}", layer.attention
            keys = [attention.k_proj.weight, attention.v_proj.weight]
            if attention.kv_heads == attention.heads:
                found[f"{own}.attention.QKV_linear.weight"] = mx.concatenate([attention.q_proj.weight, *keys])
            else:
                found[f"{own}.attention.Q_linear.weight"] = attention.q_proj.weight
                found[f"{own}.attention.KV_linear.weight"] = mx.concatenate(keys)
            found |= {
                f"{own}.attention.layer_norm.scale": layer.attention_norm.weight,
                f"{own}.attention.linear.weight": attention.o_proj.weight,
                f"{own}.feedforward.layer_norm.scale": layer.ffn_norm.weight,
                f"{own}.feedforward.linear_1.weight": layer.ffn.up_proj.weight,
                f"{own}.feedforward.linear_2.weight": layer.ffn.down_proj.weight,
            }
            for letter, name in (("Q", "q_norm"), ("K", "k_norm")):
                if name in attention:
                    found[f"{own}.attention.{letter}_layer_norm.scale"] = attention[name].weight
    return {name: np.array(array.astype(mx.float32)) for name, array in found.items()}


def spacebyte_file(path: Path, network: SpaceByte, change: Any = None, **changes: Any) -> Path:
    """A ckpt.pt; `change` may change the tensors, `changes` are of model_config."""
    tensors = tensors_of(network)
    if change is not None:
        change(tensors)
    return write_zip(
        path,
        {
            "model": "SpaceByte",
            "model_config": {**model_config_of(network.config), **changes},
            "state_dict": {name: tensor(array) for name, array in tensors.items()},
            "iter_num": 7,
        },
    )
