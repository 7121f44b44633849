"""Byte Latent Transformers (facebookresearch/blt, arXiv 2412.09871), as transformers 5.24 computes them.

A small model, the patcher, tells how hard each next byte is to guess; where it is hard a patch ends. An encoder makes rows of
bytes, and of the bytes of a patch one vector; the global transformer runs over patches alone; a decoder goes on with the
encoder's rows, which read the last patch that has ended, and predicts the next byte. Nothing is read of an open patch.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from marlin_cli.models.blt_config import FIRST_BYTE, BltConfig, StackConfig
from marlin_cli.models.blt_hashes import hash_rows
from marlin_cli.models.layer_cache import LayerCache
from marlin_cli.models.unequal_patches import (
    Patches,
    at_rows,
    ends_of_patches,
    patches_of,
    pooled_attention,
    running_maximum,
)
from marlin_cli.ops import Linear, Table, activation, attention

Caches = Sequence[LayerCache] | None

# Layers


class Attention(nn.Module):
    def __init__(self, config: StackConfig, window: int | None) -> None:
        super().__init__()
        self.heads, self.head_dim, self.rope_theta = config.heads, config.head_dim, config.rope_theta
        self.scale = config.head_dim**-0.5
        self.window = None if window is None else window - 1  # bytes that a byte sees before itself
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self[name] = Linear(config.d_model, config.d_model, bias=False)

    def __call__(self, x: mx.array, cache: LayerCache | None) -> mx.array:
        queries, keys, values = (self._heads(self[name](x)) for name in ("q_proj", "k_proj", "v_proj"))
        offset = 0 if cache is None else cache.offset
        queries, keys = self._turned(queries, offset), self._turned(keys, offset)
        if cache is not None:
            found = cache.attend(queries, keys, values, self.scale, self.window)
        else:
            back = None if self.window is None or self.window + 1 >= x.shape[1] else self.window
            found = attention(queries, keys, values, self.scale, window=back)
        return self["o_proj"](found.swapaxes(1, 2).flatten(2))

    def _heads(self, x: mx.array) -> mx.array:
        return x.reshape(*x.shape[:2], self.heads, self.head_dim).swapaxes(1, 2)

    def _turned(self, x: mx.array, offset: int | mx.array) -> mx.array:
        return mx.fast.rope(x, self.head_dim, traditional=True, base=self.rope_theta, scale=1.0, offset=offset)


class FeedForward(nn.Module):
    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.d_model, config.ffn_dim, bias=False)
        self.up_proj = Linear(config.d_model, config.ffn_dim, bias=False)
        self.down_proj = Linear(config.ffn_dim, config.d_model, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(activation(self.gate_proj(x), "silu") * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: StackConfig, window: int | None = None) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = Attention(config, window)
        self.ffn_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.ffn = FeedForward(config)

    def __call__(self, x: mx.array, cache: LayerCache | None) -> mx.array:
        x = x + self.attention(self.attention_norm(x), cache)
        return x + self.ffn(self.ffn_norm(x))


class Reader(nn.Module):
    """Attention between patches and bytes, without positions; what it adds is added to twice the rows that ask."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.heads, self.head_dim, self.scale = config.heads, config.head_dim, config.head_dim**-0.5
        self.q_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.k_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self[name] = Linear(config.d_model, config.d_model, bias=False)

    def keys(self, rows: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values [.., heads, head_dim] of rows [.., d_model]."""
        normed = self.k_norm(rows)
        return self._heads(self["k_proj"](normed)), self._heads(self["v_proj"](normed))

    def of_patches(self, asking: mx.array, rows: mx.array, patches: Patches) -> mx.array:
        """Rows [n, count, rows of a patch, d_model] of patches that have read their bytes [n, rows, d_model]."""
        queries = self._heads(self["q_proj"](self.q_norm(asking)))
        found = pooled_attention(queries, *self.keys(rows), patches, self.scale)
        return 2 * asking + self["o_proj"](found.flatten(-2))

    def of_bytes(self, x: mx.array, read: tuple[mx.array, mx.array], seen: mx.array) -> mx.array:
        """Rows [n, rows, d_model] of bytes that have read a patch each.

        Args:
            read: keys and values [n, patches, rows of a patch, heads, head_dim].
            seen: [n, rows], the patch that each byte sees.
        """
        queries = self._heads(self["q_proj"](self.q_norm(x)))
        keys, values = (at_rows(each, seen) for each in read)
        scores = self.scale * (queries[:, :, None] * keys).sum(axis=-1).astype(mx.float32)
        weights = mx.softmax(scores, axis=2).astype(values.dtype)
        return 2 * x + self["o_proj"]((weights[..., None] * values).sum(axis=2).flatten(-2))

    def _heads(self, x: mx.array) -> mx.array:
        return x.reshape(*x.shape[:-1], self.heads, self.head_dim)


# Parts


class Patcher(nn.Module):
    """A byte model of its own: how hard the byte after each is to guess."""

    def __init__(self, config: BltConfig) -> None:
        super().__init__()
        own = config.patcher
        self.embedding = nn.Embedding(config.vocab_size, own.d_model)
        self.layers = [Block(own, config.patcher_window) for _ in range(own.layers)]
        self.norm = nn.RMSNorm(own.d_model, eps=own.norm_eps)
        self.output = Linear(own.d_model, config.vocab_size, bias=False)

    def __call__(self, ids: mx.array, caches: Caches = None) -> mx.array:
        """Entropies [n, rows] float32, in nats, of what follows each of ids [n, rows]."""
        return self.entropies(_through(self.layers, self.embedding(ids), caches))

    def entropies(self, rows: mx.array) -> mx.array:
        """The same, of rows that have passed the layers."""
        logits = self.output(self.norm(rows)).astype(mx.float32)
        logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return mx.stop_gradient(-(mx.exp(logits) * logits).sum(axis=-1))


class ByteEncoder(nn.Module):
    """Rows of bytes, and of patches."""

    def __init__(self, config: BltConfig) -> None:
        super().__init__()
        own = config.encoder
        self.patch_rows = config.patch_rows
        self.embedding = nn.Embedding(config.vocab_size, own.d_model)
        self.layers = [Block(own, config.local_window) for _ in range(own.layers)]
        self.patch_proj = Linear(own.d_model, config.patch_rows * own.d_model, bias=False)
        self.reader = Reader(own)

    def patches(self, rows: mx.array, patches: Patches) -> mx.array:
        """Vectors [n, count, patch_rows x d_model] of patches of bytes, whose rows are [n, rows, d_model]."""
        largest = at_rows(running_maximum(rows, patches), patches.last)
        asking = self.patch_proj(largest).reshape(*largest.shape[:2], self.patch_rows, -1)
        return self.reader.of_patches(asking, rows, patches).flatten(2)


class PatchStack(nn.Module):
    """The global transformer; it runs once a patch."""

    def __init__(self, config: BltConfig) -> None:
        super().__init__()
        own, width = config.patches, config.patch_rows * config.encoder.d_model
        if width != own.d_model:
            self.input_proj = Linear(width, own.d_model, bias=False)
        self.layers = [Block(own) for _ in range(own.layers)]

    def rows(self, vectors: mx.array) -> mx.array:
        """What the first layer reads of patches."""
        return self.input_proj(vectors) if "input_proj" in self else vectors

    def __call__(self, vectors: mx.array, caches: Caches = None) -> mx.array:
        return _through(self.layers, self.rows(vectors), caches)


class ByteDecoder(nn.Module):
    """Goes on with the encoder's rows of bytes; each reads the last patch that has ended."""

    def __init__(self, config: BltConfig) -> None:
        super().__init__()
        own = config.decoder
        self.patch_rows = config.patch_rows
        self.patch_proj = Linear(config.patches.d_model, config.patch_rows * own.d_model, bias=False)
        self.readers = [Reader(own) for _ in range(config.decoder_readers)]
        self.layers = [Block(own, config.local_window) for _ in range(own.layers)]
        self.norm = nn.RMSNorm(own.d_model, eps=own.norm_eps)

    def rows_of(self, patches: mx.array) -> mx.array:
        """Rows [n, count, patch_rows, d_model] that bytes read of patches [n, count, d_model of the global transformer]."""
        return self.patch_proj(patches).reshape(*patches.shape[:2], self.patch_rows, -1)

    def keys(self, patches: mx.array) -> list[tuple[mx.array, mx.array]]:
        """Keys and values [n, count, patch_rows, heads, head_dim] of patches, for each layer that reads them."""
        rows = self.rows_of(patches)
        return [reader.keys(rows) for reader in self.readers]

    def __call__(
        self, x: mx.array, read: Sequence[tuple[mx.array, mx.array]], seen: mx.array, caches: Caches = None
    ) -> mx.array:
        """Hidden rows [n, rows, d_model]; see `Reader.of_bytes`."""
        for index, layer in enumerate(self.layers):
            if index < len(self.readers):
                x = self.readers[index].of_bytes(x, read[index], seen)
            x = layer(x, None if caches is None else caches[index])
        return self.norm(x)


def _through(layers: Sequence[Block], x: mx.array, caches: Caches) -> mx.array:
    for index, layer in enumerate(layers):
        x = layer(x, None if caches is None else caches[index])
    return x


# Model


class Blt(nn.Module):
    """The network: ids in, logits of the ids after them out. What is remembered stands in `marlin_cli.engine`."""

    def __init__(self, config: BltConfig) -> None:
        super().__init__()
        self.config = config
        self.patcher = Patcher(config)
        self.hash_embedding = Table(config.hash_rows, config.encoder.d_model)
        self.byte_encoder = ByteEncoder(config)
        self.patches = PatchStack(config)
        self.byte_decoder = ByteDecoder(config)
        self.output = Linear(config.decoder.d_model, config.vocab_size, bias=False)

    def __call__(self, ids: mx.array) -> mx.array:
        """Logits [n, rows, vocab] float32 of what follows each of ids [n, rows] of texts from their beginning."""
        return self.head(self.decode(ids))

    def predictions(self, windows: mx.array, run: Callable[[mx.array], mx.array] | None = None) -> mx.array:
        """Logits [n, length, vocab] float32 of bytes [n, length]: row i is of byte i given those before it."""
        ids = windows.astype(mx.int32) + FIRST_BYTE
        return (run or self)(self.led(ids[:, : max(0, ids.shape[1] - 1)]))[:, : ids.shape[1]]

    def led(self, ids: mx.array) -> mx.array:
        """Ids [n, total] of texts with the mark before them."""
        return mx.pad(ids, [(0, 0), (1, 0)], constant_values=self.config.start_id)

    def ends(self, entropies: mx.array) -> npt.NDArray[np.bool_]:
        """Which bytes of texts from their beginning end a patch, by the patcher's entropies [n, rows]."""
        return ends_of_patches(
            np.array(entropies), self.config.threshold, self.config.max_patch_bytes,
            np.zeros(entropies.shape[0], np.int64), first=True,
        )  # fmt: skip

    def embedded(self, ids: mx.array, before: mx.array | None = None) -> mx.array:
        """What the encoder reads of ids [n, rows]; see `blt_hashes.hash_rows`."""
        config, x = self.config, self.byte_encoder.embedding(ids)
        rows = hash_rows(ids, before, config.hash_lengths, config.hash_functions, config.hash_buckets)
        for table in range(rows.shape[-1]):
            x = x + self.hash_embedding(rows[..., table]).astype(x.dtype)
        return x

    def decode(self, ids: mx.array) -> mx.array:
        """Hidden rows [n, rows, d_model] of ids [n, rows] of texts from their beginning."""
        patches = patches_of(self.ends(self.patcher(ids)))
        x = _through(self.byte_encoder.layers, self.embedded(ids), None)
        rows = self.patches(self.byte_encoder.patches(x, patches))
        return self.byte_decoder(x, self.byte_decoder.keys(rows), seen_of(patches))

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden rows as float32 logits [..., vocab] of the next id."""
        return self.output(hidden).astype(mx.float32)


def seen_of(patches: Patches) -> mx.array:
    """The patch that each byte [n, rows] of texts from their beginning sees: its own where it ends it, else the one before."""
    last = mx.arange(patches.own.shape[1])[None] == at_rows(patches.last, mx.minimum(patches.own, patches.count - 1))
    return mx.where(last & (patches.own < patches.count), patches.own, patches.own - 1)
