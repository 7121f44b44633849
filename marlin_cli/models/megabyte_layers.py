"""The layers of a MegaByte's stages: norms, attention, feed-forward, block, stack. They know no patch and no byte."""

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import mlx.core as mx
import mlx.nn as nn

from marlin_cli.models import layer_cache
from marlin_cli.models.megabyte_config import MegaByteConfig, StageConfig
from marlin_cli.ops import Linear, activation, attention, delay_one_row

# Caches, as the layers see them; `marlin_cli.engine` has them.


class LayerCache(layer_cache.LayerCache, Protocol):
    """The same, with the rows that a shift of tokens delays."""

    def delay(self, slot: int, rows: mx.array) -> mx.array:
        """`rows` [batch, n, channels] one row later, with what `slot` remembers first."""


@runtime_checkable
class TurningCache(Protocol):
    """What one layer remembers of the rows it has seen where it turns queries and keys itself."""

    def attend_turned(self, queries: mx.array, keys: mx.array, values: mx.array, by: "Attention") -> mx.array:
        """As `LayerCache.attend`, of queries and keys that no rotation has told where they stand."""


# Attention


class LayerOptions(Protocol):
    """What layers are told of a configuration."""

    @property
    def norm(self) -> str: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def qk_norm(self) -> bool: ...
    @property
    def attention_scale(self) -> float | None: ...
    @property
    def rope_theta(self) -> float: ...
    @property
    def rope_interleaved(self) -> bool: ...
    @property
    def ffn(self) -> Literal["swiglu", "gelu", "gelu_tanh", "relu", "silu"]: ...
    @property
    def ffn_bias(self) -> bool: ...


class VarianceNorm(nn.Module):
    """x * weight / sqrt(var(x) + eps): not centred, unlike LayerNorm (kjslag/spacebyte, transformer.py)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones((dim,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        wide = x.astype(mx.float32)
        scaled = wide * mx.rsqrt(wide.var(axis=-1, keepdims=True) + self.eps)
        return (scaled * self.weight).astype(x.dtype)


def make_norm(config: LayerOptions, dim: int) -> nn.Module:
    if config.norm == "layernorm":
        return nn.LayerNorm(dim, eps=config.norm_eps, bias=False)
    return (nn.RMSNorm if config.norm == "rmsnorm" else VarianceNorm)(dim, eps=config.norm_eps)


class Attention(nn.Module):
    def __init__(self, config: LayerOptions, stage: StageConfig, window: int | None) -> None:
        super().__init__()
        self.heads, self.head_dim = stage.heads, stage.width_of_head
        self.kv_heads = stage.kv_heads or stage.heads
        self.scale = self.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        self.window = window
        self.rope_theta = config.rope_theta if stage.rope else None
        self.rope_interleaved = config.rope_interleaved
        self.q_proj = Linear(stage.dim, self.heads * self.head_dim, bias=False)
        self.k_proj = Linear(stage.dim, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = Linear(stage.dim, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = Linear(self.heads * self.head_dim, stage.dim, bias=False)
        if config.qk_norm:
            self.q_norm = make_norm(config, self.head_dim)
            self.k_norm = make_norm(config, self.head_dim)

    def __call__(self, x: mx.array, cache: layer_cache.LayerCache | None) -> mx.array:
        batch, rows, _ = x.shape
        queries = self.q_proj(x).reshape(batch, rows, self.heads, self.head_dim)
        keys = self.k_proj(x).reshape(batch, rows, self.kv_heads, self.head_dim)
        values = self.v_proj(x).reshape(batch, rows, self.kv_heads, self.head_dim).swapaxes(1, 2)
        if "q_norm" in self:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys = queries.swapaxes(1, 2), keys.swapaxes(1, 2)
        if isinstance(cache, TurningCache):
            out = cache.attend_turned(queries, keys, values, self)
            return self.o_proj(out.swapaxes(1, 2).reshape(batch, rows, -1))
        if self.rope_theta is not None:
            offset = 0 if cache is None else cache.offset
            queries, keys = self._rotated(queries, offset), self._rotated(keys, offset)
        if cache is None:
            out = attention(queries, keys, values, self.scale, window=self.window)
        else:
            out = cache.attend(queries, keys, values, self.scale, self.window)
        return self.o_proj(out.swapaxes(1, 2).reshape(batch, rows, -1))

    def _rotated(self, x: mx.array, offset: int | mx.array) -> mx.array:
        return mx.fast.rope(
            x,
            self.head_dim,
            traditional=self.rope_interleaved,
            base=self.rope_theta,
            scale=1.0,
            offset=offset,
        )


# Feed-forward


class FeedForward(nn.Module):
    def __init__(self, config: LayerOptions, stage: StageConfig) -> None:
        super().__init__()
        self.kind = config.ffn
        if self.kind == "swiglu":
            self.gate_proj = Linear(stage.dim, stage.ffn_dim, bias=config.ffn_bias)
        self.up_proj = Linear(stage.dim, stage.ffn_dim, bias=config.ffn_bias)
        self.down_proj = Linear(stage.ffn_dim, stage.dim, bias=config.ffn_bias)

    def __call__(self, x: mx.array) -> mx.array:
        if self.kind == "swiglu":
            return self.down_proj(activation(self.gate_proj(x), "silu") * self.up_proj(x))
        return self.down_proj(activation(self.up_proj(x), self.kind))


# Block


class Block(nn.Module):
    def __init__(self, config: MegaByteConfig, stage: StageConfig, window: int | None) -> None:
        super().__init__()
        self.token_shift = config.token_shift
        self.attention_norm = make_norm(config, stage.dim)
        self.attention = Attention(config, stage, window)
        self.ffn_norm = make_norm(config, stage.dim)
        self.ffn = FeedForward(config, stage)

    def __call__(self, x: mx.array, cache: LayerCache | None = None) -> mx.array:
        x = x + self.attention(self.attention_norm(self._shifted(0, x, cache)), cache)
        return x + self.ffn(self.ffn_norm(self._shifted(1, x, cache)))

    def _shifted(self, slot: int, x: mx.array, cache: LayerCache | None) -> mx.array:
        """The upper half of the channels one row late (token shift, as RWKV has it)."""
        if not self.token_shift:
            return x
        kept, moved = mx.split(x, 2, axis=-1)
        delayed = delay_one_row(moved) if cache is None else cache.delay(slot, moved)
        return mx.concatenate([kept, delayed], axis=-1)


class Stack(nn.Module):
    def __init__(
        self,
        config: MegaByteConfig,
        stage: StageConfig,
        *,
        window: int | None = None,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        self.layers = [Block(config, stage, window) for _ in range(stage.layers)]
        if final_norm:
            self.norm = make_norm(config, stage.dim)

    def __call__(self, x: mx.array, caches: Sequence[LayerCache] | None = None) -> mx.array:
        for index, layer in enumerate(self.layers):
            x = layer(x, None if caches is None else caches[index])
        return self.norm(x) if "norm" in self else x
