"""Random EvaBytes, and folders of them as the hub has them: shards, norms minus one, all prediction heads in one."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from safetensors.numpy import save_file

from marlin_cli.models.evabyte import EvaByte, EvaByteConfig

SIZES: dict[str, Any] = {
    "d_model": 64, "ffn_dim": 96, "heads": 2, "layers": 2, "window_bytes": 32, "chunk_bytes": 8, "prediction_heads": 3,
    "max_bytes": 255,
}  # fmt: skip

OF_BLOCK = {
    "attention.q_proj": "self_attn.q_proj", "attention.k_proj": "self_attn.k_proj", "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.o_proj", "ffn.gate_proj": "mlp.gate_proj", "ffn.up_proj": "mlp.up_proj",
    "ffn.down_proj": "mlp.down_proj",
}  # fmt: skip


def random_evabyte(seed: int = 0, **changes: Any) -> EvaByte:
    """A network whose every parameter is random."""
    mx.random.seed(seed)
    network = EvaByte(EvaByteConfig(**{**SIZES, **changes}))
    network.update(
        tree_map(lambda a: mx.random.normal(a.shape) * (0.5 if a.ndim == 1 else a.shape[-1] ** -0.5), network.parameters())
    )
    for layer in network.layers:  # chunks that are no plain means
        layer.attention.key_weigher = mx.random.normal(layer.attention.key_weigher.shape)
        layer.attention.value_weigher = mx.random.normal(layer.attention.value_weigher.shape)
    mx.eval(network.parameters())
    return network


def document_of(config: EvaByteConfig, **changes: Any) -> dict[str, Any]:
    """Its config.json as the hub has it, with what marlin does not read."""
    return {
        "model_type": "evabyte", "architectures": ["EvaByteForCausalLM"], "attention_bias": False, "attention_class": "eva",
        "attention_dropout": 0.0, "bos_token_id": config.start_id, "chunk_size": config.chunk_bytes,
        "eos_token_id": config.end_ids[0], "fp32_ln": False, "fp32_logits": True, "fp32_skip_add": True, "hidden_act": "silu",
        "hidden_size": config.d_model, "intermediate_size": config.ffn_dim, "max_position_embeddings": config.max_bytes + 1,
        "mixedp_attn": True, "norm_add_unit_offset": True, "num_attention_heads": config.heads, "num_chunks": None,
        "num_hidden_layers": config.layers, "num_key_value_heads": config.heads, "num_pred_heads": config.prediction_heads,
        "pad_token_id": 0, "rms_norm_eps": config.norm_eps, "rope_scaling": None, "rope_theta": config.rope_theta,
        "tie_word_embeddings": False, "vocab_size": config.vocab_size, "window_size": config.window_bytes, **changes,
    }  # fmt: skip


def tensors_of(network: EvaByte, offset: bool = True) -> dict[str, np.ndarray]:
    """Its tensors under the hub's names."""
    minus = 1 if offset else 0
    found = {
        "model.embed_tokens.weight": network.embedding.weight,
        "model.norm.weight": network.norm.weight - minus,
        "lm_head.weight": mx.concatenate(
            [network.output.weight, *([network.drafts.weight] if "drafts" in network else [])], axis=0
        ),
    }
    for index, layer in enumerate(network.layers):
        own = f"model.layers.{index}"
        found[f"{own}.input_layernorm.weight"] = layer.attention_norm.weight - minus
        found[f"{own}.post_attention_layernorm.weight"] = layer.ffn_norm.weight - minus
        for ours, theirs in OF_BLOCK.items():
            part, name = ours.split(".")
            found[f"{own}.{theirs}.weight"] = layer[part][name].weight
        for ours, theirs in (("key_weigher", "adaptive_mu_k"), ("value_weigher", "adaptive_phi")):
            found[f"{own}.self_attn.{theirs}"] = layer.attention[ours][None, :, None, None]
    return {name: np.array(array.astype(mx.float32)) for name, array in found.items()}


def evabyte_folder(folder: Path, network: EvaByte, change: Any = None, **changes: Any) -> Path:
    """A folder of two shards; `change` may change the tensors, `changes` are of config.json."""
    folder.mkdir()
    document = document_of(network.config, **changes)
    tensors = tensors_of(network, document["norm_add_unit_offset"])
    if change is not None:
        change(tensors)
    # As there, one shard has names with and without the prefix, the other those with it alone.
    shard_of = {name: 2 if name in ("lm_head.weight", "model.norm.weight") else 1 for name in tensors}
    names = {number: f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    for number, name in names.items():
        own = {each: np.ascontiguousarray(array) for each, array in tensors.items() if shard_of[each] == number}
        save_file(own, folder / name)
    index = {"metadata": {}, "weight_map": {each: names[number] for each, number in shard_of.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(document))
    return folder
