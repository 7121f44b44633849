"""Folders of EvaByte as its authors' code for transformers writes them: config.json, and safetensors in shards."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from marlin_cli.checkpoints import hugging_face
from marlin_cli.checkpoints.foreign import Checkpoint, Taken, read_object
from marlin_cli.checkpoints.llama_names import NORMS_OF_BLOCK, OF_BLOCK
from marlin_cli.checkpoints.t5_ends import CONFIG
from marlin_cli.checkpoints.transformers_folder import check_layers, has_model_type, known_fields, number, tensors_of_model
from marlin_cli.errors import CheckpointError, ConfigError
from marlin_cli.text import quoted

MODEL_TYPE = "evabyte"

# Its fields -> marlin's, with the values of its class where a file leaves them out.
FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 320),
    "hidden_size": ("d_model", 4096),
    "intermediate_size": ("ffn_dim", 11008),
    "num_attention_heads": ("heads", 32),
    "num_hidden_layers": ("layers", 32),
    "window_size": ("window_bytes", 512),
    "chunk_size": ("chunk_bytes", 256),
    "num_pred_heads": ("prediction_heads", 1),
    "rms_norm_eps": ("norm_eps", 1e-6),
    "rope_theta": ("rope_theta", 10000.0),
    "bos_token_id": ("start_id", 1),
}

# What its code has other branches for, and no released model another value; None stands for a field that is left out.
WANTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", None),
    "attention_class": ("eva",),
    "attention_bias": (False, None),
    "rope_scaling": (None,),
    "tie_word_embeddings": (False, None),
}

WEIGHERS = {"key_weigher": "adaptive_mu_k", "value_weigher": "adaptive_phi"}


def recognises(path: Path) -> bool:
    """Is this a folder of EvaByte, and not marlin's own?"""
    return has_model_type(path, (MODEL_TYPE,)) and "layers" not in read_object(_folder(path) / CONFIG)


def read(path: Path) -> Checkpoint:
    """Canonical configuration and weights. Nothing but small weights is read from the files before it is used.

    Raises:
        CheckpointError: weights that are missing, left over or of shapes that do not fit together.
        ConfigError: a configuration that is not of EvaByte, or of a branch of its code that no released model takes.
    """
    where = _folder(path) / CONFIG
    document = read_object(where)
    config = config_from(document, where)
    foreign = tensors_of_model(path)
    check_layers(path, foreign, config["layers"])
    taken = Taken(foreign)
    width, heads, vocab = config["d_model"], config["heads"], config["vocab_size"]
    offset = document.get("norm_add_unit_offset", False)
    if not isinstance(offset, bool):
        raise ConfigError(f"{where}: norm_add_unit_offset should be true or false, found {quoted(offset)}")
    weights = {"embedding.weight": taken.take("embed_tokens.weight", (vocab, width))}
    for layer in range(config["layers"]):
        ours = theirs = f"layers.{layer}"
        for name, source in NORMS_OF_BLOCK.items():
            weights[f"{ours}.{name}.weight"] = _gain(taken.take(f"{theirs}.{source}.weight", (width,)), offset)
        for name, source in OF_BLOCK.items():
            weights[f"{ours}.{name}.weight"] = taken.take(f"{theirs}.{source}.weight")
        for name, source in WEIGHERS.items():
            weigher = taken.take(f"{theirs}.self_attn.{source}")
            if heads < 1 or weigher.shape != (1, heads, 1, 1, width // heads):
                raise CheckpointError(
                    f"{path}: {quoted(f'{theirs}.self_attn.{source}')} has shape {list(weigher.shape)}, {heads} heads ask"
                    f" for {[1, heads, 1, 1, width // heads if heads > 0 else 0]}"
                )
            weights[f"{ours}.attention.{name}"] = weigher.reshape(heads, width // heads)
    weights["norm.weight"] = _gain(taken.take("norm.weight", (width,)), offset)
    further = config["prediction_heads"] - 1
    head = taken.take("lm_head.weight", ((further + 1) * vocab, width))
    weights["output.weight"] = head[:vocab]
    if further:
        weights["drafts.weight"] = head[vocab:]
    taken.finish()
    return Checkpoint(path, MODEL_TYPE, config, weights, stored=taken.stored(weights))


def config_from(document: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """marlin's fields of its config.json.

    Raises:
        ConfigError: values of another kind, or of a branch that no released model takes.
    """
    for name, allowed in WANTED.items():
        value = document.get(name)
        if not any(value is each or (value == each and type(value) is type(each)) for each in allowed):
            wanted = "nothing" if allowed[0] is None else quoted(allowed[0])
            raise ConfigError(f"{where}: {name} is {quoted(value)}; marlin knows EvaByte with {wanted} there")
    config = {"model_type": MODEL_TYPE, **known_fields(document, FIELDS, where)}
    heads = number(document, "num_key_value_heads", config["heads"], where)
    if heads != config["heads"]:
        raise ConfigError(f"{where}: num_key_value_heads is {quoted(heads)}; marlin knows EvaByte with as many as heads")
    ends = document.get("eos_token_id", 2)
    config["end_ids"] = ends if isinstance(ends, list) else [ends]
    # The mark before a text is one of its positions.
    config["max_bytes"] = number(document, "max_position_embeddings", 2048, where) - 1
    return config


def files(path: Path) -> list[Path]:
    """All files that a model consists of, those of its configuration first."""
    return hugging_face.files(path)


def _gain(weight: mx.array, offset: bool) -> mx.array:
    """A norm's gain, which may be stored minus one; in float32, where the sum keeps all digits of 16 bits."""
    return 1 + weight.astype(mx.float32) if offset else weight


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent
