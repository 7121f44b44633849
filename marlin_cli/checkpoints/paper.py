"""Checkpoints of the paper's layout as kjslag/spacebyte trains it (megabyte.py, class MegaByte)."""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from marlin_cli.checkpoints.foreign import Checkpoint, Foreign, ImportOptions, Taken, heads_of_width
from marlin_cli.checkpoints.spacebyte_training import (
    ACTIVATIONS,
    FIRST_BYTE,
    NORMS,
    QUERY_NORM,
    TrainedConfig,
    check_depths,
    depth,
    key_width_of,
    said_of,
    scale_of,
    take_block,
    vocab_of,
)
from marlin_cli.errors import CheckpointError
from marlin_cli.text import quoted

MARKER = "global_token_embedding.weight"  # a name that every one has, wherever it stands in a file


def recognises(tensors: Mapping[str, Any]) -> bool:
    """Do the names say spacebyte's MegaByte?"""
    return "global_token_embedding.weight" in tensors and "local_token_embedding.weight" in tensors


def read(foreign: Foreign, options: ImportOptions) -> Checkpoint:
    """Canonical configuration and weights.

    Its ckpt.pt says every option under `model_config`. A bare state dict reveals widths, depths, patch size, heads
    (where queries and keys are normalised), grouped attention and pads; the rest comes from `options`, or is as its
    constructor has it.

    A window is counted as its plain attention does, which the weights run with on a CPU: a patch sees so many before
    itself. With flash-attn it was trained to see one fewer; `options.attention_window` can say so.

    Raises:
        CheckpointError: tensors that are missing, left over or of shapes that do not fit, sparse attention, or
            tokens that are not bytes.
        ConfigError: an option of model_config with an unknown value.
    """
    path = foreign.path
    said = said_of(TrainedConfig, foreign, options, _width(foreign))
    assumed = dict(foreign.assumed)
    total, byte_dim = foreign.shape("global_position_encoding", 2)
    patch_size, local_dim = foreign.shape("local_position_encoding", 2)
    vocab_rows, _ = foreign.shape("global_token_embedding.weight", 2)
    widths = {"global": byte_dim * patch_size, "local": local_dim}
    head_dim = said.d_key
    if head_dim < 1 or any(width % head_dim for width in widths.values()):
        raise CheckpointError(
            f"{path}: heads {quoted(head_dim)} wide do not divide {widths['global']} and {local_dim}; give head_dim"
        )
    qk_norm = QUERY_NORM in foreign.tensors
    vocab_size = vocab_of(path, said, vocab_rows)
    config: dict[str, Any] = {
        "model_type": "megabyte",
        "layout": "paper",
        "patch_size": patch_size,
        "max_bytes": total,
        "vocab_size": vocab_size,
        "byte_dim": byte_dim,
        "ffn": ACTIVATIONS[said.nonlinear],
        "norm": NORMS[said.layer_norm],
        "norm_eps": 1e-5,
        "qk_norm": qk_norm,
        "rope_interleaved": True,
        "start_tokens": "global_pad" in foreign.tensors,
        "bos_byte": FIRST_BYTE if said.BOS is None else said.BOS,
        "attention_window": said.attention_window,
        "attention_scale": scale_of(said, head_dim, qk_norm=qk_norm),
    }
    told = foreign.beside.get("model_config") or {}
    if "init" not in told and options.attention_scale is not None:
        config["attention_scale"] = options.attention_scale
    assumed |= _assumed(config, options, told, widths["global"] // head_dim, rope=said.rope)
    taken = Taken(foreign)
    weights: dict[str, mx.array] = {}
    for kind, width in widths.items():
        layers = depth(foreign.tensors, kind)
        check_depths(foreign, {"n_layers" if kind == "global" else "n_local_layers": layers})
        block = f"{kind}_blocks.0"
        key_width = key_width_of(foreign, block, width)
        config[f"{kind}_layers"] = layers
        config[f"{kind}_dim"] = width
        config[f"{kind}_heads"] = width // head_dim
        config[f"{kind}_head_dim"] = head_dim
        config[f"{kind}_kv_heads"] = key_width // head_dim
        config[f"{kind}_ffn_dim"] = foreign.shape(f"{block}.feedforward.linear_1.weight", 2)[0]
        config[f"{kind}_positions"] = "learned+rope" if said.rope else "learned"
        for layer in range(layers):
            take_block(weights, taken, f"{kind}_blocks.{layer}", f"{kind}.layers.{layer}", width, key_width)
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
    weights["output.weight"] = taken.take("logits.logits_linear.weight")[:vocab_size]
    taken.finish()
    return Checkpoint(path, "paper", config, weights, assumed=assumed)


def possible_heads(foreign: Foreign) -> list[int]:
    """Numbers of heads that the shapes allow, the one that is revealed alone.

    Raises:
        CheckpointError: tensors that are missing or misshapen.
        ConfigError: an option of model_config with an unknown value.
    """
    width = _width(foreign)
    if foreign.beside.get("model_config") is not None or QUERY_NORM in foreign.tensors:
        return [max(width // max(said_of(TrainedConfig, foreign, ImportOptions(), width).d_key, 1), 1)]
    grouped = [f"{kind}_blocks.0.attention.KV_linear.weight" for kind in ("global", "local")]
    keys = [foreign.shape(name, 2)[0] // 2 for name in grouped if name in foreign.tensors]
    return heads_of_width(width, foreign.shape("local_position_encoding", 2)[1], *keys)


def _assumed(
    config: Mapping[str, Any], options: ImportOptions, told: Mapping[str, Any], heads: int, *, rope: bool
) -> dict[str, Any]:
    """Options that neither model_config (`told`) nor the caller tells, nor a shape."""
    values: dict[str, tuple[str, Any]] = {
        "activation": ("nonlinear", config["ffn"]),
        "norm": ("layer_norm", config["norm"]),
        "rope": ("rope", rope),
        "attention_window": ("attention_window", 0),
    }
    if not config["qk_norm"]:
        values["attention_scale"] = ("init", (config["byte_dim"] * config["patch_size"] // heads) ** -0.5)
        if options.head_dim is None:
            values["heads"] = ("d_key", heads)
    if not config["start_tokens"]:
        values["bos_byte"] = ("BOS", config["bos_byte"])
    return {name: value for name, (theirs, value) in values.items() if theirs not in told and getattr(options, name) is None}


def _width(foreign: Foreign) -> int:
    return foreign.shape("global_position_encoding", 2)[1] * foreign.shape("local_position_encoding", 2)[0]
