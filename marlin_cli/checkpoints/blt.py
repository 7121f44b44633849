"""Folders of Byte Latent Transformers as transformers writes them: config.json with four parts, and safetensors in shards."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from marlin_cli.checkpoints import hugging_face
from marlin_cli.checkpoints.foreign import Checkpoint, Foreign, Taken, read_object
from marlin_cli.checkpoints.llama_names import NORMS_OF_BLOCK, OF_BLOCK
from marlin_cli.checkpoints.t5_ends import CONFIG
from marlin_cli.checkpoints.transformers_folder import check_layers, has_model_type, number, tensors_of_model
from marlin_cli.config import describe
from marlin_cli.errors import ConfigError
from marlin_cli.text import quoted

MODEL_TYPE = "blt"

# The parts of its config.json -> marlin's, with the numbers of their classes where a file leaves them out: width,
# feed-forward (None: 8/3 of the width), heads, layers, base of the positions, bytes or patches at most.
STACKS: dict[str, tuple[str, tuple[int, int | None, int, int, float, int]]] = {
    "patcher_config": ("patcher", (768, 2048, 12, 14, 1e4, 8192)),
    "encoder_config": ("encoder", (1024, None, 16, 1, 5e5, 24576)),
    "global_config": ("patches", (2048, 5632, 16, 25, 5e5, 4096)),
    "decoder_config": ("decoder", (1024, 2816, 16, 9, 5e5, 24576)),
}

# What its code has other branches for, and no released model another value; the first stands where a file says nothing.
WANTED: dict[str, tuple[Any, ...]] = {
    "patch_in_forward": (True,),
    "patching_mode": ("entropy",),
    "tie_word_embeddings": (False,),
}
WANTED_OF_STACK: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
    "rope_scaling": (None,),
}

OF_READER = ("q_proj", "k_proj", "v_proj", "o_proj")

# The paths of the stacks -> their names there.
PLACES = {
    "patcher": "patcher",
    "byte_encoder": "local_encoder",
    "patches": "global_transformer",
    "byte_decoder": "local_decoder",
}


def recognises(path: Path) -> bool:
    """Is this a folder of a Byte Latent Transformer, and not marlin's own?"""
    return has_model_type(path, (MODEL_TYPE,)) and "hash_buckets" not in read_object(_folder(path) / CONFIG)


def read(path: Path) -> Checkpoint:
    """Canonical configuration and weights. Nothing but small weights is read from the files before it is used.

    Raises:
        CheckpointError: weights that are missing, left over or of shapes that do not fit together.
        ConfigError: a configuration that is not of such a model, or of a branch of its code that no released model takes.
    """
    where = _folder(path) / CONFIG
    document = read_object(where)
    config = config_from(document, where)
    foreign = tensors_of_model(path)
    check_layers(path, foreign, sum(config[name]["layers"] for name, _ in STACKS.values()))
    settled(config, foreign)
    every = _flag(_table(document, "encoder_config", where), "cross_attn_all_layers", False, where)
    # Patches are made anew in every layer of the encoder that has an attention for it: nothing reads any but the last.
    last = config["encoder"]["layers"] - 1 if every else 0
    unread = tuple(f"local_encoder.cross_attn_layers.{layer}." for layer in range(last))
    read = {name: each for name, each in foreign.tensors.items() if not name.startswith(unread)}
    taken = Taken(dataclasses.replace(foreign, tensors=read))
    weights = _weights(taken, config, last)
    taken.finish()
    return Checkpoint(path, MODEL_TYPE, config, weights, stored=taken.stored(weights))


def files(path: Path) -> list[Path]:
    """All files that a model consists of, those of its configuration first."""
    return hugging_face.files(path)


def config_from(document: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """marlin's fields of its config.json.

    Raises:
        ConfigError: values of another kind, or of a branch that no released model takes.
    """
    _check(document, WANTED, where, "")
    if "patch_size" in document and document["patch_size"] is None:
        raise ConfigError(f"{where}: patch_size is null, with which every byte is a patch; marlin knows patches by entropy")
    config: dict[str, Any] = {"model_type": MODEL_TYPE}
    most = []
    for theirs, (ours, defaults) in STACKS.items():
        config[ours], positions = _stack(_table(document, theirs, where), defaults, where, theirs)
        if ours != "patches":
            most.append(positions)
    config |= {
        "vocab_size": number(document, "vocab_size", 260, where),
        "patch_rows": number(document, "cross_attn_k", 2, where),
        "threshold": float(number(document, "patching_threshold", 1.335442066192627, where)),
        "hash_lengths": _lengths(document, where),
        "hash_functions": number(document, "encoder_hash_byte_group_nb_functions", 1, where),
        "hash_buckets": number(document, "encoder_hash_byte_group_vocab", 500002, where),
        "start_id": number(document, "bos_token_id", 1, where),
        "max_patch_bytes": None if document.get("max_patch_length") is None else number(document, "max_patch_length", 0, where),
        # Null says that all is seen.
        "local_window": _window(document, "local_attention_window_len", where),
        "patcher_window": _window(_table(document, "patcher_config", where), "sliding_window", where),
        "cross_every_layer": _flag(_table(document, "decoder_config", where), "cross_attn_all_layers", True, where),
        # The mark before a text is one of its positions.
        "max_bytes": min(most) - 1,
    }
    ends = document.get("eos_token_id")
    config["end_ids"] = [2] if ends is None else ends if isinstance(ends, list) else [ends]
    for part in ("encoder_config", "decoder_config"):
        own = number(_table(document, part, where), "cross_attn_k", config["patch_rows"], where)
        if own != config["patch_rows"]:
            raise ConfigError(f"{where}: cross_attn_k of {part} is {quoted(own)}, that of the model {config['patch_rows']}")
    return config


def _weights(taken: Taken, config: Mapping[str, Any], last_reader: int) -> dict[str, mx.array]:
    local, vocab, count = config["encoder"]["d_model"], config["vocab_size"], config["patch_rows"]
    wide = config["patches"]["d_model"]
    rows = config["hash_functions"] * len(config["hash_lengths"]) * config["hash_buckets"]
    weights = {
        "hash_embedding.weight": taken.take("encoder_hash_tok_embedding.weight", (rows, local)),
        "output.weight": taken.take("lm_head.weight", (vocab, config["decoder"]["d_model"])),
        "patcher.embedding.weight": taken.take("patcher.embed_tokens.weight", (vocab, config["patcher"]["d_model"])),
        "patcher.norm.weight": taken.take("patcher.norm.weight"),
        "patcher.output.weight": taken.take("patcher.lm_head.weight"),
        "byte_encoder.embedding.weight": taken.take("local_encoder.embed_tokens.weight", (vocab, local)),
        "byte_encoder.patch_proj.weight": taken.take("local_encoder.patch_embedding_projection.weight", (count * local, local)),
        "byte_decoder.patch_proj.weight": taken.take("local_decoder.patch_embedding_projection.weight"),
        "byte_decoder.norm.weight": taken.take("local_decoder.norm.weight"),
    }
    if count * local != wide:
        weights["patches.input_proj.weight"] = taken.take("global_transformer.token_embedding_projection.weight")
    for ours, theirs in PLACES.items():
        stack = config[{"byte_encoder": "encoder", "byte_decoder": "decoder"}.get(ours, ours)]
        for layer in range(stack["layers"]):
            for name, source in (*NORMS_OF_BLOCK.items(), *OF_BLOCK.items()):
                weights[f"{ours}.layers.{layer}.{name}.weight"] = taken.take(f"{theirs}.layers.{layer}.{source}.weight")
    readers = {"byte_encoder.reader": f"local_encoder.cross_attn_layers.{last_reader}"}
    for number_of in range(config["decoder"]["layers"] if config["cross_every_layer"] else 1):
        readers[f"byte_decoder.readers.{number_of}"] = f"local_decoder.cross_attn_layers.{number_of}"
    for ours, theirs in readers.items():
        for name in (*OF_READER, "q_norm", "k_norm"):
            weights[f"{ours}.{name}.weight"] = taken.take(f"{theirs}.{name}.weight")
    return weights


def settled(config: dict[str, Any], foreign: Foreign) -> dict[str, Any]:
    """With the width of a feed-forward that config.json leaves open, of which releases of transformers think differently."""
    for ours, theirs in (("encoder", "local_encoder"), ("decoder", "local_decoder")):
        tensor = foreign.tensors.get(f"{theirs}.layers.0.mlp.up_proj.weight")
        if config[ours]["ffn_dim"] is None:
            config[ours]["ffn_dim"] = tensor.shape[0] if tensor is not None else 8 * config[ours]["d_model"] // 3
    return config


def _stack(
    table: Mapping[str, Any], defaults: tuple[int, int | None, int, int, float, int], where: Path, part: str
) -> tuple[dict[str, Any], int]:
    """marlin's fields of one part, and its positions."""
    width, ffn, heads, layers, theta, positions = defaults
    _check(table, WANTED_OF_STACK, where, f" of {part}")
    found: dict[str, Any] = {
        "d_model": number(table, "hidden_size", width, where),
        "heads": number(table, "num_attention_heads", heads, where),
        "layers": number(table, "num_hidden_layers", layers, where),
        "norm_eps": number(table, "rms_norm_eps", 1e-5, where),
    }
    own = ffn if table.get("intermediate_size") is None else number(table, "intermediate_size", 0, where)
    found["ffn_dim"] = own if own is not None or part == "encoder_config" else 8 * found["d_model"] // 3
    of_keys = number(table, "num_key_value_heads", found["heads"], where)
    if of_keys != found["heads"]:
        raise ConfigError(f"{where}: num_key_value_heads of {part} is {quoted(of_keys)}; marlin knows as many as heads")
    rope = table.get("rope_parameters")
    if rope is not None and (not isinstance(rope, Mapping) or rope.get("rope_type", "default") != "default"):
        raise ConfigError(f"{where}: rope_parameters of {part} is {quoted(rope)}; marlin knows rope_type 'default'")
    theta = number(table, "rope_theta", theta, where)
    found["rope_theta"] = float(theta if rope is None else number(rope, "rope_theta", theta, where))
    return found, number(table, "max_position_embeddings", positions, where)


def _check(table: Mapping[str, Any], wanted: Mapping[str, tuple[Any, ...]], where: Path, of: str) -> None:
    for name, allowed in wanted.items():
        value = table.get(name, allowed[0])
        if value is not None and not any(value is each or (value == each and type(value) is type(each)) for each in allowed):
            stands = "nothing" if allowed[0] is None else quoted(allowed[0])
            raise ConfigError(f"{where}: {name}{of} is {quoted(value)}; marlin knows a BLT with {stands} there")


def _table(document: Mapping[str, Any], name: str, where: Path) -> Mapping[str, Any]:
    value = document.get(name)
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {name} should be a table, found {describe(value)}")
    return value or {}


def _window(table: Mapping[str, Any], name: str, where: Path) -> int | None:
    """Bytes that a byte sees: 512 where a file says nothing, all where it says null."""
    return None if name in table and table[name] is None else int(number(table, name, 512, where))


def _flag(table: Mapping[str, Any], name: str, default: bool, where: Path) -> bool:
    value = table.get(name)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{where}: {name} should be true or false, found {describe(value)}")
    return default if value is None else value


def _lengths(document: Mapping[str, Any], where: Path) -> list[Any]:
    value = document.get("encoder_hash_byte_group_size")
    if value is not None and (not isinstance(value, list) or not all(type(each) is int for each in value)):
        raise ConfigError(f"{where}: encoder_hash_byte_group_size should be a list of numbers, found {describe(value)}")
    return list(value or [3, 4, 5, 6, 7, 8])


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent
