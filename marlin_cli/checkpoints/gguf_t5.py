"""GGUF files of T5 over bytes, in llama.cpp's names: encoder and decoder, or an encoder alone."""

import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from marlin_cli.checkpoints.foreign import Checkpoint, Foreign, Taken
from marlin_cli.checkpoints.gguf_file import GGUFFile
from marlin_cli.checkpoints.hugging_face import MOST_IDS
from marlin_cli.config import describe
from marlin_cli.errors import AssumptionWarning, CheckpointError, ConfigError
from marlin_cli.text import quoted

SUFFIX = ".gguf"

FIRST_BYTE = 3  # the id of byte 0

# general.architecture -> has it a decoder?
ARCHITECTURES = {"t5": True, "t5encoder": False}

# Metadata below the architecture's name -> (marlin's field, what a file means that leaves it out; None: it must be there).
FIELDS: dict[str, tuple[str, int | float | None]] = {
    "embedding_length": ("d_model", None),
    "feed_forward_length": ("ffn_dim", None),
    "block_count": ("encoder_layers", None),
    "attention.head_count": ("heads", None),
    "attention.layer_norm_rms_epsilon": ("norm_eps", 1e-6),
    "attention.relative_buckets_count": ("relative_buckets", 32),
    "decoder_start_token_id": ("start_id", 0),
}
TOKENIZER_IDS = {"tokenizer.ggml.eos_token_id": ("end_id", 1), "tokenizer.ggml.padding_token_id": ("pad_id", 0)}

# Ids that end an answer in llama.cpp too, where a file has them: of a turn and of a message.
MORE_ENDS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")

# llama.cpp has it as a constant; no key of the file tells it.
RELATIVE_DISTANCE = 128

# Bytes that every tokenizer spells in one of two ways, in themselves or in hexadecimal.
PLAIN_BYTES = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

# A head that is off the table of embeddings by less than this is the table once more, packed otherwise: types of 4 bits
# are off by a tenth. Two tables that have nothing to do with each other are off by more than one of them is long.
SAME_TABLE = 0.25

# Left in some files by the first implementation; no code reads it.
STRAY = "dec.blk.0.cross_attn_rel_b.weight"


def recognises(path: Path) -> bool:
    """Is this a GGUF file, or a folder with one and no config.json?"""
    if path.is_dir():
        return not (path / "config.json").exists() and len(list(path.glob(f"*{SUFFIX}"))) == 1
    return path.suffix == SUFFIX and path.exists()


def files(path: Path) -> list[Path]:
    """The one file that a model consists of."""
    return [next(iter(path.glob(f"*{SUFFIX}")))] if path.is_dir() else [path]


def read(path: Path) -> Checkpoint:
    """Canonical configuration and weights; packed ones are unpacked.

    Whether logits are scaled by d_model ** -0.5 no key says, and llama.cpp never does it, which greedy decoding cannot
    tell. It is assumed of what T5 is published as, see `_is_scaled`, and said as an `AssumptionWarning` unless the file is
    a T5 1.1 (ByT5) with a head of its own.

    Raises:
        CheckpointError: a damaged file, or tensors that are missing, left over or of another shape.
        ConfigError: metadata that is not of T5 over bytes.
    """
    (file_path,) = files(path)
    file = GGUFFile(file_path)
    config = _config(file)
    foreign = Foreign(file_path, {name: file.array(name) for name in file.shapes})
    taken = Taken(foreign)
    taken.drop(STRAY)
    config["vocab_size"], _ = foreign.shape("token_embd.weight", 2)
    _check_tokens(file, config["vocab_size"])
    _check_ids(file, config["vocab_size"])
    config["gated_ffn"] = gated = taken.has("enc.blk.0.ffn_gate.weight")
    config["activation"] = "gelu_tanh" if gated else "relu"  # llama.cpp's rule: no key tells it
    weights = {"embedding.weight": taken.take("token_embd.weight")}
    _take_stack(weights, taken, "encoder", config["encoder_layers"], gated=gated)
    if config["decoder_layers"]:
        _take_stack(weights, taken, "decoder", config["decoder_layers"], gated=gated)
        table, head = weights["embedding.weight"], taken.take("output.weight") if taken.has("output.weight") else None
        config["scaled_head"] = _is_scaled(file_path, table, head, gated=gated)
        config["tied_head"] = head is None or (head.shape == table.shape and mx.array_equal(head, table).item())
        if head is not None and not config["tied_head"]:
            weights["output.weight"] = head
    taken.finish()
    return Checkpoint(path, "gguf_t5", config, weights)


def _is_scaled(path: Path, table: mx.array, head: mx.array | None, *, gated: bool) -> bool:
    """Are logits scaled? T5 1.0 ties its head and scales; T5 1.1 has a gate, and scales neither its own head nor a tied one.

    Args:
        table: embeddings [vocab, d_model].
        head: of the same shape; None where the file has none, and the table serves.
    """
    alike = head is None or (head.shape == table.shape and _distance(head, table) < SAME_TABLE)
    scaled = alike and not gated
    if alike or not gated:
        which = "no output.weight" if head is None else f"an output.weight that is {'' if alike else 'not '}the embeddings"
        warnings.warn(
            f"{path}: no key tells whether logits are scaled; by {which} and {'a' if gated else 'no'} gate in the feed-forward"
            f" they were taken as {'scaled' if scaled else 'not scaled'}",
            AssumptionWarning,
            stacklevel=3,
        )
    return scaled


def _distance(head: mx.array, table: mx.array) -> float:
    """How far off the table a head is, as a share of the table's length."""
    first, second = head.astype(mx.float32), table.astype(mx.float32)
    distance = mx.linalg.norm(first - second) / mx.maximum(mx.linalg.norm(second), 1e-30)
    return float(np.array(distance))


def _config(file: GGUFFile) -> dict[str, Any]:
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        found = "is missing" if architecture is None else f"is {quoted(architecture)}"
        raise ConfigError(f"{file.path}: general.architecture {found}; marlin reads GGUF of T5 over bytes (ByT5)")
    parts = _number(file, "split.count", 1)
    if parts > 1:
        raise CheckpointError(f"{file.path}: is one of {parts} parts; join them first with llama-gguf-split --merge")
    config: dict[str, Any] = {"model_type": "byt5", "relative_distance": RELATIVE_DISTANCE}
    for key, (field, default) in FIELDS.items():
        config[field] = _number(file, f"{architecture}.{key}", default)
    for key, (field, default) in TOKENIZER_IDS.items():
        config[field] = _number(file, key, default)
    more = [_number(file, key, config["end_id"]) for key in MORE_ENDS]
    if set(more) != {config["end_id"]}:
        config["answer_end_ids"] = tuple(dict.fromkeys([config["end_id"], *more]))
    # The shortest number that float32 holds so: 1e-06 and not 9.999999974752427e-07.
    config["norm_eps"] = float(str(np.float32(config["norm_eps"])))
    decoder_key = f"{architecture}.decoder_block_count"
    config["decoder_layers"] = _number(file, decoder_key, config["encoder_layers"]) if ARCHITECTURES[architecture] else 0
    heads, width = config["heads"], config["d_model"]
    if heads < 1:
        raise ConfigError(f"{file.path}: {architecture}.attention.head_count must be at least 1, found {heads}")
    config["head_dim"] = _number(file, f"{architecture}.attention.key_length", width // heads)
    for key, expected in (("value_length", config["head_dim"]), ("head_count_kv", heads)):
        found = _number(file, f"{architecture}.attention.{key}", expected)
        if found != expected:
            raise ConfigError(f"{file.path}: {architecture}.attention.{key} is {found}; in T5 it is {expected} as for queries")
    return config


def _number(file: GGUFFile, key: str, default: int | float | None) -> Any:
    value = file.metadata.get(key, default)
    if value is None:
        raise ConfigError(f"{file.path}: the key {key!r} is missing")
    if isinstance(value, bool) or not isinstance(value, (int, float if isinstance(default, float) else int)):
        kind = "a number" if isinstance(default, float) else "a whole number"
        raise ConfigError(f"{file.path}: {key} should be {kind}, found {describe(value)}")
    return value


def _check_tokens(file: GGUFFile, vocab_size: int) -> None:
    """Ids are bytes as ByT5 has them, as far as the file tells."""
    if vocab_size > MOST_IDS:
        raise ConfigError(
            f"{file.path}: has {vocab_size:,} tokens, more than {MOST_IDS:,}: pieces of words, as it seems; marlin runs T5 over"
            " bytes (ByT5, 384)"
        )
    offset = _number(file, "tokenizer.ggml.byte_offset", FIRST_BYTE)
    if offset != FIRST_BYTE:
        raise ConfigError(f"{file.path}: tokenizer.ggml.byte_offset is {offset}; in ByT5 the bytes begin at {FIRST_BYTE}")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        return
    if not isinstance(tokens, list) or not all(isinstance(token, bytes) for token in tokens):
        raise ConfigError(f"{file.path}: tokenizer.ggml.tokens is not a list of strings")
    if len(tokens) < FIRST_BYTE + 256:
        raise ConfigError(f"{file.path}: tokenizer.ggml.tokens has {len(tokens)} tokens; ByT5's have every byte, and 3 before")
    for byte in PLAIN_BYTES:
        index = byte + FIRST_BYTE
        found = tokens[index]
        if found not in (bytes([byte]), b"<0x%02X>" % byte):
            spelled = quoted(found[:40].decode("utf-8", errors="replace"))
            raise ConfigError(f"{file.path}: the id {index} stands for {spelled}; in ByT5 it is the byte {chr(byte)!r}")


def _check_ids(file: GGUFFile, vocab_size: int) -> None:
    for key in (f"{file.metadata['general.architecture']}.decoder_start_token_id", *TOKENIZER_IDS, *MORE_ENDS):
        value = _number(file, key, 0)
        if not 0 <= value < vocab_size:
            raise ConfigError(f"{file.path}: {key} is {value}, not below the {vocab_size:,} rows of token_embd.weight")


def _take_stack(weights: dict[str, mx.array], taken: Taken, stack: str, layers: int, *, gated: bool) -> None:
    short = stack[:3]
    weights[f"{stack}.norm.weight"] = taken.take(f"{short}.output_norm.weight")
    weights[f"{stack}.relative_bias.weight"] = taken.take(f"{short}.blk.0.attn_rel_b.weight")
    attentions = {"attention": "attn", **({"cross": "cross_attn"} if stack == "decoder" else {})}
    for layer in range(layers):
        source, target = f"{short}.blk.{layer}", f"{stack}.layers.{layer}"
        for ours, theirs in attentions.items():
            weights[f"{target}.{ours}_norm.weight"] = taken.take(f"{source}.{theirs}_norm.weight")
            for each in "qkvo":
                weights[f"{target}.{ours}.{each}_proj.weight"] = taken.take(f"{source}.{theirs}_{each}.weight")
        weights[f"{target}.ffn_norm.weight"] = taken.take(f"{source}.ffn_norm.weight")
        for each in ("gate", "up", "down") if gated else ("up", "down"):
            weights[f"{target}.ffn.{each}_proj.weight"] = taken.take(f"{source}.ffn_{each}.weight")
