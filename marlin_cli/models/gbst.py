"""GBST before ByT5 (Charformer, arXiv 2106.12672; KEByT5): rows that mix means of blocks of bytes, and fewer of them.

The order is that of charformer-pytorch 0.0.4 and of ETRI's gbswt5. With a mask the numbers are others than without
one, filler or not, as zeros fill a text up to whole blocks; transformers' tokenizers give one, so `masks` is on. There
the convolution reads embeddings of the filler behind a text, so that a text alone differs from the same in a batch:
here it reads zeros unless `reads_filler` is on, and a text is everywhere what it is alone.
"""

import math
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from marlin_cli.errors import ConfigError
from marlin_cli.models.byt5 import ByT5
from marlin_cli.models.byt5_config import ByT5Config
from marlin_cli.ops import Linear, strided_pool
from marlin_cli.ops.long_attention import cross_attention
from marlin_cli.text import quoted

# Config

MOST_BLOCKS = 64
MOST_BLOCK_BYTES = 1 << 8
MOST_PAD = 1 << 16  # the blocks' common multiple, to which texts are filled up


@dataclass(frozen=True)
class GbstConfig(ByT5Config):
    """A ByT5 and the front end before its encoder; the defaults of the latter are those of gbswt5.

    Raises:
        ConfigError: sizes that are not positive or do not fit together.
    """

    model_type: Literal["gbst"] = "gbst"  # type: ignore[assignment]
    block_sizes: tuple[int, ...] = (1, 2, 3, 4, 6, 9)  # bytes of the blocks among which each byte chooses
    block_offsets: tuple[int, ...] = ()  # bytes by which the blocks of each size are shifted; none if empty
    bytes_in_row: int = 1  # bytes that make one row of the encoder
    consensus: bool = True  # do bytes whose choices are alike agree on one?
    masks: bool = True  # is a text without filler masked too?
    reads_filler: bool = False  # does the last of a text see the filler behind it, as in the batches of training?

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.downsample_factor != 1:
            raise ConfigError("downsample_factor is of another encoder; bytes_in_row says how many bytes a row has here")
        if self.labels:
            raise ConfigError("labels are of bytes, of which a row here may be several; they go with a ByT5")
        if not 0 < len(self.block_sizes) <= MOST_BLOCKS or not all(0 < size <= MOST_BLOCK_BYTES for size in self.block_sizes):
            raise ConfigError(f"block_sizes must be 1 to {MOST_BLOCKS} numbers from 1 to {MOST_BLOCK_BYTES}")
        if len(self.block_offsets) not in (0, len(self.block_sizes)):
            raise ConfigError(f"block_offsets must be as many as block_sizes, found {len(self.block_offsets)}")
        if not all(0 <= offset < size for size, offset in self.block_kinds):
            raise ConfigError("each of block_offsets must be from 0 to one less than its block's size")
        if not 0 < self.bytes_in_row <= max(self.block_sizes):
            raise ConfigError(f"bytes_in_row must be from 1 to the largest block, found {quoted(self.bytes_in_row)}")
        if self.multiple > MOST_PAD:
            raise ConfigError(f"block_sizes have a common multiple of {quoted(self.multiple)}, more than {MOST_PAD:,} bytes")

    @property
    def block_kinds(self) -> tuple[tuple[int, int], ...]:
        """Size and offset of each kind of block."""
        return tuple(zip(self.block_sizes, self.block_offsets or (0,) * len(self.block_sizes), strict=True))

    @property
    def multiple(self) -> int:
        """Bytes to whose multiple texts are filled up."""
        return math.lcm(*self.block_sizes)


# Front end


class Front(nn.Module):
    """Embeddings of bytes to rows of the encoder, in float32: small differences of scores decide."""

    def __init__(self, config: GbstConfig) -> None:
        super().__init__()
        self.block_kinds, self.multiple = config.block_kinds, config.multiple
        self.factor, self.consensus = config.bytes_in_row, config.consensus
        self.reads_filler = config.reads_filler
        # A kernel for each channel alone, which no product of matrices is.
        self.kernel = mx.zeros((max(config.block_sizes), config.d_model))
        self.kernel_bias = mx.zeros((config.d_model,))
        self.proj = Linear(config.d_model, config.d_model)
        # No `ops.Linear`: packing it would save nothing.
        self.score = nn.Linear(config.d_model, 1)

    def __call__(self, x: mx.array, lengths: mx.array | None) -> mx.array:
        """Rows [n, ceil(total / factor), d_model] of embeddings [n, total, d_model].

        Args:
            lengths: [n] how many are real; rows of filler alone are zeros. Without them there is no mask.
        """
        dtype, total = x.dtype, x.shape[1]
        if lengths is not None and not self.reads_filler:
            x = mx.where((mx.arange(total) < lengths[:, None])[..., None], x, 0)
        x = self._convolved(x.astype(mx.float32))
        x = mx.pad(x, [(0, 0), (0, -total % self.multiple), (0, 0)])
        means = [self._means(x, size, offset, lengths) for size, offset in self.block_kinds]
        choices = mx.softmax(mx.concatenate([scores for _, scores in means], axis=-1), axis=-1)
        if self.consensus:
            alike = choices[:, None]
            choices = cross_attention(alike, alike, alike, lengths)[:, 0]
        mixed = mx.zeros_like(x)
        for index, (rows, _) in enumerate(means):
            mixed = mixed + rows * choices[..., index : index + 1]
        kept = -(-total // self.factor) * self.factor
        if kept > mixed.shape[1]:  # a factor that divides no common multiple of the blocks
            mixed = mx.pad(mixed, [(0, 0), (0, kept - mixed.shape[1]), (0, 0)])
        return masked_means(mixed[:, :kept], self.factor, lengths)[0].astype(dtype)

    def _convolved(self, x: mx.array) -> mx.array:
        """Each row with those after it, zeros behind the last: [n, total, d_model]."""
        total, width = x.shape[1], self.kernel.shape[0]
        ahead = mx.pad(x, [(0, 0), (0, width - 1), (0, 0)])
        y = self.kernel_bias + sum(ahead[:, shift : shift + total] * self.kernel[shift] for shift in range(width))
        return self.proj(y)

    def _means(self, x: mx.array, size: int, offset: int, lengths: mx.array | None) -> tuple[mx.array, mx.array]:
        """For each row the mean of its block [n, total, d_model], and that block's score [n, total, 1]."""
        before = size - offset if offset else 0
        total = x.shape[1]
        shifted = mx.pad(x, [(0, 0), (before, offset), (0, 0)])
        means, real = masked_means(shifted, size, lengths, before)
        scores = self.score(means)
        if real is not None:
            scores = mx.where(real, scores, mx.finfo(scores.dtype).min)
        rows, scores = (mx.repeat(each, size, axis=1)[:, before : before + total] for each in (means, scores))
        return rows, scores


def masked_means(x: mx.array, size: int, lengths: mx.array | None, before: int = 0) -> tuple[mx.array, mx.array | None]:
    """The mean of the real ones of each `size` rows [n, rows / size, width], and whether there are any [n, rows / size, 1].

    Args:
        x: [n, rows, width], rows a multiple of `size`.
        lengths: [n] real rows, which follow `before` rows of filler; without them all are, also the latter.
    """
    if lengths is None:
        return strided_pool(x, size, "mean"), None
    places = mx.arange(x.shape[1]) - before
    real = (places >= 0) & (places < lengths[:, None])
    counts = real.reshape(x.shape[0], -1, size).sum(axis=-1, keepdims=True)
    means = strided_pool(mx.where(real[..., None], x, 0), size, "mean") * (size / mx.maximum(counts, 1))
    return means, counts > 0


# Model


class Gbst(ByT5):
    """The network: a ByT5 whose encoder reads what the front end makes of the bytes."""

    config: GbstConfig

    def __init__(self, config: GbstConfig) -> None:
        super().__init__(config)
        self.front = Front(config)

    def rows(self, source: mx.array, lengths: mx.array | None) -> mx.array:
        """What the front end makes of ids [n, total]: [n, ceil(total / bytes_in_row), d_model]."""
        if lengths is None and self.config.masks:
            lengths = mx.full((source.shape[0],), source.shape[1])
        return self.front(self.embedding(source), lengths)

    @property
    def ids_in_state(self) -> int:
        """Ids that make one state of the encoder."""
        return self.config.bytes_in_row

    def state_lengths(self, lengths: mx.array | None) -> mx.array | None:
        """The real states of inputs with so many real ids: [n]."""
        return None if lengths is None else -(-lengths // self.config.bytes_in_row)
