"""Decoding of whole patches on an NVIDIA GPU: two launches a patch, ids and conditions stay on the device. Prefix layout alone.

`patch_decoder` chooses: what it does not take, and every part of a patch, goes operation by operation (`decoding`).
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from marlin_cli.engine.cache import KeyValueCache
from marlin_cli.engine.sampling import Noise, Sampling
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.models.megabyte_config import StageConfig
from marlin_cli.models.megabyte_layers import Block, Stack, VarianceNorm
from marlin_cli.ops import Linear, QuantizedLinear
from marlin_cli.ops.cuda_mailbox import MOST_IDS
from marlin_cli.ops.cuda_stages import LayerArrays, LinearArrays, StageArrays, StageOnDevice, dense_arrays, takes_stage
from marlin_cli.ops.dispatch import gpu

NORMS = {nn.RMSNorm: "rmsnorm", nn.LayerNorm: "layernorm", VarianceNorm: "variance"}


class Patch(NamedTuple):
    """A patch that has been queued: its ids, and the condition of the one that follows it, if there is room for one."""

    ids: mx.array  # [streams, patch_size] int32, on the device
    number: int  # of the launch; see `PatchDecoder.read`
    condition: mx.array | None  # [streams, 1, dim]
    noise: mx.array | None  # that it was drawn with


class PatchDecoder:
    """Queues patches of streams that stand at the beginning of one. Made by `patch_decoder`.

    Args:
        stages: the network's global and local stage.
        added: [1, patch_size, dim] what is added to the rows of a patch.
        streams: in the batch.
    """

    def __init__(self, stages: tuple[StageArrays, StageArrays], added: mx.array, streams: int) -> None:
        self._stages, self._added = stages, added
        self._filters: dict[Sampling, mx.array] = {}
        self._rows = self._room = self._uncounted = 0  # of the global cache: rows, room behind them, rows it does not know of
        self._make(streams, None, None)

    @property
    def sequence_cache_bytes(self) -> int:
        """Bytes of the local stage's cache."""
        return self._local.cache_bytes

    def keep(self, streams: int) -> None:
        """Go on with fewer streams, all that was queued being settled."""
        self._make(streams, self._global.known, self._local.known)

    def queue(
        self,
        condition: mx.array,
        caches: Sequence[KeyValueCache],
        padding: mx.array | None,
        sampling: Sampling,
        noise: Noise,
        more: bool,
    ) -> Patch:
        """Queue the patch that follows `condition` [streams, 1, dim], and the global step after it if there is to be `more`."""
        steps, streams = self._added.shape[1], condition.shape[0]
        drawn = filters = None
        if sampling.temperature:
            drawn, filters = noise.take(steps), self._filters_of(sampling)
        lead = condition.reshape(streams, -1)
        ids, number = self._local.decode_sequence(lead, self._added, None, drawn, filters, steps)
        if not more:
            mx.async_eval(ids)  # type: ignore[no-untyped-call]
            return Patch(ids, number, None, drawn)
        if self._room == 0:
            mx.eval(ids)
            self.settle(caches)
            storage = [cache.with_room() for cache in caches]
            self._global.set_caches(storage)
            self._rows, self._room = caches[0].rows, storage[0][0].shape[2] - caches[0].rows
        following = self._global.step(ids, self._rows, padding)[:, None]
        self._rows, self._room, self._uncounted = self._rows + 1, self._room - 1, self._uncounted + 1
        mx.async_eval(ids, following)  # type: ignore[no-untyped-call]
        return Patch(ids, number, following, drawn)

    def read(self, patch: Patch) -> np.ndarray:
        """The ids [streams, patch_size] of a patch, waited for, on the host, where an array of MLX would take long to make.

        Raises:
            BackendError: the GPU did not finish it.
        """
        assert self._local.mailbox is not None
        return self._local.mailbox.read(patch.number, *patch.ids.shape)

    def take_back(self, patch: Patch, noise: Noise) -> None:
        """Forget the patch that was queued last."""
        if patch.noise is not None:
            noise.give_back(patch.noise)
        if patch.condition is not None:
            self._rows, self._room, self._uncounted = self._rows - 1, self._room + 1, self._uncounted - 1

    def count(self, caches: Sequence[KeyValueCache]) -> None:
        """Tell the global cache of the rows that have been queued."""
        for cache in caches:
            cache.wrote(self._uncounted)
        self._uncounted = 0

    def settle(self, caches: Sequence[KeyValueCache]) -> None:
        """Wait for all that has been queued: before MLX reads or writes the caches, which it does not know to have changed."""
        self.count(caches)
        mx.synchronize()
        self._global.forget_caches()
        self._room = 0

    def _make(self, streams: int, global_known: list[int] | None, local_known: list[int] | None) -> None:
        self._global = StageOnDevice(self._stages[0], streams, global_known)
        self._local = StageOnDevice(self._stages[1], streams, local_known)
        self._local.own_caches(self._added.shape[1])
        self._room = 0  # asked for with the next patch

    def _filters_of(self, sampling: Sampling) -> mx.array:
        """The numbers of the filters on the device, made once: a new array waits for its page to come from the host."""
        if sampling not in self._filters:
            numbers = [sampling.temperature, sampling.top_p, sampling.min_p, float(sampling.top_k)]
            self._filters[sampling] = mx.array(numbers, dtype=mx.float32)
        return self._filters[sampling]


def patch_decoder(network: MegaByte, streams: int) -> PatchDecoder | None:
    """The decoder of whole patches, or None where they are decoded operation by operation.

    MARLIN_PATCHES=whole asks for it: the kernels take a quarter of a minute to compile in every process, and few answers win
    that back.
    """
    if os.environ.get("MARLIN_PATCHES") != "whole" or gpu() != "cuda" or streams * network.config.patch_size > MOST_IDS:
        return None
    stages = global_stage(network), local_stage(network)
    if stages[0] is None or stages[1] is None:
        return None
    if not all(takes_stage(stage, streams) for stage in stages if stage is not None):
        return None
    last = network.stages[-1]
    shape = (1, network.config.patch_size, last.config.dim)
    dtype = last.byte_embedding.weight.dtype
    added = mx.zeros(shape, dtype) if last.positions is None else last.positions.weight.reshape(shape)
    return PatchDecoder((stages[0], stages[1]), added, streams)


def global_stage(network: MegaByte) -> StageArrays | None:
    """The global stage from the bytes of a patch to the condition of the local one; None where it is of another kind."""
    config, stage = network.config, network.stages[0]
    if config.layout != "prefix" or stage.positions is not None:
        return None
    window = -1 if config.attention_window is None else config.attention_window
    first, last = linear_arrays(stage.patch_projection), linear_arrays(stage.to_next)
    if first is None or last is None:
        return None
    return _stage_arrays(network, stage.stack, stage.config, stage.byte_embedding, first, last, window)


def local_stage(network: MegaByte) -> StageArrays | None:
    """The last stage from the bytes of a patch to logits; None where it is of another kind."""
    stage, head = network.stages[-1], linear_arrays(network.output)
    if network.config.layout != "prefix" or head is None:
        return None
    return _stage_arrays(network, stage.stack, stage.config, stage.byte_embedding, None, head, -1)


def linear_arrays(layer: nn.Module | None) -> LinearArrays | None:
    """The arrays of a linear layer; None where it is of a kind that the kernels do not know."""
    if type(layer) is Linear:
        return dense_arrays(layer.weight, layer.get("bias"))
    if type(layer) is not QuantizedLinear or layer.activation_bits != 16:
        return None
    kind = f"int{layer.bits}" if layer.mode == "affine" else layer.mode
    if kind not in ("nvfp4", "mxfp4", "mxfp8", "int4", "int8"):
        return None
    factor = layer["global_scale"].item() if "global_scale" in layer else 1.0
    return LinearArrays(
        layer["weight"], kind, layer["scales"], layer.get("biases"), layer.get("bias"), factor, layer.group_size
    )


def _stage_arrays(
    network: MegaByte,
    stack: Stack,
    stage: StageConfig,
    embedding: nn.Module,
    first: LinearArrays | None,
    last: LinearArrays,
    window: int,
) -> StageArrays | None:
    config = network.config
    layers = [_layer_arrays(layer) for layer in stack.layers]
    if config.token_shift or type(embedding) is not nn.Embedding or type(stack.get("norm")) not in NORMS:
        return None
    if config.qk_norm and config.norm != "rmsnorm":
        return None
    dtype = embedding.weight.dtype
    if any(layer is None or layer.attention_norm.dtype != dtype for layer in layers):
        return None
    head_dim = stage.width_of_head
    return StageArrays(
        layers=tuple(layer for layer in layers if layer is not None),
        table=embedding.weight,
        norm=stack.norm.weight,
        first=first,
        last=last,
        heads=stage.heads,
        kv_heads=stage.kv_heads or stage.heads,
        head_dim=head_dim,
        scale=head_dim**-0.5 if config.attention_scale is None else config.attention_scale,
        window=window,
        theta=config.rope_theta if stage.rope else 0.0,
        interleaved=config.rope_interleaved,
        norm_kind=config.norm,
        activation=config.ffn,
        eps=config.norm_eps,
    )


def _layer_arrays(layer: Block) -> LayerArrays | None:
    attention, ffn = layer.attention, layer.ffn
    parts = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, ffn.up_proj, ffn.down_proj]
    known = [linear_arrays(part) for part in parts]
    gate = linear_arrays(ffn["gate_proj"]) if "gate_proj" in ffn else None
    if any(part is None for part in known) or ("gate_proj" in ffn and gate is None):
        return None
    query, key, value, out, up, down = (part for part in known if part is not None)
    query_norm, key_norm = (
        None if norm is None else norm.weight for norm in (attention.get("q_norm"), attention.get("k_norm"))
    )
    return LayerArrays(
        attention_norm=layer.attention_norm.weight, ffn_norm=layer.ffn_norm.weight, query_norm=query_norm, key_norm=key_norm,
        qkv=(query, key, value), out=out, up=(up,) if gate is None else (gate, up), down=down,
    )  # fmt: skip
