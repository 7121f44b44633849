"""Checkpoints of SpaceByte as kjslag/spacebyte trains it (spacebyte.py, class SpaceByte)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

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

MARKER = "token_embedding.weight"  # a name that every one has, wherever it stands in a file

# The field of a configuration that each option of an import speaks of.
FIELD_OF_OPTION = {
    "heads": "global_heads",
    "head_dim": "global_head_dim",
    "max_bytes": "max_bytes",
    "activation": "ffn",
    "norm": "norm",
    "rope": "positions",
    "bos_byte": "start_id",
    "attention_scale": "attention_scale",
    "patch_rule": "patch_rule",
}
BEFORE_THE_FILE = ("attention_window",)  # the options that go before what a file says


@dataclass(frozen=True)
class SpaceConfig(TrainedConfig):
    """Those of a SpaceByte besides."""

    patch_method: Literal["utf8", "periodic"] = "utf8"
    local_attention_window: int | None = None
    tie_embedding: bool | None = None


def recognises(tensors: Mapping[str, Any]) -> bool:
    """Do the names say a SpaceByte?"""
    return MARKER in tensors and "local_position_encoding" in tensors and "global_position_encoding" in tensors


def read(foreign: Foreign, options: ImportOptions) -> Checkpoint:
    """Canonical configuration and weights.

    Its ckpt.pt says every option under `model_config`. A bare state dict reveals widths, depths, lengths, heads (where queries
    and keys are normalised), grouped attention and a tied head; the rest comes from `options`, or is as its constructor has it:
    a window as wide as the rows of bytes, patches by `utf8`.

    Windows are counted as its plain attention does, which the weights run with on a CPU: a byte sees so many before itself.
    With flash-attn it was trained to see one fewer; `options.attention_window` can say so of the window of bytes.

    Raises:
        CheckpointError: tensors that are missing, left over or of shapes that do not fit, sparse attention, or
            tokens that are not bytes.
        ConfigError: an option of model_config with an unknown value.
    """
    path, width = foreign.path, _width(foreign)
    max_patches = foreign.shape("global_position_encoding", 2)[0]
    ids, local = foreign.shape("local_position_encoding", 2)
    if ids < 2:
        raise CheckpointError(f"{path}: 'local_position_encoding' has one row, of the id before a text; bytes need more")
    rows, _ = foreign.shape(MARKER, 2)
    told = foreign.beside.get("model_config") or {}
    said = said_of(SpaceConfig, foreign, options, width, "local_attention_window")
    head_dim = said.d_key
    if head_dim < 1 or width % head_dim or local % head_dim:
        raise CheckpointError(f"{path}: heads {quoted(head_dim)} wide do not divide {width} and {local}; give head_dim")
    if "local_attention_window" not in told and options.attention_window is None:
        window: int | None = local
    else:
        window = said.local_attention_window
    qk_norm = QUERY_NORM in foreign.tensors
    scale = options.attention_scale if "init" not in told and options.attention_scale is not None else None
    vocab = vocab_of(path, said, rows)
    config: dict[str, Any] = {
        "model_type": "spacebyte",
        "vocab_size": vocab,
        "max_bytes": ids - 1,  # the id before a text is one of its positions
        "max_patches": max_patches,
        "patch_rule": said.patch_method if options.patch_rule is None or "patch_method" in told else options.patch_rule,
        "global_window": said.attention_window,
        "local_window": window,
        "positions": "learned+rope" if said.rope else "learned",
        "ffn": ACTIVATIONS[said.nonlinear],
        "norm": NORMS[said.layer_norm],
        "norm_eps": 1e-5,
        "qk_norm": qk_norm,
        "attention_scale": scale_of(said, head_dim, qk_norm=qk_norm) if scale is None else scale,
        "start_id": FIRST_BYTE if said.BOS is None else said.BOS,
    }
    layers_of = {stack: depth(foreign.tensors, stack) for stack in ("initial", "global", "final")}
    check_depths(
        foreign,
        {
            "n_layers": layers_of["global"],
            "n_initial_layers": layers_of["initial"],
            "n_local_layers": layers_of["initial"] + layers_of["final"],
        },
    )
    taken = Taken(foreign)
    weights = {
        "byte_embedding.weight": taken.take(MARKER)[:vocab],
        "local_positions.weight": taken.take("local_position_encoding"),
        "global_positions.weight": taken.take("global_position_encoding"),
        "norm.weight": taken.take("logits.layer_norm.scale", (local,)),
    }
    for name, stacks in (("global", ("global",)), ("local", ("initial", "final"))):
        wide = width if name == "global" else local
        block = next((f"{stack}_blocks.0" for stack in stacks if layers_of[stack]), f"{stacks[0]}_blocks.0")
        key_width = key_width_of(foreign, block, wide)
        config |= {f"{stack}_layers": layers_of[stack] for stack in stacks}
        config |= {
            f"{name}_dim": wide,
            f"{name}_heads": wide // head_dim,
            f"{name}_head_dim": head_dim,
            f"{name}_kv_heads": key_width // head_dim,
            f"{name}_ffn_dim": foreign.shape(f"{block}.feedforward.linear_1.weight", 2)[0],
        }
        for stack in stacks:
            for layer in range(layers_of[stack]):
                take_block(weights, taken, f"{stack}_blocks.{layer}", f"{stack}.layers.{layer}", wide, key_width)
    weights["output.weight"] = _head(taken, weights["byte_embedding.weight"], said, vocab)
    taken.finish()
    assumed = dict(foreign.assumed) | _assumed(config, options, told, head_dim)
    return Checkpoint(path, "spacebyte", config, weights, assumed=assumed)


def possible_heads(foreign: Foreign) -> list[int]:
    """Numbers of heads that the shapes allow, the one that is revealed alone.

    Raises:
        CheckpointError: tensors that are missing or misshapen.
        ConfigError: an option of model_config with an unknown value.
    """
    width = _width(foreign)
    if foreign.beside.get("model_config") is not None or QUERY_NORM in foreign.tensors:
        said = said_of(SpaceConfig, foreign, ImportOptions(), width, "local_attention_window")
        return [max(width // max(said.d_key, 1), 1)]
    keys = [tensor.shape[0] // 2 for name, tensor in foreign.tensors.items() if name.endswith(".KV_linear.weight")]
    return heads_of_width(width, foreign.shape("local_position_encoding", 2)[1], *keys)


def _head(taken: Taken, embedding: mx.array, said: SpaceConfig, vocab: int) -> mx.array:
    """The head, padded to a multiple of 64 rows that no id has; a tied one is a multiple of the embeddings."""
    if taken.has("logits.logits_linear.weight") or not said.tie_embedding:
        return taken.take("logits.logits_linear.weight")[:vocab]
    width = embedding.shape[1]
    return embedding * {"standard": 1.0, "muTransfer": 1 / width, "simple": width**-0.5}[said.init]


def _assumed(config: Mapping[str, Any], options: ImportOptions, told: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """Options that neither model_config (`told`) nor the caller tells, nor a shape."""
    values: dict[str, tuple[str, Any]] = {
        "activation": ("nonlinear", config["ffn"]),
        "norm": ("layer_norm", config["norm"]),
        "rope": ("rope", config["positions"] == "learned+rope"),
        "attention_window": ("local_attention_window", config["local_window"]),
        "patch_rule": ("patch_method", config["patch_rule"]),
        "bos_byte": ("BOS", config["start_id"]),
    }
    if not config["qk_norm"]:
        values["attention_scale"] = ("init", config["attention_scale"] or head_dim**-0.5)
        if options.head_dim is None:
            values["heads"] = ("d_key", config["global_heads"])
    return {name: value for name, (theirs, value) in values.items() if theirs not in told and getattr(options, name) is None}


def _width(foreign: Foreign) -> int:
    return foreign.shape("global_position_encoding", 2)[1]
