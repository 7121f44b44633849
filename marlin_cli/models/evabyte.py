"""EvaByte (OpenEvaByte/evabyte, Apache-2.0): Llama's layers over bytes, with EVA's attention (arXiv 2302.04542) by windows.

A byte sees its own aligned window exactly, and of every window before it a key and a value for each chunk. The head predicts
the next byte and several after it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import mlx.core as mx
import mlx.nn as nn

from marlin_cli.errors import ConfigError
from marlin_cli.models.evabyte_ids import END, FIRST_BYTE, START
from marlin_cli.models.limits import check_limits
from marlin_cli.ops import Linear, activation, attention

# Config


@dataclass(frozen=True)
class EvaByteConfig:
    """Shape and options; the defaults are those of EvaByte/EvaByte.

    Raises:
        ConfigError: sizes that are not positive or do not fit together.
    """

    model_type: Literal["evabyte"] = "evabyte"
    vocab_size: int = 320  # marks, then bytes
    d_model: int = 4096
    ffn_dim: int = 11008
    heads: int = 32
    layers: int = 32
    window_bytes: int = 2048  # seen exactly
    chunk_bytes: int = 16  # of earlier windows, that have a key and a value
    prediction_heads: int = 8  # the first of the next byte, each further of one byte further on
    norm_eps: float = 1e-5
    rope_theta: float = 1e5
    start_id: int = START  # leads every text
    end_ids: tuple[int, ...] = (END,)  # each of them ends a text
    max_bytes: int = 32767  # longest text, beside the mark before it

    def __post_init__(self) -> None:
        most = 1 << 20
        check_limits(
            self,
            {
                "vocab_size": (FIRST_BYTE + 256, 1 << 16), "d_model": (1, most), "ffn_dim": (1, most), "heads": (1, 1 << 12),
                "layers": (1, 1 << 10), "window_bytes": (1, most), "chunk_bytes": (1, most), "prediction_heads": (1, 64),
                "norm_eps": (1e-30, 1), "rope_theta": (1, 1e12), "max_bytes": (1, 1 << 30),
                "start_id": (0, self.vocab_size - 1),
            },
        )  # fmt: skip
        if self.d_model % self.heads or self.head_dim % 2:
            raise ConfigError(f"d_model {self.d_model} is not made of {self.heads} heads of an even width")
        if self.window_bytes % self.chunk_bytes:
            raise ConfigError(f"window_bytes {self.window_bytes} is not made of chunks of {self.chunk_bytes}")
        if not self.end_ids or any(not 0 <= each < self.vocab_size for each in self.end_ids):
            raise ConfigError(f"end_ids must be ids below {self.vocab_size}, found {list(self.end_ids)[:4]}")

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.d_model // self.heads

    @property
    def blocks(self) -> list[str]:
        """The path of every transformer block."""
        return [f"layers.{layer}" for layer in range(self.layers)]


# What layers remember; `marlin_cli.engine` has it.


class WindowMemory(Protocol):
    """What a layer remembers of the rows it has seen."""

    @property
    def offset(self) -> int | mx.array:
        """Rows seen so far; of several texts whose rows stand in one sequence, what comes before each of the rows: [rows]."""

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, by: "Attention") -> mx.array:
        """Add rows of keys and values, turned by their positions; the queries of these rows read what they see.

        All are [n, heads, rows, head_dim].
        """


# Attention


class Attention(nn.Module):
    def __init__(self, config: EvaByteConfig) -> None:
        super().__init__()
        self.heads, self.head_dim, self.scale = config.heads, config.head_dim, config.head_dim**-0.5
        self.window_bytes, self.chunk_bytes, self.rope_theta = config.window_bytes, config.chunk_bytes, config.rope_theta
        self.q_proj = Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = Linear(config.d_model, config.d_model, bias=False)
        self.v_proj = Linear(config.d_model, config.d_model, bias=False)
        self.o_proj = Linear(config.d_model, config.d_model, bias=False)
        # By which the keys and the values of a chunk are weighed.
        self.key_weigher = mx.random.normal((config.heads, config.head_dim)) * self.scale
        self.value_weigher = mx.random.normal((config.heads, config.head_dim)) * self.scale

    def __call__(self, x: mx.array, memory: WindowMemory | None) -> mx.array:
        queries, keys, values = (self._heads(each(x)) for each in (self.q_proj, self.k_proj, self.v_proj))
        offset = 0 if memory is None else memory.offset
        queries, keys = self._turned(queries, offset), self._turned(keys, offset)
        found = self.over_windows(queries, keys, values) if memory is None else memory.attend(queries, keys, values, self)
        return self.o_proj(found.swapaxes(1, 2).flatten(2))

    def over_windows(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """Attention of all rows of texts from their beginning: [n, heads, rows, head_dim]."""
        rows, width = keys.shape[2], self.window_bytes
        last = (rows - 1) // width * width  # where the last window begins
        short_keys, short_values = self.of_chunks(keys[:, :, :last], values[:, :, :last])
        found = []
        for start in range(0, rows, width):
            within, before = slice(start, start + width), slice(0, start // self.chunk_bytes)
            seen_keys, seen_values = (
                mx.concatenate([short[:, :, before], full[:, :, within]], axis=2)
                for short, full in ((short_keys, keys), (short_values, values))
            )
            found.append(attention(queries[:, :, within], seen_keys, seen_values, self.scale))
        return mx.concatenate(found, axis=2)

    def of_chunks(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """A key and a value [n, heads, chunks, head_dim] for each chunk of whole ones [n, heads, rows, head_dim]."""
        n, heads, rows, width = keys.shape
        shape = (n, heads, rows // self.chunk_bytes, self.chunk_bytes, width)
        keys, values = keys.reshape(shape).astype(mx.float32), values.reshape(shape).astype(mx.float32)
        by_key, by_value = (each[:, None, None].astype(mx.float32) for each in (self.key_weigher, self.value_weigher))
        key_weights = mx.softmax((by_key * keys).sum(axis=-1, keepdims=True), axis=-2)
        nearness = (by_value * keys).sum(axis=-1, keepdims=True) - 0.5 * mx.square(keys).sum(axis=-1, keepdims=True)
        value_weights = mx.softmax(self.scale * nearness, axis=-2)
        dtype = self.key_weigher.dtype
        return (key_weights * keys).sum(axis=-2).astype(dtype), (value_weights * values).sum(axis=-2).astype(dtype)

    def _heads(self, x: mx.array) -> mx.array:
        return x.reshape(*x.shape[:2], self.heads, self.head_dim).swapaxes(1, 2)

    def _turned(self, x: mx.array, offset: int | mx.array) -> mx.array:
        if isinstance(offset, mx.array):  # MLX takes an offset a sequence: each row is one of its own
            return self._rope(x.swapaxes(0, 2), offset).swapaxes(0, 2)
        return self._rope(x, offset)

    def _rope(self, x: mx.array, offset: int | mx.array) -> mx.array:
        return mx.fast.rope(x, self.head_dim, traditional=False, base=self.rope_theta, scale=1.0, offset=offset)


# Feed-forward and block


class FeedForward(nn.Module):
    def __init__(self, config: EvaByteConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.d_model, config.ffn_dim, bias=False)
        self.up_proj = Linear(config.d_model, config.ffn_dim, bias=False)
        self.down_proj = Linear(config.ffn_dim, config.d_model, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(activation(self.gate_proj(x), "silu") * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: EvaByteConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.ffn = FeedForward(config)

    def __call__(self, x: mx.array, memory: WindowMemory | None) -> mx.array:
        x = x + self.attention(self.attention_norm(x), memory)
        return x + self.ffn(self.ffn_norm(x))


# Model


class EvaByte(nn.Module):
    """The network: ids in, logits of the ids after them out. Decoding loops and memories stand in `marlin_cli.engine`."""

    def __init__(self, config: EvaByteConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = [Block(config) for _ in range(config.layers)]
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.output = Linear(config.d_model, config.vocab_size, bias=False)
        if config.prediction_heads > 1:
            self.drafts = Linear(config.d_model, (config.prediction_heads - 1) * config.vocab_size, bias=False)

    def __call__(self, ids: mx.array, memory: Sequence[WindowMemory] | None = None) -> mx.array:
        """Logits [n, rows, vocab] float32 of what follows each of ids [n, rows], which follow those in the memory."""
        return self.head(self.decode(ids, memory))

    def predictions(self, windows: mx.array, run: Callable[[mx.array], mx.array] | None = None) -> mx.array:
        """Logits [n, length, vocab] float32 of bytes [n, length]: row i is of byte i given those before it."""
        ids = windows.astype(mx.int32) + FIRST_BYTE
        return (run or self)(self.led(ids[:, : max(0, ids.shape[1] - 1)]))[:, : ids.shape[1]]

    def led(self, ids: mx.array) -> mx.array:
        """Ids [n, total] of texts with the mark before them."""
        return mx.pad(ids, [(0, 0), (1, 0)], constant_values=self.config.start_id)

    def decode(self, ids: mx.array, memory: Sequence[WindowMemory] | None = None) -> mx.array:
        """Hidden rows [n, rows, d_model] of ids [n, rows], which follow those in the memory, one a layer."""
        x = self.embedding(ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, None if memory is None else memory[index])
        return self.norm(x)

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden rows as float32 logits [..., vocab] of the next id."""
        return self.output(hidden).astype(mx.float32)

    def further(self, hidden: mx.array) -> mx.array:
        """Hidden rows as float32 logits [..., prediction_heads - 1, vocab]: entry j guesses the id j + 1 after the next one."""
        return self.drafts(hidden).astype(mx.float32).reshape(*hidden.shape[:-1], -1, self.config.vocab_size)
