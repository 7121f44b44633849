"""Shape and options of a Byte Latent Transformer; no arrays."""

from dataclasses import dataclass, field
from typing import Literal

from marlin_cli.config import MOST_ENTRIES
from marlin_cli.errors import ConfigError
from marlin_cli.models.limits import check_limits

# Id of the byte 0. Below stand marks: 0 the beginning of an example, 1 of a text, 2 its end, 3 of a byte-pair model.
FIRST_BYTE = 4
START, END = 1, 2

_MOST = 1 << 20


@dataclass(frozen=True)
class StackConfig:
    """One of its four transformers.

    Raises:
        ConfigError: sizes that are not positive or do not fit together.
    """

    d_model: int
    ffn_dim: int
    heads: int
    layers: int
    rope_theta: float = 5e5
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_limits(
            self,
            {
                "d_model": (1, _MOST), "ffn_dim": (1, _MOST), "heads": (1, 1 << 12), "layers": (1, 1 << 10),
                "rope_theta": (1, 1e12), "norm_eps": (1e-30, 1),
            },
        )  # fmt: skip
        if self.d_model % self.heads or self.head_dim % 2:
            raise ConfigError(f"d_model {self.d_model} is not made of {self.heads} heads of an even width")

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.d_model // self.heads


@dataclass(frozen=True)
class BltConfig:
    """Shape and options; the defaults are those of the model of one billion weights.

    Raises:
        ConfigError: sizes that are not positive or do not fit together.
    """

    model_type: Literal["blt"] = "blt"
    vocab_size: int = 260  # marks, then bytes
    patcher: StackConfig = field(default_factory=lambda: StackConfig(768, 2048, 12, 14, rope_theta=1e4))
    encoder: StackConfig = field(default_factory=lambda: StackConfig(1024, 2816, 16, 1))
    patches: StackConfig = field(default_factory=lambda: StackConfig(2048, 5632, 16, 25))  # the global transformer
    decoder: StackConfig = field(default_factory=lambda: StackConfig(1024, 2816, 16, 9))
    patch_rows: int = 2  # queries that a patch asks its bytes with, and keys that the bytes after it read of it
    threshold: float = 1.335442066192627  # entropy of the next byte, in nats, above which a patch ends
    max_patch_bytes: int | None = None  # after so many bytes a patch ends anyway
    patcher_window: int | None = 512  # bytes that a byte sees, itself among them; None: all
    local_window: int | None = 512  # the same in the encoder and the decoder
    cross_every_layer: bool = True  # does every layer of the decoder read patches, or the first alone?
    hash_lengths: tuple[int, ...] = field(default=(3, 4, 5, 6, 7, 8), metadata={MOST_ENTRIES: 64})  # bytes hashed together
    hash_functions: int = 1
    hash_buckets: int = 500002  # of each function and length
    start_id: int = START  # leads every text
    end_ids: tuple[int, ...] = (END,)  # each of them ends a text
    max_bytes: int = 8191  # longest text, beside the mark before it

    def __post_init__(self) -> None:
        check_limits(
            self,
            {
                "vocab_size": (FIRST_BYTE + 256, 1 << 16), "patch_rows": (1, 64), "threshold": (0, 1e6),
                "max_patch_bytes": (1, _MOST), "patcher_window": (2, _MOST), "local_window": (2, _MOST),
                "hash_functions": (1, 11), "hash_buckets": (1, 1 << 24), "max_bytes": (1, 1 << 30),
                "start_id": (0, self.vocab_size - 1),
            },
        )  # fmt: skip
        if self.encoder.d_model != self.decoder.d_model:
            raise ConfigError(
                f"the decoder goes on from the encoder's rows, but is {self.decoder.d_model} wide, not {self.encoder.d_model}"
            )
        if any(not 1 <= each <= 64 for each in self.hash_lengths):
            raise ConfigError(f"hash_lengths must be 1 to 64, found {list(self.hash_lengths)[:8]}")
        if self.hash_rows > 1 << 26:
            raise ConfigError(f"the hash tables would have {self.hash_rows:,} rows, more than marlin takes for real")
        if not self.end_ids or any(not 0 <= each < self.vocab_size for each in self.end_ids):
            raise ConfigError(f"end_ids must be ids below {self.vocab_size}, found {list(self.end_ids)[:4]}")

    @property
    def hash_rows(self) -> int:
        """Rows of all hash tables."""
        return self.hash_functions * len(self.hash_lengths) * self.hash_buckets

    @property
    def stacks(self) -> dict[str, StackConfig]:
        """Its transformers by their paths, in the order in which a byte passes them."""
        return {"patcher": self.patcher, "byte_encoder": self.encoder, "patches": self.patches, "byte_decoder": self.decoder}

    @property
    def decoder_readers(self) -> int:
        """Layers of the decoder that read patches."""
        return self.decoder.layers if self.cross_every_layer else 1

    @property
    def blocks(self) -> list[str]:
        """The path of every transformer block."""
        return [f"{path}.layers.{layer}" for path, stack in self.stacks.items() for layer in range(stack.layers)]
