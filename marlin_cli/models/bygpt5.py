"""ByGPT5 (arXiv 2212.10474): the decoder of ByT5 alone, which continues bytes. Its parts stand in `models.byt5`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from marlin_cli.models.byt5 import DecoderAttention, FeedForward, RelativeBias, SelfCache
from marlin_cli.models.byt5_config import ByT5Config
from marlin_cli.models.byt5_ids import FIRST_BYTE
from marlin_cli.models.limits import check_limits
from marlin_cli.ops import Linear
from marlin_cli.ops.dispatch import linear

# Config


@dataclass(frozen=True)
class ByGPT5Config:
    """Shape and options of a ByGPT5; the defaults are those of nllg/bygpt5-small-en.

    Raises:
        ConfigError: sizes that are not positive or do not fit together.
    """

    model_type: Literal["bygpt5"] = "bygpt5"
    vocab_size: int = 384  # pad, end, unknown, 256 bytes, marks
    d_model: int = 1472  # width of the rows between layers
    ffn_dim: int = 3584
    heads: int = 6
    head_dim: int = 64
    layers: int = 4
    activation: Literal["gelu_tanh", "gelu", "relu", "silu"] = "gelu_tanh"
    gated_ffn: bool = True
    norm_eps: float = 1e-6
    relative_buckets: int = 32  # rows of the table of relative bias
    relative_distance: int = 128  # rows further apart than this share the last bucket
    tied_head: bool = False  # logits come from the embeddings
    scaled_head: bool = False  # by d_model ** -0.5
    start_id: int = 0  # stands for what comes before the first byte
    starts_all: bool = False  # does it lead every text, or only one of no bytes?
    end_id: int = 1  # what targets that are scored end with
    answer_end_ids: tuple[int, ...] | None = None  # each of them ends a text; end_id alone unless given
    pad_id: int = 0
    max_bytes: int = 32768  # longest text

    def __post_init__(self) -> None:
        check_limits(self, {"layers": (1, 1 << 8)})
        self.as_decoder()  # checks the rest

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end a text."""
        return self.as_decoder().answer_ends

    @property
    def blocks(self) -> list[str]:
        """The path of every transformer block."""
        return [f"decoder.layers.{layer}" for layer in range(self.layers)]

    def as_decoder(self) -> ByT5Config:
        """ByT5's configuration with this decoder."""
        own = {name: value for name, value in vars(self).items() if name not in ("model_type", "layers", "starts_all")}
        return ByT5Config(**own, encoder_layers=1, decoder_layers=self.layers)


# Block


class Block(nn.Module):
    """ByT5's layer of the decoder without its attention to an encoder."""

    def __init__(self, config: ByT5Config) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = DecoderAttention(config)
        self.ffn_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.ffn = FeedForward(config)

    def __call__(self, x: mx.array, bias: mx.array, cache: SelfCache | None) -> mx.array:
        x = x + self.attention(self.attention_norm(x), bias, cache)
        return x + self.ffn(self.ffn_norm(x))


class Decoder(nn.Module):
    def __init__(self, config: ByT5Config) -> None:
        super().__init__()
        self.layers = [Block(config) for _ in range(config.decoder_layers)]
        self.relative_bias = RelativeBias(config, bidirectional=False)
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)

    def __call__(self, x: mx.array, caches: Sequence[SelfCache] | None) -> mx.array:
        bias = self.relative_bias()
        for index, layer in enumerate(self.layers):
            x = layer(x, bias, None if caches is None else caches[index])
        return self.norm(x)


# Model


class ByGPT5(nn.Module):
    """The network: ids in, logits of the ids after them out. Decoding loops and caches stand in `marlin_cli.engine`."""

    def __init__(self, config: ByGPT5Config) -> None:
        super().__init__()
        self.config = config
        decoder = config.as_decoder()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.decoder = Decoder(decoder)
        if not config.tied_head:
            self.output = Linear(config.d_model, config.vocab_size, bias=False)

    def __call__(self, ids: mx.array, caches: Sequence[SelfCache] | None = None) -> mx.array:
        """Logits [n, rows, vocab] float32 of what follows each of ids [n, rows], which follow those in the caches."""
        return self.head(self.decode(ids, caches))

    def predictions(self, windows: mx.array, run: Callable[[mx.array], mx.array] | None = None) -> mx.array:
        """Logits [n, length, vocab] float32 of bytes [n, length]: row i is of byte i given those before it.

        Where no mark leads a text, the first row comes of `start_id` alone, and the others of the bytes alone.

        Args:
            run: what gives the logits of ids; the network itself if None.
        """
        run = run or self
        count, total = windows.shape
        ids = windows.astype(mx.int32) + FIRST_BYTE
        if self.config.starts_all or total < 2:
            return run(self.led(ids[:, : max(0, total - 1)]))[:, :total]
        first = run(self.led(ids[:1, :0]))
        return mx.concatenate([mx.repeat(first, count, axis=0), run(ids[:, :-1])], axis=1)

    def led(self, ids: mx.array) -> mx.array:
        """Ids [n, total] of texts with the mark before them where it leads every text, or where they have no ids."""
        if ids.shape[1] and not self.config.starts_all:
            return ids
        return mx.pad(ids, [(0, 0), (1, 0)], constant_values=self.config.start_id)

    def decode(self, ids: mx.array, caches: Sequence[SelfCache] | None = None) -> mx.array:
        """Hidden rows [n, rows, d_model] of ids [n, rows], which follow those in the caches, one a layer."""
        return self.decoder(self.embedding(ids), caches)

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden rows as float32 logits [..., vocab]."""
        if self.config.scaled_head:
            hidden = hidden * self.config.d_model**-0.5
        logits = linear(hidden, self.embedding.weight) if self.config.tied_head else self.output(hidden)
        return logits.astype(mx.float32)
