"""Checkpoints of the paper's layout as kjslag/spacebyte trains it (megabyte.py, class MegaByte)."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx

from marlin_cli.checkpoints.foreign import Checkpoint, Foreign, ImportOptions, Taken, heads_of_width
from marlin_cli.config import from_mapping
from marlin_cli.errors import CheckpointError
from marlin_cli.text import quoted

MARKER = "global_token_embedding.weight"  # a name that every one has, wherever it stands in a file

ACTIVATIONS = {"ReLU": "relu", "GELU": "gelu_tanh", "SiLU": "silu"}
NORMS = {"LayerNorm": "layernorm", "RMSNorm": "variance"}  # its RMSNorm divides by the deviation, not the mean square


# Where queries and keys are normalised; its length is the width of a head.
QUERY_NORM = "global_blocks.0.attention.Q_layer_norm.scale"

FIRST_BYTE = 255  # what leads where there are no pads


@dataclass(frozen=True)
class ModelConfig:
    """The options of its model_config that shapes do not tell, under its names and with its defaults."""

    d_key: int = 64
    vocab_size: int | None = None
    BOS: int | None = None
    tokenizer: str | None = None
    init: Literal["simple", "standard", "muTransfer"] = "simple"
    nonlinear: Literal["ReLU", "GELU", "SiLU"] = "ReLU"
    layer_norm: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    rope: bool = False
    attention_window: int | None = None
    sparse_attention: bool | None = None


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
    said = _said(foreign, options)
    assumed = dict(foreign.assumed)
    if said.sparse_attention:
        raise CheckpointError(f"{path}: was trained with sparse_attention, which marlin does not run")
    if said.tokenizer is not None:
        raise CheckpointError(f"{path}: was trained on tokens of {quoted(said.tokenizer)}; marlin runs models of bytes")
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
    vocab_size = vocab_rows if said.vocab_size is None else said.vocab_size
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
        # Its muTransfer multiplies queries by head_dim ** -0.5 before an attention that does so too.
        "attention_scale": 1.0 / head_dim if said.init == "muTransfer" and not qk_norm else None,
    }
    told = foreign.beside.get("model_config") or {}
    if "init" not in told and options.attention_scale is not None:
        config["attention_scale"] = options.attention_scale
    assumed |= _assumed(config, options, told, widths["global"] // head_dim, rope=said.rope)
    taken = Taken(foreign)
    weights: dict[str, mx.array] = {}
    for kind, width in widths.items():
        layers = _depth(foreign.tensors, kind)
        block = f"{kind}_blocks.0"
        grouped = f"{block}.attention.KV_linear.weight"
        key_width = foreign.shape(grouped, 2)[0] // 2 if grouped in foreign.tensors else width
        config[f"{kind}_layers"] = layers
        config[f"{kind}_dim"] = width
        config[f"{kind}_heads"] = width // head_dim
        config[f"{kind}_head_dim"] = head_dim
        config[f"{kind}_kv_heads"] = key_width // head_dim
        config[f"{kind}_ffn_dim"] = foreign.shape(f"{block}.feedforward.linear_1.weight", 2)[0]
        config[f"{kind}_positions"] = "learned+rope" if said.rope else "learned"
        for layer in range(layers):
            _take_block(weights, taken, f"{kind}_blocks.{layer}", f"{kind}.layers.{layer}", width, key_width)
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
        return [max(width // max(_said(foreign, ImportOptions()).d_key, 1), 1)]
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


def _said(foreign: Foreign, options: ImportOptions) -> ModelConfig:
    """The options of a checkpoint: its own model_config, else the importer's, else the constructor's defaults."""
    path = foreign.path
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    values: dict[str, Any] = {
        "d_key": options.head_dim or _revealed_head_dim(foreign, options),
        "nonlinear": _their_name(foreign, "activation", ACTIVATIONS, options.activation),
        "layer_norm": _their_name(foreign, "norm", NORMS, options.norm),
        "rope": options.rope,
        "BOS": options.bos_byte,
    }
    values = {name: value for name, value in values.items() if value is not None}
    config = foreign.beside.get("model_config")
    if config is not None:
        if not isinstance(config, dict):
            raise CheckpointError(f"{path}: its model_config is a {type(config).__name__}, expected a table")
        said = {name: config[name] for name in names if name in config}
        for name, value in said.items():
            if not isinstance(value, (str, int, float, type(None))):
                raise CheckpointError(f"{path}: its model_config has a {type(value).__name__} as {quoted(name)}")
        values |= said
    if options.attention_window is not None:
        values["attention_window"] = options.attention_window or None
    return from_mapping(ModelConfig, values, f"{path}: model_config")


def _revealed_head_dim(foreign: Foreign, options: ImportOptions) -> int | None:
    if QUERY_NORM in foreign.tensors:
        return foreign.shape(QUERY_NORM, 1)[0]
    if options.heads is None:
        return None
    assert options.heads != "auto"  # `read_checkpoint` asks for a number
    width = _width(foreign)
    if options.heads < 1 or width % options.heads:
        raise CheckpointError(f"{foreign.path}: {quoted(options.heads)} heads do not divide a width of {width}")
    return width // options.heads


def _width(foreign: Foreign) -> int:
    return foreign.shape("global_position_encoding", 2)[1] * foreign.shape("local_position_encoding", 2)[0]


def _their_name(foreign: Foreign, option: str, names: Mapping[str, str], value: str | None) -> str | None:
    if value is None:
        return None
    ours = {ours: theirs for theirs, ours in names.items()}
    if value not in ours:
        raise CheckpointError(f"{foreign.path}: {option} {quoted(value)} is not one of {', '.join(ours)}")
    return ours[value]


def _take_block(weights: dict[str, mx.array], taken: Taken, source: str, target: str, width: int, key_width: int) -> None:
    attention = f"{source}.attention"
    weights[f"{target}.attention_norm.weight"] = taken.take(f"{attention}.layer_norm.scale")
    if taken.has(f"{attention}.QKV_linear.weight"):
        queries, keys, values = mx.split(taken.take(f"{attention}.QKV_linear.weight", (3 * width, width)), 3, axis=0)
    else:
        queries = taken.take(f"{attention}.Q_linear.weight", (width, width))
        keys, values = mx.split(taken.take(f"{attention}.KV_linear.weight", (2 * key_width, width)), 2, axis=0)
    for name, weight in (("q_proj", queries), ("k_proj", keys), ("v_proj", values)):
        weights[f"{target}.attention.{name}.weight"] = weight
    weights[f"{target}.attention.o_proj.weight"] = taken.take(f"{attention}.linear.weight", (width, width))
    for name, letter in (("q_norm", "Q"), ("k_norm", "K")):
        if taken.has(f"{attention}.{letter}_layer_norm.scale"):
            weights[f"{target}.attention.{name}.weight"] = taken.take(f"{attention}.{letter}_layer_norm.scale")
    weights[f"{target}.ffn_norm.weight"] = taken.take(f"{source}.feedforward.layer_norm.scale")
    weights[f"{target}.ffn.up_proj.weight"] = taken.take(f"{source}.feedforward.linear_1.weight")
    weights[f"{target}.ffn.down_proj.weight"] = taken.take(f"{source}.feedforward.linear_2.weight")


def _depth(tensors: Mapping[str, Any], kind: str) -> int:
    return len({match[1] for name in tensors if (match := re.match(rf"{kind}_blocks\.([0-9]+)\.", name))})
