"""Checkpoints of lucidrains/MEGABYTE-pytorch (0.3.6): two or more stages, read by the shapes of their tensors."""

import re
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from marlin_cli.checkpoints.foreign import Checkpoint, Foreign, ImportOptions, Taken, heads_of_width
from marlin_cli.errors import CheckpointError
from marlin_cli.text import quoted

MARKER = "to_logits.weight"  # a name that every one has, wherever it stands in a file

HEAD_DIM = 64  # the constructor's default, where nothing reveals it
PATCHES = 1024  # longest context in patches, where nothing reveals it
ROPE_BASE = 10000.0  # no argument of its constructor changes it

# Stages that a network may have; each has a start vector, and lengths of 1 are all that two thirds of them could be.
MOST_STAGES = 18


def recognises(tensors: Mapping[str, Any]) -> bool:
    """Do the names say MEGABYTE-pytorch?"""
    return "to_logits.weight" in tensors and "token_embs.0.weight" in tensors and "start_tokens.0" in tensors


def read(foreign: Foreign, options: ImportOptions) -> Checkpoint:
    """Canonical configuration and weights.

    Widths, depths, patch sizes, the vocabulary, the feed-forward's width and both kinds of positions are read from
    shapes and keys. The width of a head is revealed by the rotary buffer alone; else it is `options.head_dim`, or
    the stage's inner width over `options.heads`, or 64, which is then assumed; so is the longest context where there
    are no learned positions.

    Raises:
        CheckpointError: tensors that are missing, left over or of shapes that do not fit together.
    """
    tensors, path = foreign.tensors, foreign.path
    stages = len({name for name in tensors if re.fullmatch(r"start_tokens\.\d+", name)})
    if stages < 2:
        raise CheckpointError(f"{path}: MEGABYTE-pytorch with {stages} stage; two or more are needed")
    if stages > MOST_STAGES:
        raise CheckpointError(f"{path}: MEGABYTE-pytorch with {stages:,} stages, more than {MOST_STAGES}")
    taken = Taken(foreign)
    vocab, fine = foreign.shape("token_embs.0.weight", 2)
    dims = [foreign.shape(f"start_tokens.{stage}", 1)[0] for stage in range(stages)]
    layers = {match[1] for name in tensors if (match := re.match(r"transformers\.([0-9]+\.layers\.[0-9]+)\.", name))}
    depths = [sum(each.startswith(f"{stage}.") for each in layers) for stage in range(stages)]
    # token_embs run fine to coarse: number j embeds tokens of stage `stages - 1 - j`, of so many bytes each.
    token_bytes = [1] * stages
    for stage in range(stages - 1):
        width = foreign.shape(f"token_embs.{stages - 1 - stage}.2.weight", 1)[0]
        if width % fine:
            raise CheckpointError(f"{path}: a patch {width} wide is not made of embeddings {fine} wide")
        token_bytes[stage] = width // fine
    lengths = [0] + [token_bytes[stage - 1] // token_bytes[stage] for stage in range(1, stages)]
    if any(token_bytes[s] * lengths[s] != token_bytes[s - 1] or not lengths[s] for s in range(1, stages)):
        raise CheckpointError(f"{path}: the patch sizes {token_bytes} do not nest")
    learned = "pos_embs.0.weight" in tensors
    rope = _frequencies(0) in tensors
    assumed: dict[str, Any] = dict(foreign.assumed)
    if learned:
        patches = foreign.shape("pos_embs.0.weight", 2)[0]
    elif options.max_bytes is not None:
        patches = options.max_bytes // token_bytes[0]
    else:
        patches = PATCHES
        assumed["max_bytes"] = patches * token_bytes[0]
    inner = [foreign.shape(f"transformers.{stage}.layers.0.0.to_q.weight", 2)[0] for stage in range(stages)]
    head_dim = _head_dim(foreign, options, inner[0])
    if head_dim < 1 or any(width % head_dim for width in inner):
        raise CheckpointError(f"{path}: heads {quoted(head_dim)} wide do not divide an attention {inner[0]} wide; give heads")
    if rope:
        _check_frequencies(foreign, stages, head_dim)
    elif options.head_dim is None and options.heads is None:
        assumed["heads"] = inner[0] // head_dim
    ffn = [foreign.shape(f"transformers.{stage}.layers.0.1.1.weight", 2)[0] for stage in range(stages)]
    positions = "+".join(kind for kind, there in (("learned", learned), ("rope", rope)) if there) or "none"
    config: dict[str, Any] = {
        "model_type": "megabyte",
        "layout": "megabyte_pytorch",
        "patch_size": token_bytes[0],
        "max_bytes": patches * token_bytes[0],
        "vocab_size": vocab,
        "byte_dim": fine,
        **_stage_fields("global", dims[0], depths[0], inner[0] // head_dim, head_dim, ffn[0], positions),
        **_stage_fields("local", dims[-1], depths[-1], inner[-1] // head_dim, head_dim, ffn[-1], positions),
        "middle": [
            {
                "length": lengths[s], "layers": depths[s], "dim": dims[s], "heads": inner[s] // head_dim,
                "ffn_dim": ffn[s], "positions": positions, "head_dim": head_dim,
            }
            for s in range(1, stages - 1)
        ],
        "ffn": "gelu",
        "ffn_bias": True,
        "norm": "rmsnorm",
        # There the root mean square is clamped from below at 1e-8; the square of that added under the root gives the
        # same for rows of zeros and, in float32, for every row with a root mean square above 1e-4.
        "norm_eps": 1e-16,
        "token_shift": True,
    }  # fmt: skip
    weights: dict[str, mx.array] = {}
    for stage in range(stages):
        _take_stage(weights, taken, stage, stages)
        for layer in range(depths[stage]):
            source, target = f"transformers.{stage}.layers.{layer}", f"{_name(stage, stages, 'layers')}.{layer}"
            _take_block(weights, taken, source, target, (2 * inner[stage], dims[stage]))
        weights[_name(stage, stages, "norm") + ".weight"] = taken.take(f"transformers.{stage}.norm.g")
    for kind in ("weight", "bias"):
        weights[f"output.{kind}"] = taken.take(f"to_logits.{kind}")
    taken.drop("rotary_emb.inv_freq")
    taken.finish()
    return Checkpoint(path, "megabyte_pytorch", config, weights, assumed=assumed)


def possible_heads(foreign: Foreign) -> list[int]:
    """Numbers of heads that the shapes allow, the one that is revealed alone.

    Raises:
        CheckpointError: tensors that are missing or misshapen.
    """
    queries = [name for name in foreign.tensors if name.endswith(".layers.0.0.to_q.weight")]
    inner, *others = (foreign.shape(name, 2)[0] for name in sorted(queries))
    if _frequencies(0) in foreign.tensors:
        return [max(inner // _head_dim(foreign, ImportOptions(), inner), 1)]
    return heads_of_width(inner, *others)


def _name(stage: int, stages: int, part: str) -> str:
    """The canonical path of a part of a stage's transformer."""
    if stage == 0:
        return f"global.{part}"
    return f"local.{part}" if stage == stages - 1 else f"middle.{stage - 1}.{part}"


def _take_stage(weights: dict[str, mx.array], taken: Taken, stage: int, stages: int) -> None:
    """Embeddings, start vector, positions and projection of one stage."""
    source = f"token_embs.{stages - 1 - stage}"
    # Parts of the middle stages stand under them, those of the outer ones beside the network's other parts.
    inside = f"middle.{stage - 1}." if 0 < stage < stages - 1 else ""
    outer = {0: "global_", stages - 1: "local_"}.get(stage, "")
    if stage == stages - 1:
        weights["local_byte_embedding.weight"] = taken.take(f"{source}.weight")
    else:
        weights[f"{inside}byte_embedding.weight"] = taken.take(f"{source}.0.weight")
        to_next = f"{inside}to_next" if inside else "global_to_local"
        for kind in ("weight", "bias"):
            for number, part in ((2, "patch_norm"), (3, "patch_projection"), (4, "projected_norm")):
                weights[f"{inside}{part}.{kind}"] = taken.take(f"{source}.{number}.{kind}")
            weights[f"{to_next}.{kind}"] = taken.take(f"to_next_transformer_projections.{stage}.1.{kind}")
    weights[f"{inside}{outer}start"] = taken.take(f"start_tokens.{stage}")
    if taken.has(f"pos_embs.{stage}.weight"):
        weights[f"{inside}{outer}positions.weight"] = taken.take(f"pos_embs.{stage}.weight")


def _take_block(weights: dict[str, mx.array], taken: Taken, source: str, target: str, fused_shape: tuple[int, int]) -> None:
    weights[f"{target}.attention_norm.weight"] = taken.take(f"{source}.0.norm.g")
    weights[f"{target}.attention.q_proj.weight"] = taken.take(f"{source}.0.to_q.weight")
    keys, values = mx.split(taken.take(f"{source}.0.to_kv.weight", fused_shape), 2, axis=0)
    weights[f"{target}.attention.k_proj.weight"], weights[f"{target}.attention.v_proj.weight"] = keys, values
    weights[f"{target}.attention.o_proj.weight"] = taken.take(f"{source}.0.to_out.weight")
    weights[f"{target}.ffn_norm.weight"] = taken.take(f"{source}.1.0.g")
    for number, part in ((1, "up_proj"), (4, "down_proj")):
        for kind in ("weight", "bias"):
            weights[f"{target}.ffn.{part}.{kind}"] = taken.take(f"{source}.1.{number}.{kind}")


def _stage_fields(name: str, dim: int, layers: int, heads: int, head_dim: int, ffn_dim: int, positions: str) -> dict[str, Any]:
    fields = {"dim": dim, "layers": layers, "heads": heads, "head_dim": head_dim, "ffn_dim": ffn_dim}
    return {f"{name}_{field}": value for field, value in {**fields, "positions": positions}.items()}


def _frequencies(stage: int) -> str:
    return f"transformers.{stage}.rotary_emb.inv_freq"


def _check_frequencies(foreign: Foreign, stages: int, head_dim: int) -> None:
    """See that every stage rotates by the same frequencies, those that marlin computes anew."""
    expected = ROPE_BASE ** -(mx.arange(0, head_dim, 2) / head_dim)
    for stage in range(stages):
        (count,) = foreign.shape(_frequencies(stage), 1)
        # Stored in 8 bits of precision at least.
        if count != head_dim // 2 or not mx.allclose(foreign.tensors[_frequencies(stage)], expected, rtol=1e-2, atol=0).item():
            raise CheckpointError(
                f"{foreign.path}: {quoted(_frequencies(stage))} is not that of heads {head_dim} wide and base {ROPE_BASE:g}"
            )


def _head_dim(foreign: Foreign, options: ImportOptions, inner: int) -> int:
    if _frequencies(0) in foreign.tensors:
        return 2 * foreign.shape(_frequencies(0), 1)[0]
    if options.head_dim is not None:
        return options.head_dim
    if options.heads is None:
        return HEAD_DIM
    assert options.heads != "auto"  # `read_checkpoint` asks for a number
    if options.heads < 1 or inner % options.heads:
        raise CheckpointError(f"{foreign.path}: {quoted(options.heads)} heads do not divide an attention {inner} wide")
    return inner // options.heads
