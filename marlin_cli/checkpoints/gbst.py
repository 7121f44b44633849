"""Folders of gbswt5 (ETRI's GBST-KEByT5): ByT5's names, and the front end where the encoder's embeddings would be."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from marlin_cli.checkpoints import hugging_face
from marlin_cli.checkpoints.foreign import Checkpoint, Foreign, Taken, read_object
from marlin_cli.checkpoints.t5_ends import CONFIG
from marlin_cli.checkpoints.transformers_folder import check_layers, has_model_type, number, take_head, tensors_of
from marlin_cli.config import describe
from marlin_cli.errors import CheckpointError, ConfigError

MODEL_TYPES = ("gbswt5",)
FRONT = "encoder.embed_tokens."
BATCH_NORM = f"{FRONT}positional_convol.2.bn."
BATCH_NORM_EPS = 1e-5

# The same table under other names.
ALIASES = (f"{FRONT}embeds.weight", "decoder.embed_tokens.weight")

DEFAULT_BLOCKS = ((1, 0), (2, 0), (3, 0), (4, 0), (6, 0), (9, 0))


def recognises(path: Path) -> bool:
    """Is this a folder of gbswt5, or a weights file in one?"""
    return has_model_type(path, MODEL_TYPES)


def read(path: Path) -> Checkpoint:
    """Canonical configuration and weights; a batch norm is folded into the convolution before it.

    Raises:
        CheckpointError: weights that are missing, left over, contradictory or of shapes that do not fit together.
        ConfigError: a configuration that is not of gbswt5 over bytes.
    """
    where = (path if path.is_dir() else path.parent) / CONFIG
    document = read_object(where)
    config = config_from(document, where)
    foreign = tensors_of(path)
    taken = Taken(foreign)
    check_layers(path, foreign, max(config["encoder_layers"], config["decoder_layers"]))
    weights = {ours: taken.take(theirs) for ours, theirs in hugging_face.names_of({**config, "tied_head": True}).items()}
    for alias in ALIASES:
        if taken.has(alias) and not mx.array_equal(taken.take(alias), weights["embedding.weight"]).item():
            raise CheckpointError(f"{path}: {alias!r} and 'shared.weight' should be the same table, but differ")
    weights |= _take_front(foreign, taken)
    config["tied_head"], config["scaled_head"] = take_head(taken, path, document, weights)
    taken.finish()
    return Checkpoint(path, "gbst", config, weights)


def config_from(document: dict[str, Any], where: Path) -> dict[str, Any]:
    """marlin's fields of its config.json.

    Raises:
        ConfigError: a configuration that is not of gbswt5 over bytes.
    """
    return {**hugging_face.config_from(where.parent, document), "model_type": "gbst", **_front(document, where)}


def files(path: Path) -> list[Path]:
    """All files that a model consists of, those of its configuration first."""
    return hugging_face.files(path)


def _front(document: Mapping[str, Any], where: Path) -> dict[str, Any]:
    most = number(document, "max_subword_block_size", 0, where)
    blocks = document.get("subword_blocks", DEFAULT_BLOCKS)
    if most:
        blocks = [(size, 0) for size in range(1, min(most, 1 << 8) + 1)]
    if not isinstance(blocks, (list, tuple)):
        raise ConfigError(f"{where}: subword_blocks should be a list of sizes and offsets, found {describe(blocks)}")
    pairs = [block if isinstance(block, (list, tuple)) else (block, 0) for block in blocks]
    if not all(len(pair) == 2 and all(type(value) is int for value in pair) for pair in pairs):
        raise ConfigError(f"{where}: subword_blocks should be a list of sizes and offsets, found {describe(blocks)}")
    consensus = document.get("score_consensus_attn", True)
    if not isinstance(consensus, bool):
        raise ConfigError(f"{where}: score_consensus_attn should be true or false, found {describe(consensus)}")
    return {
        "block_sizes": tuple(size for size, _ in pairs),
        "block_offsets": tuple(offset for _, offset in pairs),
        "bytes_in_row": number(document, "downsample_factor", 1, where),
        "consensus": consensus,
    }


def _take_front(foreign: Foreign, taken: Taken) -> dict[str, mx.array]:
    names = {"kernel": "positional_convol.2.convol", "proj": "positional_convol.2.proj", "score": "cand_scoring.0"}
    d_model, _, width = foreign.shape(f"{FRONT}{names['kernel']}.weight", 3)
    kernel = taken.take(f"{FRONT}{names['kernel']}.weight", (d_model, 1, width))[:, 0].T
    bias = taken.take(f"{FRONT}{names['kernel']}.bias", (d_model,))
    if f"{BATCH_NORM}running_mean" in foreign.tensors:
        mean, variance, weight, shift = (
            taken.take(f"{BATCH_NORM}{name}", (d_model,)).astype(mx.float32)
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        taken.drop(f"{BATCH_NORM}num_batches_tracked")
        scale = weight * mx.rsqrt(variance + BATCH_NORM_EPS)
        kernel, bias = kernel * scale, (bias - mean) * scale + shift
    return {
        "front.kernel": kernel,
        "front.kernel_bias": bias,
        "front.proj.weight": taken.take(f"{FRONT}{names['proj']}.weight", (d_model, d_model, 1))[..., 0],
        "front.proj.bias": taken.take(f"{FRONT}{names['proj']}.bias", (d_model,)),
        "front.score.weight": taken.take(f"{FRONT}{names['score']}.weight", (1, d_model)),
        "front.score.bias": taken.take(f"{FRONT}{names['score']}.bias", (1,)),
    }
