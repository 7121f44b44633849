"""Random Byte Latent Transformers, and folders of them as transformers writes them."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from safetensors.numpy import save_file

from marlin_cli.models.blt import Blt
from marlin_cli.models.blt_config import BltConfig, StackConfig

SIZES: dict[str, Any] = {
    "patcher": StackConfig(32, 64, 2, 2, rope_theta=1e4),
    "encoder": StackConfig(32, 48, 2, 1),
    "patches": StackConfig(64, 96, 2, 2),
    "decoder": StackConfig(32, 64, 4, 2),
    "patcher_window": 24, "local_window": 16, "hash_lengths": (3, 4), "hash_buckets": 97, "max_bytes": 255,
}  # fmt: skip

OF_BLOCK = {
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attention.q_proj": "self_attn.q_proj", "attention.k_proj": "self_attn.k_proj", "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.o_proj", "ffn.gate_proj": "mlp.gate_proj", "ffn.up_proj": "mlp.up_proj",
    "ffn.down_proj": "mlp.down_proj",
}  # fmt: skip


def random_blt(seed: int = 0, threshold: float | None = None, **changes: Any) -> Blt:
    """A network whose every parameter is random; patches end after half of the bytes unless a threshold says otherwise."""
    mx.random.seed(seed)
    config = BltConfig(**{**SIZES, **changes})
    network = Blt(config)
    network.update(
        tree_map(lambda a: mx.random.normal(a.shape) * (0.5 if a.ndim == 1 else a.shape[-1] ** -0.5), network.parameters())
    )
    network.patcher.output.weight = 4 * network.patcher.output.weight  # so that entropies differ
    entropies = network.patcher(network.led(mx.random.randint(0, 256, (1, 200)) + 4))
    middle = float(mx.sort(entropies[0])[int(0.6 * entropies.shape[1])]) if threshold is None else threshold
    network.config = BltConfig(**{**SIZES, **changes, "threshold": round(middle, 3)})
    mx.eval(network.parameters())
    return network


def document_of(config: BltConfig, **changes: Any) -> dict[str, Any]:
    """Its config.json as transformers 5.24 writes it, with what marlin does not read."""

    def part(stack: StackConfig, name: str, **own: Any) -> dict[str, Any]:
        return {
            "model_type": f"blt_{name}", "hidden_size": stack.d_model, "intermediate_size": stack.ffn_dim,
            "num_attention_heads": stack.heads, "num_key_value_heads": stack.heads, "num_hidden_layers": stack.layers,
            "rms_norm_eps": stack.norm_eps, "rope_parameters": {"rope_type": "default", "rope_theta": stack.rope_theta},
            "hidden_act": "silu", "dropout": 0.0, "initializer_range": 0.02, "max_position_embeddings": config.max_bytes + 1,
            "vocab_size": config.vocab_size, "tie_word_embeddings": False, **own,
        }  # fmt: skip

    wide = {"hidden_size_global": config.patches.d_model, "cross_attn_k": config.patch_rows}
    return {
        "model_type": "blt", "architectures": ["BltForCausalLM"], "vocab_size": config.vocab_size,
        "max_position_embeddings": 4096, "patch_in_forward": True, "patch_size": 4, "patching_mode": "entropy",
        "patching_threshold": config.threshold, "patching_batch_size": 1, "max_patch_length": config.max_patch_bytes,
        "local_attention_window_len": config.local_window, "cross_attn_k": config.patch_rows,
        "encoder_hash_byte_group_size": list(config.hash_lengths), "encoder_hash_byte_group_vocab": config.hash_buckets,
        "encoder_hash_byte_group_nb_functions": config.hash_functions, "tie_word_embeddings": False, "realtime_patching": True,
        "patcher_config": part(config.patcher, "patcher", sliding_window=config.patcher_window),
        "encoder_config": part(config.encoder, "local_encoder", cross_attn_all_layers=False, **wide),
        "decoder_config": part(config.decoder, "local_decoder", cross_attn_all_layers=config.cross_every_layer, **wide),
        "global_config": part(config.patches, "global_transformer"), **changes,
    }  # fmt: skip


def tensors_of(network: Blt) -> dict[str, np.ndarray]:
    """Its tensors under transformers' names."""
    found = {
        "lm_head.weight": network.output.weight,
        "model.encoder_hash_tok_embedding.weight": network.hash_embedding.weight,
        "model.patcher.embed_tokens.weight": network.patcher.embedding.weight,
        "model.patcher.norm.weight": network.patcher.norm.weight,
        "model.patcher.lm_head.weight": network.patcher.output.weight,
        "model.local_encoder.embed_tokens.weight": network.byte_encoder.embedding.weight,
        "model.local_encoder.patch_embedding_projection.weight": network.byte_encoder.patch_proj.weight,
        "model.local_decoder.patch_embedding_projection.weight": network.byte_decoder.patch_proj.weight,
        "model.local_decoder.norm.weight": network.byte_decoder.norm.weight,
    }
    if "input_proj" in network.patches:
        found["model.global_transformer.token_embedding_projection.weight"] = network.patches.input_proj.weight
    places = {
        "patcher": "patcher",
        "byte_encoder": "local_encoder",
        "patches": "global_transformer",
        "byte_decoder": "local_decoder",
    }
    for ours, theirs in places.items():
        for index, layer in enumerate(network[ours].layers):
            for name, source in OF_BLOCK.items():
                module = layer
                for part in name.split("."):
                    module = module[part]
                found[f"model.{theirs}.layers.{index}.{source}.weight"] = module.weight
    readers = {"local_encoder.cross_attn_layers.0": network.byte_encoder.reader}
    for index, reader in enumerate(network.byte_decoder.readers):
        readers[f"local_decoder.cross_attn_layers.{index}"] = reader
    for theirs, reader in readers.items():
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"):
            found[f"model.{theirs}.{name}.weight"] = reader[name].weight
    return {name: np.array(array.astype(mx.float32)) for name, array in found.items()}


def blt_folder(folder: Path, network: Blt, change: Any = None, **changes: Any) -> Path:
    """A folder of one file; `change` may change the tensors, `changes` are of config.json."""
    folder.mkdir()
    tensors = tensors_of(network)
    if change is not None:
        change(tensors)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(document_of(network.config, **changes)))
    return folder
