"""transformers' folders of CANINE: google/canine-s and -c, and what was tuned from them, with one of four heads."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from marlin_cli.checkpoints import hugging_face
from marlin_cli.checkpoints.foreign import Checkpoint, Foreign, Taken, read_object
from marlin_cli.checkpoints.labels import labels_of
from marlin_cli.checkpoints.t5_ends import CONFIG
from marlin_cli.checkpoints.transformers_folder import Fields, check_layers, has_model_type, known_fields, tensors_of
from marlin_cli.errors import CheckpointError, ConfigError
from marlin_cli.text import quoted

MODEL_TYPE = "canine"
PREFIX = "canine."  # before all names but the head's, in models with a head

FIELDS: Fields = {
    "hidden_size": ("d_model", 768),
    "num_hidden_layers": ("layers", 12),
    "num_attention_heads": ("heads", 12),
    "intermediate_size": ("ffn_dim", 3072),
    "layer_norm_eps": ("norm_eps", 1e-12),
    "max_position_embeddings": ("max_characters", 16384),
    "type_vocab_size": ("types", 16),
    "downsampling_rate": ("downsample_factor", 4),
    "upsampling_kernel_size": ("upsample_width", 4),
    "num_hash_functions": ("hash_functions", 8),
    "num_hash_buckets": ("hash_buckets", 16384),
    "local_transformer_stride": ("block_characters", 128),
}

# transformers' names of activations -> marlin's.
ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip

# transformers' classes -> the head they have.
HEADS = {
    "CanineModel": "none",
    "CanineForSequenceClassification": "sequence",
    "CanineForTokenClassification": "token",
    "CanineForQuestionAnswering": "answer",
    "CanineForMultipleChoice": "choice",
}

PROBLEMS = {
    "single_label_classification": "one_label",
    "multi_label_classification": "several_labels",
    "regression": "regression",
}

# The head's layer, by what stands in the file.
OUTPUTS = ("classifier", "qa_outputs")

# Buffers that are computed anew: older files and LA-CANINE's hold them.
BUFFER = re.compile(r"(^|\.)(position_ids|attention\.self\.bias)$")

# marlin's layers of a block -> transformers'.
LINEARS = {
    "attention.q_proj": "attention.self.query",
    "attention.k_proj": "attention.self.key",
    "attention.v_proj": "attention.self.value",
    "attention.o_proj": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "ffn.up_proj": "intermediate.dense",
    "ffn.down_proj": "output.dense",
    "ffn_norm": "output.LayerNorm",
}


def recognises(path: Path) -> bool:
    """Is this a folder of transformers' CANINE, or a weights file in one? marlin's own has `d_model` in config.json."""
    return has_model_type(path, (MODEL_TYPE,)) and not is_native(path)


def is_native(path: Path) -> bool:
    """Does config.json have marlin's names of the fields, not transformers'?"""
    return "d_model" in read_object((path if path.is_dir() else path.parent) / CONFIG)


def read(path: Path) -> Checkpoint:
    """Canonical configuration and weights.

    Raises:
        CheckpointError: weights that are missing, left over or of shapes that do not fit together, or a head without labels.
        ConfigError: a configuration that is not of CANINE.
    """
    folder = path if path.is_dir() else path.parent
    document = read_object(folder / CONFIG)
    where = folder / CONFIG
    config: dict[str, Any] = {"model_type": MODEL_TYPE, **shape_of(document, where)}
    foreign = without_prefix(tensors_of(path, lambda name: BUFFER.search(name) is not None))
    check_layers(path, foreign, config["layers"])
    config["head"] = _head(document, foreign, where)
    if config["head"] in ("sequence", "token"):
        config["labels"] = labels_of(document, foreign, where)
    config["problem"] = _problem(document, config.get("labels", ()), where)
    config["second_type"] = _second_type(document, config["types"])
    config["pooler"] = "pooler.dense.weight" in foreign.tensors
    taken = Taken(foreign)
    weights = take_body(path, taken, config)
    if config["pooler"]:
        take_pair(weights, taken, "pooler", "pooler.dense")
    if config["head"] != "none":
        take_pair(weights, taken, "output", "qa_outputs" if config["head"] == "answer" else "classifier")
    taken.finish()
    return Checkpoint(path, "canine", config, weights)


def files(path: Path) -> list[Path]:
    """All files that a model consists of, those of its configuration first."""
    return hugging_face.files(path)


def shape_of(document: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The fields of marlin's configuration that CANINE and LA-CANINE share.

    Raises:
        ConfigError: no number where one is expected, or an activation that marlin does not have.
    """
    given = document.get("hidden_act")
    activation = "gelu" if given is None else given
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ConfigError(f"{where}: hidden_act {quoted(activation)} is none of {', '.join(ACTIVATIONS)}")
    return {**known_fields(document, FIELDS, where), "activation": ACTIVATIONS[activation]}


def without_prefix(foreign: Foreign) -> Foreign:
    """The tensors of the network under the names that CanineModel gives them; the head's stay as they are."""
    return Foreign(foreign.path, {name.removeprefix(PREFIX): tensor for name, tensor in foreign.tensors.items()})


def _head(document: Mapping[str, Any], foreign: Foreign, where: Path) -> str:
    """The head that the class in config.json has; a class of none has no head whatever else it is."""
    found = [name for name in OUTPUTS if f"{name}.weight" in foreign.tensors]
    if not found:
        return "none"
    names = document.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str) or name not in HEADS or (HEADS[name] == "answer") != (found[0] == "qa_outputs"):
        raise ConfigError(
            f"{where}: the file has a head ({found[0]}), and architectures does not say which: found {quoted(names)};"
            f" known: {', '.join(HEADS)}"
        )
    return HEADS[name]


def _problem(document: Mapping[str, Any], labels: tuple[str, ...], where: Path) -> str:
    """What scores mean; one row alone is a yes or no, as transformers' pipeline has it."""
    given = document.get("problem_type")
    if given is None:
        return "several_labels" if len(labels) == 1 else "one_label"
    if not isinstance(given, str) or given not in PROBLEMS:
        raise ConfigError(f"{where}: problem_type {quoted(given)} is none of {', '.join(PROBLEMS)}")
    return PROBLEMS[given]


def _second_type(document: Mapping[str, Any], types: int) -> int:
    """The type of a pair's second text: transformers up to 4 said 1, and from 5 on says 0."""
    version = document.get("transformers_version")
    major = version.split(".")[0] if isinstance(version, str) else ""
    return 0 if (major.isdecimal() and int(major) >= 5) or types < 2 else 1


def take_body(path: Path, taken: Taken, config: Mapping[str, Any]) -> dict[str, mx.array]:
    """Everything but pooler and head, which LA-CANINE has too.

    Raises:
        CheckpointError: a tensor is missing, or is no kernel of a convolution where one is expected.
    """
    weights: dict[str, mx.array] = {}
    for index in range(config["hash_functions"]):
        name = f"char_embeddings.HashBucketCodepointEmbedder_{index}.weight"
        weights[f"embedding.tables.{index}.weight"] = taken.take(name)
    weights["embedding.types.weight"] = taken.take("char_embeddings.token_type_embeddings.weight")
    weights["embedding.positions.weight"] = taken.take("char_embeddings.char_position_embeddings.weight")
    take_pair(weights, taken, "embedding.norm", "char_embeddings.LayerNorm")
    for target, source in blocks_of(config).items():
        for ours, theirs in LINEARS.items():
            take_pair(weights, taken, f"{target}.{ours}", f"{source}.{theirs}")
    for ours, theirs in (("down", "chars_to_molecules"), ("up", "projection")):
        take_pair(weights, taken, f"local.{ours}.norm", f"{theirs}.LayerNorm")
        take_pair(weights, taken, f"local.{ours}.conv", f"{theirs}.conv")
        kernel = weights[f"local.{ours}.conv.weight"]
        if kernel.ndim != 3 or not kernel.size:
            raise CheckpointError(
                f"{path}: '{theirs}.conv.weight' has shape {list(kernel.shape)}, not 3 dimensions with numbers"
            )
        # [out, in, kernel] as a product over windows, whose rows stand side by side.
        weights[f"local.{ours}.conv.weight"] = kernel.swapaxes(1, 2).reshape(kernel.shape[0], -1)
    return weights


def blocks_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Paths of the layers -> transformers'."""
    deep = {f"layers.{index}": f"encoder.layer.{index}" for index in range(config["layers"])}
    return {"local.first": "initial_char_encoder.layer.0", "local.last": "final_char_encoder.layer.0", **deep}


def take_pair(weights: dict[str, mx.array], taken: Taken, target: str, source: str) -> None:
    """A weight and its bias."""
    for name in ("weight", "bias"):
        weights[f"{target}.{name}"] = taken.take(f"{source}.{name}")
