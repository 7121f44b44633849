"""Layers of Block-Recurrent Transformers by the equations of their authors' code, google-research/meliad.

Other than in lucidrains' package, a byte attends to the `block_bytes` bytes before it and not to itself, by relative
positions as T5 has them; every head has keys and values of its own; keys and queries have length 1 and each head a factor;
norms do not subtract the mean; feed-forwards have a ReLU and no gate; and states read the block before the open one too.
"""

import functools

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from marlin_cli.models.block_recurrent_config import BlockRecurrentConfig
from marlin_cli.models.block_recurrent_memory import OpenStates, WindowMemory
from marlin_cli.ops import Linear, attention

NORM_EPS = 1e-6
UNIT_EPS = 1e-6  # beside the sum of squares
BUCKETS = 32  # of distances back: half of them one distance each
MOST_DISTANCE = 128  # from here on all are one bucket


@functools.cache
def bucket_of_distance() -> npt.NDArray[np.int64]:
    """The bucket of each distance back, from 0 to `MOST_DISTANCE`: [MOST_DISTANCE + 1]."""
    near = BUCKETS // 2
    distance = np.arange(MOST_DISTANCE + 1)
    grown = np.log(np.maximum(distance, near) / near) / np.log(MOST_DISTANCE / near) * near
    return np.where(distance < near, distance, np.minimum(near + grown.astype(np.int64), BUCKETS - 1))


def unit_heads(x: mx.array, heads: int, factors: mx.array | None = None) -> mx.array:
    """Rows [n, rows, heads x head_dim] as [n, heads, rows, head_dim] of length 1, or of each head's factor, unsigned."""
    x = split_heads(x, heads)
    squares = mx.square(x.astype(mx.float32)).sum(axis=-1, keepdims=True)  # float16 ends at 65,504
    x = x * mx.rsqrt(squares + UNIT_EPS).astype(x.dtype)
    return x if factors is None else x * mx.abs(factors)[:, None, None]


def split_heads(x: mx.array, heads: int) -> mx.array:
    """Rows [n, rows, heads x head_dim] as [n, heads, rows, head_dim]."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def joined(x: mx.array) -> mx.array:
    """[n, heads, rows, head_dim] as [n, rows, heads x head_dim]."""
    return x.swapaxes(1, 2).flatten(2)


# Attention of bytes


class MeliadAttention(nn.Module):
    """Attention of bytes to those before them and, in a recurrent layer, to the states of their block."""

    def __init__(self, config: BlockRecurrentConfig, recurrent: bool) -> None:
        super().__init__()
        self.heads, self.block_bytes = config.heads, config.block_bytes
        width = config.heads * config.head_dim
        self.q_proj = Linear(config.d_model, width, bias=False)
        self.k_proj = Linear(config.d_model, width, bias=False)
        self.v_proj = Linear(config.d_model, width, bias=False)
        self.scale = mx.ones((config.heads,))
        self.relative_bias = mx.random.normal((config.heads, BUCKETS)) * BUCKETS**-0.5
        if recurrent:
            self.state_q_proj = Linear(config.d_model, width, bias=False)
            self.state_scale = mx.ones((config.heads,))
        self.o_proj = Linear(width * (2 if recurrent else 1), config.d_model, bias=False)

    def __call__(self, x: mx.array, memory: WindowMemory, states: "MeliadStates | None") -> mx.array:
        queries = unit_heads(self.q_proj(x), self.heads, self.scale)
        keys, values = unit_heads(self.k_proj(x), self.heads), split_heads(self.v_proj(x), self.heads)
        readers = unit_heads(self.state_q_proj(x), self.heads, self.state_scale) if states is not None else None
        found, start = [], 0
        while start < x.shape[1]:  # a block, or what is there of it
            end = min(start + self.block_bytes - memory.rows, x.shape[1])
            part = slice(start, end)
            memory.append(keys[:, :, part], values[:, :, part])
            out = joined(self._before(queries[:, :, part], memory))
            if states is not None:
                assert readers is not None
                out = mx.concatenate([out, joined(states.read(readers[:, :, part], memory))], axis=-1)
            found.append(out)
            start = end
            if memory.rows == self.block_bytes:
                if states is not None:
                    states.write(memory)
                memory.close_block()
        return self.o_proj(found[0] if len(found) == 1 else mx.concatenate(found, axis=1))

    def _before(self, queries: mx.array, memory: WindowMemory) -> mx.array:
        """Attention of the newest rows of the open block, each to as many rows before it as a block has."""
        # Without the newest key, every query stands where the last key it sees is: one that "sees itself and what is before".
        seen = slice(-self.block_bytes - queries.shape[2], -1)
        bias = self.relative_bias[:, mx.array(bucket_of_distance()[1:])] * mx.abs(self.scale)[:, None]
        # From the farthest to the nearest; what would follow a query is never seen.
        bias = mx.concatenate([bias[:, ::-1], mx.zeros((self.heads, MOST_DISTANCE - 1), bias.dtype)], axis=1)
        return attention(
            queries,
            memory.keys[:, :, seen],
            memory.values[:, :, seen],
            1.0,
            window=self.block_bytes - 1,
            relative_bias=bias,
        )


# States


class Gate(nn.Module):
    """What is kept of states and what is taken of their update: a share of each channel, or two that an input tells.

    Without a kernel the shares are one parameter a channel and add up to 1; as in an LSTM they are told by the rows that the
    update is made of, and lean towards what is there.
    """

    def __init__(self, config: BlockRecurrentConfig, width: int) -> None:
        super().__init__()
        if config.gate == "bias":
            self.bias = mx.random.normal((config.d_model,)) * 0.1
        else:
            self.forget_proj = Linear(width, config.d_model)
            self.input_proj = Linear(width, config.d_model)

    def __call__(self, hidden: mx.array, before: mx.array, update: mx.array) -> mx.array:
        if "bias" in self:
            kept = mx.sigmoid(self.bias)
            return before * kept + update * (1 - kept)
        return before * mx.sigmoid(self.forget_proj(hidden) + 1) + update * mx.sigmoid(self.input_proj(hidden) - 1)


class MeliadStates(nn.Module):
    """The states of a recurrent layer: where they begin, how they are read, and how a block writes them.

    A write is a layer of its own, whose residual connections are gates: behind attention and feed-forward ("dual"), behind
    the feed-forward alone, which then reads attention without a projection ("single"), or without a feed-forward ("skip").
    """

    def __init__(self, config: BlockRecurrentConfig) -> None:
        super().__init__()
        self.heads = config.heads
        width, shape = config.heads * config.head_dim, (config.state_vectors, config.d_model)
        self.start = mx.random.normal(shape) * 0.1
        self.positions = mx.random.normal(shape)
        self.norm = nn.RMSNorm(config.d_model, eps=NORM_EPS)
        self.q_proj = Linear(config.d_model, width, bias=False)  # of attention among states
        self.block_q_proj = Linear(config.d_model, width, bias=False)  # of their attention to bytes
        self.k_proj = Linear(config.d_model, width, bias=False)
        self.v_proj = Linear(config.d_model, width, bias=False)
        self.scale, self.block_scale = mx.ones((config.heads,)), mx.ones((config.heads,))
        if config.state_update != "single":
            self.out_proj = Linear(2 * width, config.d_model, bias=False)
            self.gate = Gate(config, 2 * width)
        if config.state_update == "dual":
            self.ffn_norm = nn.RMSNorm(config.d_model, eps=NORM_EPS)
        if config.state_update != "skip":
            self.ffn = MeliadFeedForward(config, 2 * width if config.state_update == "single" else config.d_model)
            self.ffn_gate = Gate(config, config.ffn_dim)

    def open(self, streams: int, before: mx.array | None) -> OpenStates:
        """The states [streams, vectors, d_model] that a block finds, and what it reads of them."""
        vectors = mx.broadcast_to(self.start, (streams, *self.start.shape)) if before is None else before
        normed = self.norm(vectors) + self.positions
        keys, values = unit_heads(self.k_proj(normed), self.heads), split_heads(self.v_proj(normed), self.heads)
        return OpenStates(vectors, normed, keys, values)

    def read(self, queries: mx.array, memory: WindowMemory) -> mx.array:
        """What queries [n, heads, rows, head_dim] find in the states of the open block: the same shape."""
        if memory.states is None:
            memory.states = self.open(queries.shape[0], memory.vectors)
        return attention(queries, memory.states.keys, memory.states.values, 1.0, causal=False)

    def write(self, memory: WindowMemory) -> None:
        """Make the states of the next block of these, and of all bytes of the open block and of the one before."""
        states = memory.states
        assert states is not None
        queries = unit_heads(self.q_proj(states.normed), self.heads, self.scale)
        own = attention(queries, states.keys, states.values, 1.0, causal=False)
        queries = unit_heads(self.block_q_proj(states.normed), self.heads, self.block_scale)
        block = attention(queries, memory.keys, memory.values, 1.0, causal=False)
        memory.vectors, memory.states = self._updated(states.vectors, joined(mx.concatenate([own, block], axis=1))), None

    def _updated(self, vectors: mx.array, read: mx.array) -> mx.array:
        if "out_proj" not in self:
            hidden = self.ffn.hidden(read)
            return self.ffn_gate(hidden, vectors, mx.tanh(self.ffn.down_proj(hidden)))
        vectors = self.gate(read, vectors, self.out_proj(read))
        if "ffn" not in self:
            return vectors
        hidden = self.ffn.hidden(self.ffn_norm(vectors))
        return self.ffn_gate(hidden, vectors, self.ffn.down_proj(hidden))


# Feed-forward and block


class MeliadFeedForward(nn.Module):
    def __init__(self, config: BlockRecurrentConfig, width: int) -> None:
        super().__init__()
        self.up_proj = Linear(width, config.ffn_dim, bias=False)
        self.down_proj = Linear(config.ffn_dim, config.d_model, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.hidden(x))

    def hidden(self, x: mx.array) -> mx.array:
        """What the last product reads: rows [n, rows, ffn_dim]."""
        return mx.maximum(self.up_proj(x), 0)


class MeliadBlock(nn.Module):
    def __init__(self, config: BlockRecurrentConfig, recurrent: bool) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=NORM_EPS)
        self.attention = MeliadAttention(config, recurrent)
        self.ffn_norm = nn.RMSNorm(config.d_model, eps=NORM_EPS)
        self.ffn = MeliadFeedForward(config, config.d_model)

    def __call__(self, x: mx.array, memory: WindowMemory, states: MeliadStates | None) -> mx.array:
        x = x + self.attention(self.attention_norm(x), memory, states)
        return x + self.ffn(self.ffn_norm(x))
