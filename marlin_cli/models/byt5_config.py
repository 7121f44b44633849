"""The shape and the options of a ByT5, and which of them fit together. Runs nothing."""

from dataclasses import dataclass
from typing import Literal

from marlin_cli.errors import ConfigError
from marlin_cli.models.byt5_ids import FIRST_SPECIAL
from marlin_cli.models.limits import Limits, check_limits
from marlin_cli.text import quoted

# A network is drafted before its weights are compared with it, so no number may be larger than any of a real model.
LIMITS: Limits = {
    "vocab_size": (1, 1 << 12), "d_model": (1, 1 << 17), "ffn_dim": (1, 1 << 19), "heads": (1, 1 << 12),
    "head_dim": (1, 1 << 12), "encoder_layers": (1, 1 << 8), "decoder_layers": (0, 1 << 8),
    "relative_buckets": (1, 1 << 12), "relative_distance": (1, 1 << 16), "max_bytes": (1, 1 << 30),
    "downsample_factor": (1, 1 << 12), "local_window": (1, 1 << 20), "local_layers": (0, 1 << 8),
    "norm_eps": (1e-30, 1.0),
}  # fmt: skip


@dataclass(frozen=True)
class ByT5Config:
    """Shape and options of a ByT5; the defaults are those of google/byt5-small.

    Raises:
        ConfigError: sizes that are not positive or do not fit together.
    """

    model_type: Literal["byt5"] = "byt5"
    vocab_size: int = 384  # pad, end, unknown, 256 bytes, sentinels
    d_model: int = 1472  # width of the rows between layers
    ffn_dim: int = 3584
    heads: int = 6
    head_dim: int = 64
    encoder_layers: int = 12
    decoder_layers: int = 4  # 0: an encoder alone
    activation: Literal["gelu_tanh", "gelu", "relu", "silu"] = "gelu_tanh"
    gated_ffn: bool = True
    norm_eps: float = 1e-6
    relative_buckets: int = 32  # rows of the tables of relative bias
    relative_distance: int = 128  # rows further apart than this share the last bucket
    tied_head: bool = False  # logits come from the embeddings
    scaled_head: bool = False  # by d_model ** -0.5, as where T5 was trained with a tied head
    start_id: int = 0  # what the decoder reads first
    end_id: int = 1  # what inputs end with, as their tokenizer has it, and targets that are scored
    answer_end_ids: tuple[int, ...] | None = None  # each of them ends an answer; end_id alone unless given
    pad_id: int = 0
    max_bytes: int = 32768  # longest input
    labels: tuple[str, ...] = ()  # of the rows of a head that labels bytes; an encoder alone may have one

    downsample_factor: int = 1  # bytes in a row of the upper encoder layers; 1 for every published checkpoint
    pooling: Literal["mean", "max"] = "mean"
    local_layers: int | None = None  # of encoder_layers, those over bytes; a quarter, at least one, unless given
    local_window: int = 128  # bytes that they see before and after each byte

    def __post_init__(self) -> None:
        check_limits(self, LIMITS)
        if self.vocab_size < FIRST_SPECIAL:
            raise ConfigError(f"vocab_size must hold 3 ids and every byte ({FIRST_SPECIAL} or more), found {self.vocab_size}")
        ids = {name: (getattr(self, name),) for name in ("start_id", "end_id", "pad_id")}
        for name, values in {**ids, "answer_end_ids": self.answer_ends}.items():
            for value in values:
                if not 0 <= value < self.vocab_size:
                    raise ConfigError(f"{name} must be below vocab_size ({self.vocab_size}), found {quoted(value)}")
        if self.labels and self.decoder_layers:
            raise ConfigError(f"labels go with an encoder alone, found {len(self.labels)} with a decoder")
        if self.relative_buckets < 4 or self.relative_buckets % 4:
            raise ConfigError(f"relative_buckets must be a multiple of 4, found {self.relative_buckets}")
        if self.relative_distance <= self.relative_buckets // 2:
            raise ConfigError(
                f"relative_distance must be above half of relative_buckets ({self.relative_buckets}),"
                f" found {self.relative_distance}"
            )
        if self.local_layers is not None and not 0 < self.local_layers < self.encoder_layers:
            raise ConfigError(f"local_layers must be from 1 to encoder_layers - 1, found {self.local_layers}")
        if self.downsample_factor > 1 and self.encoder_layers < 2:
            raise ConfigError("downsample_factor needs two encoder layers: one over bytes, one over pooled rows")

    @property
    def answer_ends(self) -> tuple[int, ...]:
        """Ids of which any ends an answer."""
        return (self.end_id,) if self.answer_end_ids is None else self.answer_end_ids

    @property
    def blocks(self) -> list[str]:
        """The path of every transformer block."""
        local = 0 if self.downsample_factor == 1 else self.layers_over_bytes
        counts = {"encoder.local_layers": local, "encoder.layers": self.encoder_layers - local}
        counts["decoder.layers"] = self.decoder_layers
        return [f"{name}.{layer}" for name, count in counts.items() for layer in range(count)]

    @property
    def layers_over_bytes(self) -> int:
        """Encoder layers at full resolution."""
        if self.downsample_factor == 1:
            return self.encoder_layers
        return max(1, self.encoder_layers // 4) if self.local_layers is None else self.local_layers
