"""What checkpoints of kjslag/spacebyte's train.py have in common: the options of a model, and its blocks."""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import mlx.core as mx

from marlin_cli.checkpoints.foreign import Foreign, ImportOptions, Taken
from marlin_cli.config import from_mapping
from marlin_cli.errors import CheckpointError
from marlin_cli.text import quoted

ACTIVATIONS = {"ReLU": "relu", "GELU": "gelu_tanh", "SiLU": "silu"}
NORMS = {"LayerNorm": "layernorm", "RMSNorm": "variance"}  # its RMSNorm divides by the deviation, not the mean square


# Where queries and keys are normalised; its length is the width of a head.
QUERY_NORM = "global_blocks.0.attention.Q_layer_norm.scale"

FIRST_BYTE = 255  # what leads where there are no pads


@dataclass(frozen=True)
class TrainedConfig:
    """The options of a model_config that shapes do not tell, under their names there and with their defaults."""

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


Said = TypeVar("Said", bound=TrainedConfig)


def check_depths(foreign: Foreign, depths: Mapping[str, int]) -> None:
    """See that a checkpoint has as many layers as its own model_config names, by the option's name.

    Raises:
        CheckpointError: it has others.
    """
    told = foreign.beside.get("model_config")
    for option, found in depths.items():
        wanted = told.get(option) if isinstance(told, Mapping) else None
        if wanted is not None and wanted != found:
            raise CheckpointError(
                f"{foreign.path}: {option} of model_config is {quoted(wanted)}, its tensors have {found} layers; fetch it again"
            )


def said_of(cls: type[Said], foreign: Foreign, options: ImportOptions, width: int, window: str = "attention_window") -> Said:
    """The options of a checkpoint: its own model_config, else the importer's, else the constructor's defaults.

    Args:
        width: of the global transformer.
        window: the field that the import option attention_window is about.

    Raises:
        CheckpointError: a model_config that is no table of plain values, or tokens or attention that marlin does not run.
        ConfigError: an option with an unknown value.
    """
    path = foreign.path
    names = [field.name for field in dataclasses.fields(cls)]
    values: dict[str, Any] = {
        "d_key": options.head_dim or _revealed_head_dim(foreign, options, width),
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
        values[window] = options.attention_window or None
    found = from_mapping(cls, values, f"{path}: model_config")
    if found.sparse_attention:
        raise CheckpointError(f"{path}: was trained with sparse_attention, which marlin does not run")
    if found.tokenizer is not None:
        raise CheckpointError(f"{path}: was trained on tokens of {quoted(found.tokenizer)}; marlin runs models of bytes")
    return found


def _revealed_head_dim(foreign: Foreign, options: ImportOptions, width: int) -> int | None:
    if QUERY_NORM in foreign.tensors:
        return foreign.shape(QUERY_NORM, 1)[0]
    if options.heads is None:
        return None
    assert options.heads != "auto"  # `read_checkpoint` asks for a number
    if options.heads < 1 or width % options.heads:
        raise CheckpointError(f"{foreign.path}: {quoted(options.heads)} heads do not divide a width of {width}")
    return width // options.heads


def _their_name(foreign: Foreign, option: str, names: Mapping[str, str], value: str | None) -> str | None:
    if value is None:
        return None
    ours = {ours: theirs for theirs, ours in names.items()}
    if value not in ours:
        raise CheckpointError(f"{foreign.path}: {option} {quoted(value)} is not one of {', '.join(ours)}")
    return ours[value]


def vocab_of(path: Path, said: TrainedConfig, rows: int) -> int:
    """Ids of a model whose embeddings have so many rows.

    Raises:
        CheckpointError: model_config says more of them, or none.
    """
    if said.vocab_size is None:
        return rows
    if not 1 <= said.vocab_size <= rows:
        raise CheckpointError(
            f"{path}: vocab_size of model_config is {quoted(said.vocab_size)}, the embeddings have {rows} rows"
        )
    return said.vocab_size


def scale_of(said: TrainedConfig, head_dim: int, *, qk_norm: bool) -> float | None:
    """The scale of attention where it is not head_dim ** -0.5."""
    # Its muTransfer multiplies queries by head_dim ** -0.5 before an attention that does so too.
    return 1.0 / head_dim if said.init == "muTransfer" and not qk_norm else None


def key_width_of(foreign: Foreign, block: str, width: int) -> int:
    """Width of the keys of the block `block`, whose queries are `width` wide; the two differ in grouped attention."""
    grouped = f"{block}.attention.KV_linear.weight"
    return foreign.shape(grouped, 2)[0] // 2 if grouped in foreign.tensors else width


def take_block(weights: dict[str, mx.array], taken: Taken, source: str, target: str, width: int, key_width: int) -> None:
    """Put the weights of the block `source` under `target`; its queries are `width` wide, its keys `key_width`."""
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


def depth(tensors: Mapping[str, Any], kind: str) -> int:
    """Blocks of a transformer that there are tensors of."""
    return len({match[1] for name in tensors if (match := re.match(rf"{kind}_blocks\.([0-9]+)\.", name))})
