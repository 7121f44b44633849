"""Block-Recurrent Transformers (arXiv 2203.07852) as lucidrains/block-recurrent-transformer-pytorch 0.4.4 computes them.

Bytes come in blocks. Attention sees the open block as far as it goes and the whole block before it; recurrent layers also
read vectors of state, which each block leaves to the next. What is remembered has one size, however long a text is. Layers
by the authors' own equations stand in `block_recurrent_meliad`; the network is made of one kind or the other.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from marlin_cli.models.block_recurrent_config import BlockRecurrentConfig
from marlin_cli.models.block_recurrent_meliad import NORM_EPS as MELIAD_NORM_EPS
from marlin_cli.models.block_recurrent_meliad import MeliadBlock, MeliadStates
from marlin_cli.models.block_recurrent_memory import LayerMemory, OpenStates, WindowMemory
from marlin_cli.ops import Linear, activation, attention

# What all its layers share: no argument of its constructor changes them.
ROPE_BASE = 10000.0
XPOS_BASE = 512
NORM_EPS = 1e-5

# Attention


def unit(x: mx.array) -> mx.array:
    """Rows of length 1."""
    return x / mx.maximum(mx.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def split_heads(x: mx.array, heads: int) -> mx.array:
    """Rows [n, rows, heads x head_dim] as [n, heads, rows, head_dim]."""
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)


def joined(x: mx.array) -> mx.array:
    """[n, heads, rows, head_dim] as [n, rows, heads x head_dim]."""
    return x.swapaxes(1, 2).flatten(2)


def rotated(x: mx.array, position: int, block_bytes: int, sign: int) -> mx.array:
    """Rows [n, heads, rows, head_dim] that begin at a position, turned by it and grown (sign 1) or shrunk (-1) by it: xpos.

    Positions are counted from the block before the open one, so that they are bounded; only differences matter.
    """
    turned = mx.fast.rope(x, x.shape[-1], traditional=False, base=ROPE_BASE, scale=1.0, offset=position)
    factors = xpos_factors(x.shape[-1], block_bytes, sign)[position : position + x.shape[2]]
    return turned * mx.array(factors).astype(x.dtype)


@functools.cache
def xpos_factors(head_dim: int, block_bytes: int, sign: int) -> npt.NDArray[np.float32]:
    """What each channel is multiplied by at the positions of two blocks: [2 x block_bytes, head_dim]."""
    shares = (np.arange(0, head_dim, 2) + 0.4 * head_dim) / (1.4 * head_dim)
    powers = sign * (np.arange(2 * block_bytes) - block_bytes) / XPOS_BASE
    return np.tile(shares ** powers[:, None], 2).astype(np.float32)


class Attention(nn.Module):
    def __init__(self, config: BlockRecurrentConfig, recurrent: bool) -> None:
        super().__init__()
        self.heads, self.block_bytes = config.heads, config.block_bytes
        self.scale = config.head_dim**-0.5
        width = config.heads * config.head_dim
        self.q_proj = Linear(config.d_model, width, bias=False)
        self.k_proj = Linear(config.d_model, config.head_dim, bias=False)
        self.v_proj = Linear(config.d_model, config.head_dim, bias=False)
        if recurrent:
            self.state_q_proj = Linear(config.d_model, width, bias=False)
        self.o_proj = Linear(width * (2 if recurrent else 1), config.d_model, bias=False)
        if recurrent or config.all_layers_qk_norm:
            self.q_scale = mx.ones((config.head_dim,))
            self.k_scale = mx.ones((config.head_dim,))

    def __call__(self, x: mx.array, memory: LayerMemory, states: "States | None") -> mx.array:
        queries = split_heads(self.q_proj(x), self.heads)
        keys, values = self.k_proj(x)[:, None], self.v_proj(x)[:, None]
        readers = split_heads(self.state_q_proj(x), self.heads) if states is not None else None
        found, start = [], 0
        while start < x.shape[1]:  # a block, or what is there of it
            end = min(start + self.block_bytes - memory.rows, x.shape[1])
            part = slice(start, end)
            out = joined(self._within(queries[:, :, part], keys[:, :, part], values[:, :, part], memory))
            if states is not None:
                assert readers is not None
                out = mx.concatenate([out, joined(states.read(readers[:, :, part], memory))], axis=-1)
            found.append(out)
            start = end
            if memory.rows == self.block_bytes:
                if states is not None:
                    states.write(memory)
                memory.close_block(self.turned_keys(memory.raw_keys, 0))
        return self.o_proj(found[0] if len(found) == 1 else mx.concatenate(found, axis=1))

    def turned_keys(self, keys: mx.array, position: int) -> mx.array:
        """Keys as they are attended to, from a position on."""
        keys = unit(keys) * self.k_scale if "k_scale" in self else keys
        return rotated(keys, position, self.block_bytes, -1)

    def _within(self, queries: mx.array, keys: mx.array, values: mx.array, memory: LayerMemory) -> mx.array:
        """Attention of rows of the open block over it and the block before."""
        position = self.block_bytes + memory.rows
        queries = unit(queries) * self.q_scale if "q_scale" in self else queries
        everything = memory.append(keys, self.turned_keys(keys, position), values)
        return attention(rotated(queries, position, self.block_bytes, 1), *everything, self.scale)


class States(nn.Module):
    """The states of a recurrent layer: where they begin, how they are read, and how a block writes them."""

    def __init__(self, config: BlockRecurrentConfig) -> None:
        super().__init__()
        self.heads, self.scale = config.heads, config.head_dim**-0.5
        width, shape = config.heads * config.head_dim, (config.state_vectors, config.d_model)
        self.start = mx.random.normal(shape) * 0.1
        self.positions = mx.random.normal(shape)
        self.norm = nn.LayerNorm(config.d_model, eps=NORM_EPS, bias=False)
        self.q_proj = Linear(config.d_model, width, bias=False)  # of attention among states
        self.block_q_proj = Linear(config.d_model, width, bias=False)  # of their attention to a block's bytes
        self.k_proj = Linear(config.d_model, config.head_dim, bias=False)
        self.v_proj = Linear(config.d_model, config.head_dim, bias=False)
        self.out_proj = Linear(2 * width, config.d_model, bias=False)
        self.update_proj = Linear(config.d_model, config.d_model)
        self.decay = mx.zeros((config.d_model,))
        for reader in ("read", "own", "block"):
            self[f"{reader}_q_scale"] = mx.ones((config.head_dim,))
            self[f"{reader}_k_scale"] = mx.ones((config.head_dim,))

    def open(self, streams: int, before: mx.array | None) -> OpenStates:
        """The states [streams, vectors, d_model] that a block finds, and what it reads of them."""
        vectors = mx.broadcast_to(self.start, (streams, *self.start.shape)) if before is None else before
        normed = self.norm(vectors) + self.positions
        return OpenStates(vectors, normed, self.k_proj(normed)[:, None], self.v_proj(normed)[:, None])

    def read(self, queries: mx.array, memory: LayerMemory) -> mx.array:
        """What queries [n, heads, rows, head_dim] find in the states of the open block: the same shape."""
        if memory.states is None:
            memory.states = self.open(queries.shape[0], memory.vectors)
        return self._attend("read", queries, memory.states.keys, memory.states.values)

    def write(self, memory: LayerMemory) -> None:
        """Make the states of the next block of these and of all bytes of the open one."""
        states = memory.states
        assert states is not None
        own = self._attend("own", split_heads(self.q_proj(states.normed), self.heads), states.keys, states.values)
        queries = split_heads(self.block_q_proj(states.normed), self.heads)
        block = self._attend("block", queries, memory.raw_keys, memory.block_values)
        update = self.update_proj(self.out_proj(joined(mx.concatenate([own, block], axis=-1))))
        share = mx.sigmoid(self.decay)
        memory.vectors, memory.states = share * update + (1 - share) * states.vectors, None

    def _attend(self, reader: str, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        queries, keys = unit(queries) * self[f"{reader}_q_scale"], unit(keys) * self[f"{reader}_k_scale"]
        return attention(queries, keys, values, self.scale, causal=False)


# Feed-forward and block


class FeedForward(nn.Module):
    def __init__(self, config: BlockRecurrentConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.d_model, config.ffn_dim, bias=False)
        self.up_proj = Linear(config.d_model, config.ffn_dim, bias=False)
        self.down_proj = Linear(config.ffn_dim, config.d_model, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(activation(self.gate_proj(x), "gelu") * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: BlockRecurrentConfig, recurrent: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model, eps=NORM_EPS, bias=False)
        self.attention = Attention(config, recurrent)
        self.ffn_norm = nn.LayerNorm(config.d_model, eps=NORM_EPS, bias=False)
        self.ffn = FeedForward(config)

    def __call__(self, x: mx.array, memory: LayerMemory, states: States | None) -> mx.array:
        x = x + self.attention(self.attention_norm(x), memory, states)
        return x + self.ffn(self.ffn_norm(x))


# Model


class BlockRecurrent(nn.Module):
    """The network: ids in, logits of the ids after them out. Decoding loops stand in `marlin_cli.engine`."""

    def __init__(self, config: BlockRecurrentConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        by_meliad = config.equations == "meliad"
        block: type[Block | MeliadBlock] = MeliadBlock if by_meliad else Block
        states: type[States | MeliadStates] = MeliadStates if by_meliad else States
        self.layers: list[Any] = [block(config, layer in config.recurrent_layers) for layer in range(config.layers)]
        self.states = [states(config) for _ in config.recurrent_layers]
        width, eps = config.d_model, MELIAD_NORM_EPS if by_meliad else NORM_EPS
        self.norm = nn.RMSNorm(width, eps=eps) if by_meliad else nn.LayerNorm(width, eps=eps, bias=False)
        self.output = Linear(config.d_model, config.vocab_size, bias=False)

    def __call__(self, ids: mx.array) -> mx.array:
        """Logits [n, rows, vocab] float32 of what follows each of ids [n, rows] of texts from their beginning."""
        return self.head(self.decode(ids, self.new_memory()))

    def predictions(self, windows: mx.array, run: Callable[[mx.array], mx.array] | None = None) -> mx.array:
        """Logits [n, length, vocab] float32 of bytes [n, length]: row i is of byte i given those before it.

        The first row comes of `start_id` alone, and the others of the bytes alone.
        """
        run = run or self
        count, total = windows.shape
        ids = windows.astype(mx.int32)
        if total < 2:
            return run(self.led(ids[:, :0]))[:, :total]
        return mx.concatenate([mx.repeat(run(self.led(ids[:1, :0])), count, axis=0), run(ids[:, :-1])], axis=1)

    def led(self, ids: mx.array) -> mx.array:
        """Ids [n, total] of texts, with `start_id` before them where they have none."""
        return ids if ids.shape[1] else mx.full((ids.shape[0], 1), self.config.start_id, dtype=mx.int32)

    def new_memory(self) -> list[LayerMemory | WindowMemory]:
        """What the layers remember of texts of which nothing has been read."""
        return [self.layer_memory() for _ in self.layers]

    def layer_memory(self) -> LayerMemory | WindowMemory:
        """What one of them does."""
        return WindowMemory(self.config.block_bytes) if self.config.equations == "meliad" else LayerMemory()

    def decode(self, ids: mx.array, memory: Sequence[LayerMemory | WindowMemory]) -> mx.array:
        """Hidden rows [n, rows, d_model] of ids [n, rows], which follow those in the memory, one a layer."""
        x = self.embedding(ids)
        for index in range(len(self.layers)):
            x = self.run_layer(index, x, memory[index])
        return self.norm(x)

    def run_layer(self, index: int, x: mx.array, memory: LayerMemory | WindowMemory) -> mx.array:
        """Rows [n, rows, d_model] behind a layer."""
        number = self.config.states_of(index)
        layer: Callable[..., mx.array] = self.layers[index]
        return layer(x, memory, None if number is None else self.states[number])

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden rows as float32 logits [..., vocab]."""
        return self.output(hidden).astype(mx.float32)
