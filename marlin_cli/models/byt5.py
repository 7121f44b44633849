"""ByT5 (arXiv 2105.13626): T5 1.1 over bytes, an encoder of the whole input and a decoder that reads it.

Checkpoints are those of transformers' T5: no scale in attention, RMSNorm without bias before each part, one relative
bias a stack and none between decoder and encoder. `downsample_factor` above 1 is another encoder, of no published
checkpoint: layers with a local window over bytes, pooling, layers over the pooled rows, and back to bytes.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from marlin_cli.models.byt5_config import ByT5Config
from marlin_cli.ops import Linear, activation, strided_pool
from marlin_cli.ops.dispatch import linear
from marlin_cli.ops.long_attention import cross_attention, relative_attention

# What the decoder remembers; `marlin_cli.engine` has more kinds.


class SelfCache(Protocol):
    """Keys and values of the rows that one decoder layer has seen."""

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array, bias: mx.array) -> mx.array:
        """Add rows of keys and values; the queries of these rows read all so far. All are [n, heads, rows, head_dim].

        Args:
            bias: [heads, 2 * most + 1], see `RelativeBias`.
        """


class Memory(Protocol):
    """Keys and values of the encoder's states, as one decoder layer reads them."""

    @property
    def streams(self) -> int:
        """Inputs that are held; rows of several answers to one input may read together."""

    def attend(self, queries: mx.array) -> mx.array:
        """Read with queries [streams, heads, rows, head_dim]: the same shape."""


class PlainMemory:
    """A `Memory` in the network's own type. `lengths` [streams] tells real rows from filler."""

    def __init__(self, keys: mx.array, values: mx.array, lengths: mx.array | None) -> None:
        self.keys, self.values, self.lengths = keys, values, lengths

    @property
    def streams(self) -> int:
        return self.keys.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.keys.nbytes + self.values.nbytes

    def keep(self, streams: mx.array) -> None:
        """Go on with these inputs, in this order."""
        self.keys, self.values = self.keys[streams], self.values[streams]
        self.lengths = None if self.lengths is None else self.lengths[streams]

    def attend(self, queries: mx.array) -> mx.array:
        return cross_attention(queries, self.keys, self.values, self.lengths)


# Attention


def buckets_by_distance(config: ByT5Config, bidirectional: bool) -> npt.NDArray[np.int32]:
    """The bucket of each distance (key - query) from -relative_distance to relative_distance: [2 x that + 1].

    Half of the buckets are for single distances, the others grow with the logarithm; both ways there are half of
    them for each direction, else none for keys after the query (T5, arXiv 1910.10683, section 2.1).
    """
    most = config.relative_distance
    distance = np.arange(-most, most + 1)
    buckets = config.relative_buckets
    side = np.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        side = np.where(distance > 0, buckets, 0)
        steps = np.abs(distance)
    else:
        steps = np.maximum(-distance, 0)
    exact = buckets // 2
    # In float32 and in this order, as the weights were trained: at powers of two a rounding decides.
    ratio = np.log(np.maximum(steps, 1).astype(np.float32) / np.float32(exact))
    grown = ratio / np.float32(math.log(most / exact)) * np.float32(buckets - exact)
    far = np.minimum(exact + grown.astype(np.int64), buckets - 1)
    return (side + np.where(steps < exact, steps, far)).astype(np.int32)


class RelativeBias(nn.Module):
    def __init__(self, config: ByT5Config, bidirectional: bool) -> None:
        super().__init__()
        self.weight = mx.zeros((config.relative_buckets, config.heads))
        self._buckets = buckets_by_distance(config, bidirectional)

    def __call__(self) -> mx.array:
        """The table by distance, [heads, 2 * relative_distance + 1], which says all: beyond it nothing changes."""
        return self.weight[mx.array(self._buckets)].T


class Attention(nn.Module):
    def __init__(self, config: ByT5Config) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        width = config.heads * config.head_dim
        self.q_proj = Linear(config.d_model, width, bias=False)
        self.k_proj = Linear(config.d_model, width, bias=False)
        self.v_proj = Linear(config.d_model, width, bias=False)
        self.o_proj = Linear(width, config.d_model, bias=False)

    def keys_values(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values of rows x [n, rows, d_model]: both [n, heads, rows, head_dim]."""
        return self._heads(self.k_proj(x)), self._heads(self.v_proj(x))

    def _heads(self, x: mx.array) -> mx.array:
        return x.reshape(*x.shape[:-1], self.heads, self.head_dim).swapaxes(-2, -3)

    def _joined(self, x: mx.array) -> mx.array:
        return self.o_proj(x.swapaxes(-2, -3).flatten(-2))


class EncoderAttention(Attention):
    def __call__(self, x: mx.array, bias: mx.array, lengths: mx.array | None, window: int | None) -> mx.array:
        keys, values = self.keys_values(x)
        queries = self._heads(self.q_proj(x))
        return self._joined(relative_attention(queries, keys, values, bias, window=window, lengths=lengths))

    def of_inputs(self, x: mx.array, bias: mx.array, ends: Sequence[int], window: int | None) -> mx.array:
        """Attention of inputs that stand one after the other in rows x [1, rows, d_model], each up to its own of `ends`."""
        keys, values = self.keys_values(x)
        queries = self._heads(self.q_proj(x))
        parts = [
            relative_attention(queries[own], keys[own], values[own], bias, window=window)
            for start, end in itertools.pairwise((0, *ends))
            for own in [(slice(None), slice(None), slice(start, end))]
        ]
        return self._joined(mx.concatenate(parts, axis=2))


class DecoderAttention(Attention):
    def __call__(self, x: mx.array, bias: mx.array, cache: SelfCache | None) -> mx.array:
        keys, values = self.keys_values(x)
        queries = self._heads(self.q_proj(x))
        if cache is None:
            return self._joined(relative_attention(queries, keys, values, bias, causal=True))
        return self._joined(cache.attend(queries, keys, values, bias))


class CrossAttention(Attention):
    def __call__(self, x: mx.array, memory: Memory) -> mx.array:
        # Rows of several answers to one input are rows of one sequence here: nothing tells them apart.
        together = x.reshape(memory.streams, -1, x.shape[-1])
        return self._joined(memory.attend(self._heads(self.q_proj(together)))).reshape(x.shape)


# Feed-forward


class FeedForward(nn.Module):
    def __init__(self, config: ByT5Config) -> None:
        super().__init__()
        self.activation = config.activation
        if config.gated_ffn:
            self.gate_proj = Linear(config.d_model, config.ffn_dim, bias=False)
        self.up_proj = Linear(config.d_model, config.ffn_dim, bias=False)
        self.down_proj = Linear(config.ffn_dim, config.d_model, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        if "gate_proj" in self:
            return self.down_proj(activation(self.gate_proj(x), self.activation) * self.up_proj(x))
        return self.down_proj(activation(self.up_proj(x), self.activation))


# Block


class EncoderBlock(nn.Module):
    def __init__(self, config: ByT5Config) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = EncoderAttention(config)
        self.ffn_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.ffn = FeedForward(config)

    def __call__(self, x: mx.array, bias: mx.array, lengths: mx.array | None, window: int | None = None) -> mx.array:
        x = x + self.attention(self.attention_norm(x), bias, lengths, window)
        return x + self.ffn(self.ffn_norm(x))

    def of_inputs(self, x: mx.array, bias: mx.array, ends: Sequence[int], window: int | None) -> mx.array:
        """See `EncoderAttention.of_inputs`: as if each input were alone."""
        x = x + self.attention.of_inputs(self.attention_norm(x), bias, ends, window)
        return x + self.ffn(self.ffn_norm(x))


class DecoderBlock(nn.Module):
    def __init__(self, config: ByT5Config) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = DecoderAttention(config)
        self.cross_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.cross = CrossAttention(config)
        self.ffn_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.ffn = FeedForward(config)

    def __call__(self, x: mx.array, bias: mx.array, memory: Memory, cache: SelfCache | None) -> mx.array:
        x = x + self.attention(self.attention_norm(x), bias, cache)
        x = x + self.cross(self.cross_norm(x), memory)
        return x + self.ffn(self.ffn_norm(x))


class Encoder(nn.Module):
    def __init__(self, config: ByT5Config) -> None:
        super().__init__()
        self.layers = [EncoderBlock(config) for _ in range(config.encoder_layers)]
        self.relative_bias = RelativeBias(config, bidirectional=True)
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)

    def __call__(self, x: mx.array, lengths: mx.array | None) -> mx.array:
        bias = self.relative_bias()
        for layer in self.layers:
            x = layer(x, bias, lengths)
        return self.norm(x)


class DownsamplingEncoder(nn.Module):
    """Local layers over bytes, pooling, layers over pooled rows; what these add is given back to every byte of a row."""

    def __init__(self, config: ByT5Config) -> None:
        super().__init__()
        self.factor, self.pooling, self.window = config.downsample_factor, config.pooling, config.local_window
        over_bytes = config.layers_over_bytes
        self.local_layers = [EncoderBlock(config) for _ in range(over_bytes)]
        self.local_bias = RelativeBias(config, bidirectional=True)
        self.layers = [EncoderBlock(config) for _ in range(config.encoder_layers - over_bytes)]
        self.relative_bias = RelativeBias(config, bidirectional=True)
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)

    def __call__(self, x: mx.array, lengths: mx.array | None) -> mx.array:
        bias = self.local_bias()
        for layer in self.local_layers:
            x = layer(x, bias, lengths, self.window)
        pooled = before = self.pooled(x, lengths)
        pooled_lengths = None if lengths is None else self.pooled_lengths(lengths)
        bias = self.relative_bias()
        for layer in self.layers:
            pooled = layer(pooled, bias, pooled_lengths)
        return self.norm(self.joined(x, before, pooled))

    def pooled_lengths(self, lengths: mx.array) -> mx.array:
        """How many pooled rows there are of so many real ones: [n]."""
        return -(-lengths // self.factor)

    def joined(self, x: mx.array, before: mx.array, pooled: mx.array) -> mx.array:
        """Rows x [n, rows, d_model], each with what the upper layers made of its pooled row `before` more than it was."""
        return x + mx.repeat(pooled - before, self.factor, axis=1)[:, : x.shape[1]]

    def pooled(self, x: mx.array, lengths: mx.array | None) -> mx.array:
        """Rows x [n, rows, d_model] pooled without their filler: [n, ceil(rows / factor), d_model]."""
        if lengths is None:
            return strided_pool(x, self.factor, self.pooling)
        rows = x.shape[1]
        real = (mx.arange(rows) < lengths[:, None])[..., None]
        starts = mx.arange(0, rows, self.factor)
        there = mx.minimum(rows - starts, self.factor)
        counts = mx.clip(lengths[:, None] - starts, 0, there)[..., None]
        if self.pooling == "max":
            pooled = strided_pool(mx.where(real, x, mx.finfo(x.dtype).min), self.factor, "max")
            return mx.where(counts > 0, pooled, 0)
        # The mean over a row's bytes and filler, without the filler in its denominator.
        share = there[:, None] / mx.maximum(counts, 1)
        return strided_pool(mx.where(real, x, 0), self.factor, "mean") * share.astype(x.dtype)


class Decoder(nn.Module):
    def __init__(self, config: ByT5Config) -> None:
        super().__init__()
        self.layers = [DecoderBlock(config) for _ in range(config.decoder_layers)]
        self.relative_bias = RelativeBias(config, bidirectional=False)
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)

    def __call__(self, x: mx.array, memory: Sequence[Memory], caches: Sequence[SelfCache] | None) -> mx.array:
        bias = self.relative_bias()
        for index, layer in enumerate(self.layers):
            x = layer(x, bias, memory[index], None if caches is None else caches[index])
        return self.norm(x)


# Model


class ByT5(nn.Module):
    """The network: ids in, encoder states or logits out. Decoding loops and caches stand in `marlin_cli.engine`."""

    def __init__(self, config: ByT5Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Encoder(config) if config.downsample_factor == 1 else DownsamplingEncoder(config)
        if config.decoder_layers:
            self.decoder = Decoder(config)
            if not config.tied_head:
                self.output = Linear(config.d_model, config.vocab_size, bias=False)
        elif config.labels:
            self.output = Linear(config.d_model, len(config.labels))

    def __call__(self, source: mx.array, target: mx.array, lengths: mx.array | None = None) -> mx.array:
        """Logits [n, rows, vocab] float32 of what follows each id of `target`, all of it given.

        Args:
            source: [n, total] ids of the inputs.
            target: [n, rows] ids that the decoder reads, `start_id` first.
            lengths: [n] real ids of each input; the rest, at its end, is filler. All of them if None.
        """
        memory = self.memory(self.encode(source, lengths), lengths)
        return self.head(self.decode(target, memory))

    def encode(self, source: mx.array, lengths: mx.array | None = None) -> mx.array:
        """The encoder's states [n, total, d_model] of ids [n, total]; those of filler mean nothing."""
        return self.encoder(self.rows(source, lengths), self.state_lengths(lengths))

    def rows(self, source: mx.array, lengths: mx.array | None) -> mx.array:
        """What the encoder reads of ids [n, total]: [n, states, d_model]."""
        return self.embedding(source)

    @property
    def ids_in_state(self) -> int:
        """Ids that make one state of the encoder."""
        return 1

    def state_lengths(self, lengths: mx.array | None) -> mx.array | None:
        """The real states of inputs with so many real ids: [n]."""
        return lengths

    def label_scores(self, states: mx.array) -> mx.array:
        """Scores [.., labels] float32 of an encoder's states [.., d_model], before a softmax."""
        return self.output(states).astype(mx.float32)

    def memory(self, states: mx.array, lengths: mx.array | None = None) -> list[PlainMemory]:
        """What each decoder layer reads of the encoder's states [n, states, d_model] of inputs with so many real ids."""
        lengths = self.state_lengths(lengths)
        return [PlainMemory(*layer.cross.keys_values(states), lengths) for layer in self.decoder.layers]

    def decode(self, target: mx.array, memory: Sequence[Memory], caches: Sequence[SelfCache] | None = None) -> mx.array:
        """Hidden rows [n, rows, d_model] of the decoder for ids [n, rows], which follow those in the caches.

        Args:
            memory: for each layer; it holds n inputs, or fewer with equally many answers each.
        """
        return self.decoder(self.embedding(target), memory, caches)

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden rows of the decoder as float32 logits [..., vocab]."""
        if self.config.scaled_head:
            hidden = hidden * self.config.d_model**-0.5
        logits = linear(hidden, self.embedding.weight) if self.config.tied_head else self.output(hidden)
        return logits.astype(mx.float32)
