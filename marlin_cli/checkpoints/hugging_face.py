"""Hugging Face folders of T5 over bytes (ByT5): config.json beside safetensors or pytorch_model.bin, sharded or not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from marlin_cli.checkpoints import nvfp4
from marlin_cli.checkpoints.foreign import Checkpoint, Foreign, Taken, read_foreign, read_object, shards_of_index, take_table
from marlin_cli.checkpoints.labels import CLASSIFIER, labels_of
from marlin_cli.checkpoints.t5_ends import CONFIG, GENERATION_CONFIG, IDS, TOKENIZER_CONFIG, ids_of_folder
from marlin_cli.checkpoints.t5_head import HEAD, SCALE, TIE, Head, HeadFlags, choose_head, head_flags, stored_head
from marlin_cli.config import describe
from marlin_cli.documents import read_json
from marlin_cli.errors import CheckpointError, ConfigError
from marlin_cli.text import quoted

# Weights files in the order in which they are looked for, as transformers does.
SINGLES = ("model.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".bin")

MODEL_TYPES = ("t5", "mt5")

# The largest vocabulary of bytes: ByT5 has 384 ids, derivatives a few more; pieces of words start at thousands.
MOST_IDS = 1024

# Names of one and the same table of embeddings; a file has one of them or several.
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")

# Left in some files by the first implementation; no code reads it.
STRAY = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)

# Before the names of an encoder beside which a head for labels stands.
BODY = "transformer."

# Heads that read the decoder's rows, by how their names begin, and transformers' classes that have them.
OTHER_HEADS = {"classification_head.": "T5ForSequenceClassification", "qa_outputs.": "T5ForQuestionAnswering"}

# transformers' fields -> marlin's, with the values of fields that a file leaves out.
FIELDS: Mapping[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 32128),
    "d_model": ("d_model", 512),
    "d_kv": ("head_dim", 64),
    "d_ff": ("ffn_dim", 2048),
    "num_layers": ("encoder_layers", 6),
    "num_heads": ("heads", 8),
    "layer_norm_epsilon": ("norm_eps", 1e-6),
    "relative_attention_num_buckets": ("relative_buckets", 32),
    "relative_attention_max_distance": ("relative_distance", 128),
}

# What a file of mt5 that leaves them out has otherwise.
MT5_DEFAULTS: Mapping[str, Any] = {"vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6}

# transformers' names of activations -> (marlin's, does the feed-forward have a gate?).
ACTIVATIONS: Mapping[str, tuple[str, bool]] = {
    "relu": ("relu", False),
    "gelu": ("gelu", False),
    "gelu_new": ("gelu_tanh", False),
    "silu": ("silu", False),
    "gated-gelu": ("gelu_tanh", True),  # there too it means the approximation
    "gated-gelu_new": ("gelu_tanh", True),
    "gated-relu": ("relu", True),
    "gated-silu": ("silu", True),
}


def recognises(path: Path) -> bool:
    """Is this a folder whose config.json says T5, or a weights file in one?"""
    folder = path if path.is_dir() else path.parent
    if not (folder / CONFIG).is_file() or (path.is_file() and path.suffix not in SUFFIXES):
        return False
    document = read_json(folder / CONFIG)
    return isinstance(document, dict) and document.get("model_type") in MODEL_TYPES


def read(path: Path) -> Checkpoint:
    """Canonical configuration and weights; a file without a decoder gives an encoder alone, which may label bytes.

    Raises:
        CheckpointError: weights that are missing, left over, contradictory or of shapes that do not fit together.
        ConfigError: a configuration that is not of T5 over bytes.
    """
    folder = path if path.is_dir() else path.parent
    document = read_object(folder / CONFIG)
    config, flags = config_from(folder, document), head_flags(document, folder / CONFIG)
    tensors: dict[str, mx.array] = {}
    for file in weight_files(path):
        for name, tensor in read_foreign(file).tensors.items():
            if name.removeprefix(BODY) in tensors:
                raise CheckpointError(f"{file}: {quoted(name)} stands in another shard too")
            tensors[name.removeprefix(BODY)] = tensor
    _check_head(path, tensors)
    packing, marlin = nvfp4.packing_of(document, folder), take_table(document, "marlin", folder / CONFIG)
    if packing is not None:
        tensors = nvfp4.under_mlx_names(tensors, packing, path)
    foreign = Foreign(path, tensors)
    if not any(name.startswith("decoder.block.") for name in tensors):
        config["decoder_layers"] = 0
        if f"{CLASSIFIER}.weight" in tensors:
            config["labels"] = labels_of(document, foreign, folder / CONFIG)
    taken = Taken(foreign)
    for name in STRAY:
        taken.drop(name)
    weights = {"embedding.weight": _embedding(foreign, taken, flags)}
    _take_stack(weights, taken, "encoder", config["encoder_layers"], gated=config["gated_ffn"])
    if config["decoder_layers"]:
        _take_stack(weights, taken, "decoder", config["decoder_layers"], gated=config["gated_ffn"])
        config["tied_head"], config["scaled_head"] = _take_head(weights, taken, path, flags)
    if config.get("labels"):
        _take_linear(weights, taken, "output", CLASSIFIER)
        weights["output.bias"] = taken.take(f"{CLASSIFIER}.bias")
    taken.finish()
    return Checkpoint(path, "hugging_face", config, weights, None if packing is None else dict(nvfp4.TABLE), marlin)


def files(path: Path) -> list[Path]:
    """All files that a model consists of, those of its configuration first."""
    folder = path if path.is_dir() else path.parent
    configs = [folder / name for name in (CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG) if (folder / name).is_file()]
    return [*configs, *weight_files(path)]


def weight_files(path: Path) -> list[Path]:
    """The weights files of a folder, or `path` itself.

    Raises:
        CheckpointError: none, or an index that names a missing file or one outside the folder.
    """
    if path.is_file():
        return [path]
    for single in SINGLES:
        if (path / single).is_file():
            return [path / single]
        if (path / f"{single}.index.json").is_file():
            return shards_of_index(path / f"{single}.index.json")
    raise CheckpointError(f"{path}: holds none of {', '.join(SINGLES)} and their shards")


class _Names(Taken):
    """Hands out the names that are asked for, in place of tensors."""

    def __init__(self) -> None:
        """There is nothing to hand out."""

    def take(self, name: str, shape: tuple[int, ...] | None = None) -> Any:
        """The name itself."""
        return name

    def has(self, name: str) -> bool:
        """Only weights have names of their own; scales go along."""
        return False


def names_of(config: Mapping[str, Any]) -> dict[str, str]:
    """transformers' name of every weight, by marlin's, of a ByT5 with marlin's configuration.

    A head that is the table of embeddings has none of its own, see `repeats_table`.
    """
    names: dict[str, Any] = {"embedding.weight": EMBEDDINGS[0]}
    for stack in ("encoder", "decoder"):
        if config[f"{stack}_layers"]:
            _take_stack(names, _Names(), stack, config[f"{stack}_layers"], gated=config.get("gated_ffn", True))
    if config["decoder_layers"] and not config.get("tied_head", False):
        names["output.weight"] = HEAD
    if config.get("labels"):
        body = {ours: BODY + theirs for ours, theirs in names.items()}
        return body | {f"output.{name}": f"{CLASSIFIER}.{name}" for name in ("weight", "bias")}
    return names


def repeats_table(config: Mapping[str, Any]) -> bool:
    """Must the table of embeddings stand under the head's name too?

    transformers 4 scales what it ties itself; a head that is stored and happens to equal the table it leaves as it is, and
    transformers 5 ties the two again.
    """
    return bool(config["decoder_layers"] and config["tied_head"] and not config["scaled_head"])


def config_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' config.json of a ByT5 with marlin's configuration, all of whose fields with a value are there."""
    document = {theirs: config[ours] for theirs, (ours, _) in (*FIELDS.items(), *IDS.items())}
    ends = config.get("answer_end_ids")
    gated = config["gated_ffn"]
    activations = {form: name for name, form in ACTIVATIONS.items() if name != "gated-gelu_new"}
    labels = config.get("labels", ())
    alone = "T5ForTokenClassification" if labels else "T5EncoderModel"
    return {
        **document,
        **({"id2label": {str(index): label for index, label in enumerate(labels)}} if labels else {}),
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration" if config["decoder_layers"] else alone],
        "num_decoder_layers": config["decoder_layers"],
        "feed_forward_proj": activations[config["activation"], gated],
        "eos_token_id": config["end_id"] if ends is None else ends[0] if len(ends) == 1 else list(ends),
        # Both versions of transformers are told the same, see `marlin_cli.checkpoints.t5_head`.
        TIE: config["tied_head"] and config["scaled_head"],
        SCALE: config["scaled_head"],
        "is_encoder_decoder": bool(config["decoder_layers"]),
    }


def config_from(folder: Path, document: dict[str, Any]) -> dict[str, Any]:
    """marlin's configuration from transformers': known keys alone, the rest says nothing about the network."""
    where = folder / CONFIG
    config: dict[str, Any] = {"model_type": "byt5"}
    mt5 = document.get("model_type") == "mt5"
    for theirs, (ours, default) in FIELDS.items():
        config[ours] = _number(where, theirs, document.get(theirs), MT5_DEFAULTS.get(theirs, default) if mt5 else default)
    if config["vocab_size"] > MOST_IDS:
        raise ConfigError(
            f"{where}: vocab_size is {quoted(config['vocab_size'])}, more than {MOST_IDS:,}: pieces of words, as it seems;"
            " marlin runs T5 over bytes (ByT5, 384)"
        )
    config["decoder_layers"] = _number(
        where, "num_decoder_layers", document.get("num_decoder_layers"), config["encoder_layers"]
    )
    activation = document.get("feed_forward_proj") or ("gated-gelu" if mt5 else "relu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ConfigError(f"{where}: feed_forward_proj {quoted(activation)} is none of {', '.join(ACTIVATIONS)}")
    config["activation"], config["gated_ffn"] = ACTIVATIONS[activation]
    return {**config, **ids_of_folder(folder, document, config["vocab_size"])}


def _check_head(path: Path, tensors: Mapping[str, mx.array]) -> None:
    """Raise `CheckpointError` for a head that marlin does not run."""
    for name in tensors:
        for prefix, kind in OTHER_HEADS.items():
            if name.startswith(prefix):
                raise CheckpointError(
                    f"{path}: holds a {kind}, whose head reads the decoder; marlin runs T5 that answers, encodes, or"
                    " labels bytes (T5ForTokenClassification)"
                )


def _number(where: Path, name: str, value: Any, default: Any) -> Any:
    """`value`, which must be a number of the kind that `default` is, or `default` for None."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, type(default))):
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise ConfigError(f"{where}: {name} should be {kind}, found {describe(value)}")
    return value


def _embedding(foreign: Foreign, taken: Taken, flags: HeadFlags) -> mx.array:
    """The table under any of its names; where there are several they must be the same."""
    names = [name for name in EMBEDDINGS if taken.has(name)]
    if not names and taken.has(HEAD) and flags.major != 4:
        # transformers 5 ties both ways: whichever of the names is stored serves for all.
        return foreign.tensors[HEAD]
    if not names:
        raise CheckpointError(f"{foreign.path}: the tensor {EMBEDDINGS[0]!r} is missing")
    tables = [taken.take(name) for name in names]
    for name, table in zip(names[1:], tables[1:], strict=True):
        if table.shape != tables[0].shape or not mx.array_equal(table, tables[0]).item():
            raise CheckpointError(f"{foreign.path}: {name!r} and {names[0]!r} should be the same table, but differ")
    return tables[0]


def _take_head(weights: dict[str, mx.array], taken: Taken, path: Path, flags: HeadFlags) -> Head:
    """Take what is stored under the head's name, and keep it where it is a head of its own."""
    own: dict[str, mx.array] = {}
    if taken.has(HEAD):
        _take_linear(own, taken, "output", HEAD.removesuffix(".weight"))
    head = choose_head(flags, stored_head(own.get("output.weight"), weights["embedding.weight"]), path)
    if not head.tied:
        weights.update(own)
    return head


def _take_stack(weights: dict[str, mx.array], taken: Taken, stack: str, layers: int, *, gated: bool) -> None:
    weights[f"{stack}.norm.weight"] = taken.take(f"{stack}.final_layer_norm.weight")
    bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    weights[f"{stack}.relative_bias.weight"] = taken.take(bias)
    attentions = {"attention": "layer.0.SelfAttention"}
    norms = {"attention_norm": "layer.0"}
    if stack == "decoder":
        attentions["cross"] = "layer.1.EncDecAttention"
        norms["cross_norm"] = "layer.1"
    last = f"layer.{len(norms)}"
    norms["ffn_norm"] = last
    linears = {"gate_proj": "wi_0", "up_proj": "wi_1", "down_proj": "wo"} if gated else {"up_proj": "wi", "down_proj": "wo"}
    for layer in range(layers):
        source, target = f"{stack}.block.{layer}", f"{stack}.layers.{layer}"
        for ours, theirs in attentions.items():
            for each in "qkvo":
                _take_linear(weights, taken, f"{target}.{ours}.{each}_proj", f"{source}.{theirs}.{each}")
        for ours, theirs in norms.items():
            weights[f"{target}.{ours}.weight"] = taken.take(f"{source}.{theirs}.layer_norm.weight")
        for ours, theirs in linears.items():
            _take_linear(weights, taken, f"{target}.ffn.{ours}", f"{source}.{last}.DenseReluDense.{theirs}")


def _take_linear(weights: dict[str, mx.array], taken: Taken, target: str, source: str) -> None:
    """A weight, and its scales if it is packed."""
    for name in ("weight", "scales", "global_scale"):
        if name == "weight" or taken.has(f"{source}.{name}"):
            weights[f"{target}.{name}"] = taken.take(f"{source}.{name}")
