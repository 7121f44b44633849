"""Checkpoints of lucidrains/block-recurrent-transformer-pytorch (0.4.4), alone or in its RecurrentTrainerWrapper."""

import re
from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from marlin_cli.checkpoints.foreign import Checkpoint, Foreign, ImportOptions, Taken
from marlin_cli.errors import CheckpointError
from marlin_cli.text import quoted

MARKER = "to_logits.1.weight"  # a name that every one has, wherever it stands in a file

# The field of a configuration that each option of an import speaks of.
FIELD_OF_OPTION = {
    "heads": "heads",
    "head_dim": "head_dim",
    "max_bytes": "max_bytes",
    "bos_byte": "start_id",
    "block_bytes": "block_bytes",
}

# Channels of a feed-forward that any format packs: its odd width is filled up with zeros, which add nothing.
WHOLE_CHANNELS = 32

STATE = "state_container"

# Three attentions of states, by the names that marlin has for them.
READERS = {"read": "to_state_cross_attn", "own": "state_self_attn", "block": "from_state_cross_attn"}


def recognises(tensors: Mapping[str, Any]) -> bool:
    """Do the names say a Block-Recurrent Transformer?"""
    return MARKER in tensors and "token_emb.weight" in tensors and "layers.0.0.to_kv.weight" in tensors


def read(foreign: Foreign, options: ImportOptions) -> Checkpoint:
    """Canonical configuration and weights.

    All sizes are read from shapes but the bytes of a block, which are `options.block_bytes`, or as many as there are
    vectors of state, as the constructor has it, which is then assumed; and the byte that stands before a text,
    `options.bos_byte` or 0, as there is no mark.

    Raises:
        CheckpointError: tensors that are missing, left over or of shapes that do not fit together; compressed memories;
            states that are read in another layer than they are written in; no recurrent layer.
    """
    tensors, path = foreign.tensors, foreign.path
    if any(name.startswith("mem_manager.") for name in tensors):
        raise CheckpointError(f"{path}: has compressed memories (use_compressed_mem), which marlin does not have")
    numbers = {int(match[1]) for name in tensors if (match := re.match(r"layers\.([0-9]{1,4})\.", name))}
    layers = len(numbers)
    if numbers != set(range(layers)):
        raise CheckpointError(f"{path}: the layer {min(set(range(layers)) - numbers)} is missing")
    vocab, width = foreign.shape("token_emb.weight", 2)
    inner = foreign.shape("layers.0.0.to_q.weight", 2)[0]
    head_dim = foreign.shape("layers.0.0.to_kv.weight", 2)[0] // 2
    if not head_dim or inner % head_dim:
        raise CheckpointError(f"{path}: heads {quoted(head_dim)} wide do not divide queries {inner} wide")
    recurrent = tuple(layer for layer in range(layers) if f"layers.{layer}.0.{STATE}.init_state" in tensors)
    if not recurrent:
        raise CheckpointError(f"{path}: no layer has states (state_container.init_state); there is nothing recurrent")
    vectors = foreign.shape(f"layers.{recurrent[0]}.0.{STATE}.init_state", 2)[0]
    for layer in range(layers):
        reads = foreign.shape(f"layers.{layer}.0.to_out.weight", 2)[1] // inner - 1
        if reads != (layer in recurrent):
            raise CheckpointError(
                f"{path}: layer {layer + 1} reads {reads} states and writes {int(layer in recurrent)}; marlin knows layers"
                " that read what they write (read_recurrent_layers left out)"
            )
    assumed: dict[str, Any] = dict(foreign.assumed)
    if options.block_bytes is None:
        assumed["block_bytes"] = vectors
    if options.bos_byte is None:
        assumed["bos_byte"] = 0
    ffn = foreign.shape("layers.0.1.3.weight", 2)[1]
    config: dict[str, Any] = {
        "model_type": "block_recurrent",
        "vocab_size": vocab,
        "d_model": width,
        "ffn_dim": ffn + -ffn % WHOLE_CHANNELS,
        "heads": inner // head_dim,
        "head_dim": head_dim,
        "layers": layers,
        "recurrent_layers": list(recurrent),
        "block_bytes": options.block_bytes or vectors,
        "state_vectors": vectors,
        "all_layers_qk_norm": all(f"layers.{layer}.0.attn.q_scale" in tensors for layer in range(layers)),
        "start_id": options.bos_byte or 0,
    }
    if options.max_bytes is not None:
        config["max_bytes"] = options.max_bytes
    taken = Taken(foreign)
    weights = {
        "embedding.weight": taken.take("token_emb.weight"),
        "output.weight": taken.take(MARKER, (vocab, width)),
    }
    _take_norm(weights, taken, "to_logits.0", "norm", width)
    for layer in range(layers):
        _take_layer(weights, taken, f"layers.{layer}", (inner, head_dim, width, ffn))
    for number, layer in enumerate(recurrent):
        source = f"layers.{layer}.0.{STATE}"
        weights[f"layers.{layer}.attention.state_q_proj.weight"] = taken.take(f"{source}.q_to_state.weight", (inner, width))
        _take_states(weights, taken, source, f"states.{number}", (vectors, inner, head_dim, width))
    taken.finish()
    return Checkpoint(path, "block_recurrent", config, weights, assumed=assumed)


def possible_heads(foreign: Foreign) -> list[int]:
    """The number of heads, which shapes tell.

    Raises:
        CheckpointError: tensors that are missing or misshapen.
    """
    inner = foreign.shape("layers.0.0.to_q.weight", 2)[0]
    return [max(inner // max(foreign.shape("layers.0.0.to_kv.weight", 2)[0] // 2, 1), 1)]


def _take_norm(weights: dict[str, mx.array], taken: Taken, source: str, target: str, width: int) -> None:
    """A norm, whose buffer of zeros stands in the file beside its gain."""
    weights[f"{target}.weight"] = taken.take(f"{source}.gamma", (width,))
    taken.drop_zeros(f"{source}.beta")


def _take_layer(weights: dict[str, mx.array], taken: Taken, layer: str, sizes: tuple[int, int, int, int]) -> None:
    inner, head_dim, width, ffn = sizes
    _take_norm(weights, taken, f"{layer}.0.norm", f"{layer}.attention_norm", width)
    weights[f"{layer}.attention.q_proj.weight"] = taken.take(f"{layer}.0.to_q.weight", (inner, width))
    keys, values = mx.split(taken.take(f"{layer}.0.to_kv.weight", (2 * head_dim, width)), 2, axis=0)
    weights[f"{layer}.attention.k_proj.weight"], weights[f"{layer}.attention.v_proj.weight"] = keys, values
    weights[f"{layer}.attention.o_proj.weight"] = taken.take(f"{layer}.0.to_out.weight")
    for name in ("q_scale", "k_scale"):
        if taken.has(f"{layer}.0.attn.{name}"):
            weights[f"{layer}.attention.{name}"] = taken.take(f"{layer}.0.attn.{name}", (head_dim,))
    _take_norm(weights, taken, f"{layer}.1.0", f"{layer}.ffn_norm", width)
    up, gate = mx.split(taken.take(f"{layer}.1.1.weight", (2 * ffn, width)), 2, axis=0)
    more = -ffn % WHOLE_CHANNELS
    weights[f"{layer}.ffn.up_proj.weight"] = mx.pad(up, [(0, more), (0, 0)])
    weights[f"{layer}.ffn.gate_proj.weight"] = mx.pad(gate, [(0, more), (0, 0)])
    weights[f"{layer}.ffn.down_proj.weight"] = mx.pad(taken.take(f"{layer}.1.3.weight", (width, ffn)), [(0, 0), (0, more)])


def _take_states(weights: dict[str, mx.array], taken: Taken, source: str, target: str, sizes: tuple[int, ...]) -> None:
    vectors, inner, head_dim, width = sizes
    weights[f"{target}.start"] = taken.take(f"{source}.init_state", (vectors, width))
    weights[f"{target}.positions"] = taken.take(f"{source}.state_pos_ids", (vectors, width))
    weights[f"{target}.decay"] = taken.take(f"{source}.learned_ema_beta", (width,))
    _take_norm(weights, taken, f"{source}.state_norm", f"{target}.norm", width)
    weights[f"{target}.q_proj.weight"] = taken.take(f"{source}.state_to_q.weight", (inner, width))
    weights[f"{target}.block_q_proj.weight"] = taken.take(f"{source}.q_from_state.weight", (inner, width))
    keys, values = mx.split(taken.take(f"{source}.state_to_kv.weight", (2 * head_dim, width)), 2, axis=0)
    weights[f"{target}.k_proj.weight"], weights[f"{target}.v_proj.weight"] = keys, values
    weights[f"{target}.out_proj.weight"] = taken.take(f"{source}.to_state_out.weight", (width, 2 * inner))
    weights[f"{target}.update_proj.weight"] = taken.take(f"{source}.state_out_to_gate.weight", (width, width))
    weights[f"{target}.update_proj.bias"] = taken.take(f"{source}.state_out_to_gate.bias", (width,))
    for ours, theirs in READERS.items():
        for name in ("q_scale", "k_scale"):
            weights[f"{target}.{ours}_{name}"] = taken.take(f"{source}.{theirs}.{name}", (head_dim,))
