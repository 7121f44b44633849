"""Checkpoints of the paper's layout as kjslag/spacebyte trains it (megabyte.py, class MegaByte)."""

import re
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from marlin_cli.checkpoints.foreign import Checkpoint, Foreign, ImportOptions, Taken
from marlin_cli.errors import CheckpointError

# The options of its model_config that change what weights mean, with its constructor's defaults.
DEFAULTS: dict[str, Any] = {
    "nonlinear": "ReLU",
    "layer_norm": "LayerNorm",
    "rope": False,
    "attention_window": None,
    "init": "simple",
    "qk_layer_norm": True,
    "vocab_size": None,
    "BOS": 255,
    "d_key": 64,
    "sparse_attention": None,
}
ACTIVATIONS = {"ReLU": "relu", "GELU": "gelu_tanh", "SiLU": "silu"}
NORMS = {"LayerNorm": "layernorm", "RMSNorm": "variance"}


def recognises(tensors: Mapping[str, Any]) -> bool:
    """Do the names say spacebyte's MegaByte?"""
    return "global_token_embedding.weight" in tensors and "local_token_embedding.weight" in tensors


def read(foreign: Foreign, options: ImportOptions) -> Checkpoint:
    """Canonical configuration and weights.

    Its ckpt.pt says every option under `model_config`. A bare state dict reveals widths, depths, patch size, heads
    (where queries and keys are normalised), grouped attention and pads; the rest comes from `options`, or is as its
    constructor has it.

    Raises:
        CheckpointError: tensors that are missing, left over or of shapes that do not fit, or sparse attention.
    """
    path, tensors = foreign.path, foreign.tensors
    said = _said(foreign, options)
    taken = Taken(foreign)
    total, byte_dim = _two(foreign, "global_position_encoding")
    patch_size, local_dim = _two(foreign, "local_position_encoding")
    vocab_rows, _ = _two(foreign, "global_token_embedding.weight")
    dim = byte_dim * patch_size
    head_dim = said["d_key"]
    if said["sparse_attention"]:
        raise CheckpointError(f"{path}: has sparse_attention, which marlin does not run")
    if said["init"] not in ("standard", "muTransfer", "simple"):
        raise CheckpointError(f"{path}: init {said['init']!r} is unknown")
    qk_norm = "global_blocks.0.attention.Q_layer_norm.scale" in tensors
    if dim % head_dim or local_dim % head_dim:
        raise CheckpointError(f"{path}: heads of {head_dim} do not divide {dim} and {local_dim}; give --head-dim")
    grouped = "global_blocks.0.attention.KV_linear.weight" in tensors
    kv_heads = _two(foreign, "global_blocks.0.attention.KV_linear.weight")[0] // (2 * head_dim) if grouped else None
    layers = {kind: _depth(tensors, kind) for kind in ("global", "local")}
    vocab = said["vocab_size"] or vocab_rows
    config = {
        "model_type": "megabyte",
        "layout": "paper",
        "patch_size": patch_size,
        "max_bytes": total,
        "vocab_size": vocab,
        "byte_dim": byte_dim,
        "ffn": _choice(path, "activation", ACTIVATIONS, said["nonlinear"]),
        "norm": _choice(path, "norm", NORMS, said["layer_norm"]),
        "norm_eps": 1e-5,
        "qk_norm": qk_norm,
        "rope_interleaved": True,
        "start_tokens": "global_pad" in tensors,
        "bos_byte": said["BOS"],
    }
    if said["attention_window"] is not None:
        config["attention_window"] = said["attention_window"]
    if said["init"] == "muTransfer" and not qk_norm:
        config["attention_scale"] = 1.0 / head_dim
    weights: dict[str, mx.array] = {}
    for kind, width in (("global", dim), ("local", local_dim)):
        config.update(
            {
                f"{kind}_layers": layers[kind],
                f"{kind}_dim": width,
                f"{kind}_heads": width // head_dim,
                f"{kind}_head_dim": head_dim,
                f"{kind}_ffn_dim": _two(foreign, f"{kind}_blocks.0.feedforward.linear_1.weight")[0],
                f"{kind}_positions": "learned+rope" if said["rope"] else "learned",
            }
        )
        if kv_heads is not None:
            config[f"{kind}_kv_heads"] = kv_heads
        for layer in range(layers[kind]):
            _take_block(weights, taken, f"{kind}_blocks.{layer}", f"{kind}.layers.{layer}", width)
    for target, source in (
        ("byte_embedding.weight", "global_token_embedding.weight"),
        ("global_positions.weight", "global_position_encoding"),
        ("global_to_local.weight", "global_to_local.weight"),
        ("global_to_local.bias", "global_to_local.bias"),
        ("local_byte_embedding.weight", "local_token_embedding.weight"),
        ("local_positions.weight", "local_position_encoding"),
        ("local.norm.weight", "logits.layer_norm.scale"),
    ):
        weights[target] = taken.take(source)
    if config["start_tokens"]:
        weights["global_start"], weights["local_start"] = taken.take("global_pad"), taken.take("local_pad")
    # The head is padded to a multiple of 64 rows that no id has.
    weights["output.weight"] = taken.take("logits.logits_linear.weight")[:vocab]
    taken.finish()
    return Checkpoint(path, "paper", config, weights)


def _said(foreign: Foreign, options: ImportOptions) -> dict[str, Any]:
    """The options of a checkpoint: its own model_config, else the importer's, else the constructor's defaults."""
    config = foreign.beside.get("model_config")
    if config is not None:
        if not isinstance(config, dict):
            raise CheckpointError(f"{foreign.path}: its model_config is not a table")
        return {key: config.get(key, default) for key, default in DEFAULTS.items()}
    said = dict(DEFAULTS)
    scale = foreign.tensors.get("global_blocks.0.attention.Q_layer_norm.scale")
    said["d_key"] = scale.shape[0] if scale is not None else options.head_dim or said["d_key"]
    wanted = {
        "nonlinear": _key_of(ACTIVATIONS, options.activation),
        "layer_norm": _key_of(NORMS, options.norm),
        "rope": options.rope,
        "attention_window": options.attention_window,
    }
    said.update({key: value for key, value in wanted.items() if value is not None})
    return said


def _take_block(weights: dict[str, mx.array], taken: Taken, source: str, target: str, width: int) -> None:
    attention = f"{source}.attention"
    weights[f"{target}.attention_norm.weight"] = taken.take(f"{attention}.layer_norm.scale")
    if taken.has(f"{attention}.QKV_linear.weight"):
        queries, keys, values = mx.split(taken.take(f"{attention}.QKV_linear.weight", (3 * width, width)), 3, axis=0)
    else:
        queries = taken.take(f"{attention}.Q_linear.weight", (width, width))
        keys, values = mx.split(taken.take(f"{attention}.KV_linear.weight"), 2, axis=0)
    for name, weight in (("q_proj", queries), ("k_proj", keys), ("v_proj", values)):
        weights[f"{target}.attention.{name}.weight"] = weight
    weights[f"{target}.attention.o_proj.weight"] = taken.take(f"{attention}.linear.weight", (width, width))
    for name, letter in (("q_norm", "Q"), ("k_norm", "K")):
        if taken.has(f"{attention}.{letter}_layer_norm.scale"):
            weights[f"{target}.attention.{name}.weight"] = taken.take(f"{attention}.{letter}_layer_norm.scale")
    weights[f"{target}.ffn_norm.weight"] = taken.take(f"{source}.feedforward.layer_norm.scale")
    weights[f"{target}.ffn.up_proj.weight"] = taken.take(f"{source}.feedforward.linear_1.weight")
    weights[f"{target}.ffn.down_proj.weight"] = taken.take(f"{source}.feedforward.linear_2.weight")


def _choice(path: object, name: str, known: Mapping[str, str], value: Any) -> str:
    if value not in known:
        raise CheckpointError(f"{path}: {name} {value!r} is not one of {', '.join(known)}")
    return known[value]


def _key_of(known: Mapping[str, str], value: str | None) -> str | None:
    return next((key for key, name in known.items() if name == value), value)


def _depth(tensors: Mapping[str, Any], kind: str) -> int:
    return len({match[1] for name in tensors if (match := re.match(rf"{kind}_blocks\.(\d+)\.", name))})


def _two(foreign: Foreign, name: str) -> tuple[int, int]:
    tensor = foreign.tensors.get(name)
    if tensor is None or tensor.ndim != 2:
        found = "missing" if tensor is None else f"of {tensor.ndim} dimensions"
        raise CheckpointError(f"{foreign.path}: the tensor {name!r} is {found}, expected two dimensions")
    rows, columns = tensor.shape
    return rows, columns
