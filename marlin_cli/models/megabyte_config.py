"""The shape and the options of a MegaByte, and which of them fit together. Runs nothing."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from marlin_cli.config import MOST_ENTRIES
from marlin_cli.errors import ConfigError
from marlin_cli.models.limits import Limits, check_limits

Layout = Literal["prefix", "paper", "megabyte_pytorch"]
Positions = Literal["learned", "rope", "learned+rope", "none"]


# A network is drafted before its weights are compared with it, so no number may be larger than any of a real model.
STAGE_LIMITS: Limits = {
    "length": (1, 1 << 30), "layers": (1, 1 << 8), "dim": (1, 1 << 17), "heads": (1, 1 << 12), "ffn_dim": (1, 1 << 19),
    "head_dim": (1, 1 << 17), "kv_heads": (1, 1 << 12),
}  # fmt: skip
LIMITS: Limits = {
    "patch_size": (1, 1 << 16), "max_bytes": (1, 1 << 30), "vocab_size": (1, 1 << 20), "byte_dim": (1, 1 << 17),
    "attention_window": (1, 1 << 30), "bos_byte": (0, 1 << 20),
    "norm_eps": (1e-30, 1.0), "attention_scale": (1e-6, 1e3), "rope_theta": (1e-3, 1e12),
    # Of the stages under their names here, so that an error names what config.json has.
    **{f"{part}_{name}": STAGE_LIMITS[name] for part in ("global", "local")
       for name in ("layers", "dim", "heads", "ffn_dim", "head_dim", "kv_heads")},
}  # fmt: skip
WIDEST_ROW = 1 << 24  # numbers in a patch's embeddings, or in what a stage gives the next


@dataclass(frozen=True)
class StageConfig:
    """One transformer of the hierarchy, coarse to fine."""

    length: int  # tokens in one sequence of this stage
    layers: int
    dim: int
    heads: int
    ffn_dim: int
    positions: Positions = "none"
    head_dim: int | None = None  # dim / heads unless given
    kv_heads: int | None = None  # heads unless given

    def __post_init__(self) -> None:
        check_limits(self, STAGE_LIMITS)

    @property
    def learned(self) -> bool:
        """Does the stage have a table of learned positions?"""
        return self.positions.startswith("learned")

    @property
    def rope(self) -> bool:
        """Does its attention rotate queries and keys?"""
        return self.positions.endswith("rope")

    @property
    def width_of_head(self) -> int:
        return self.head_dim or self.dim // self.heads


@dataclass(frozen=True)
class MegaByteConfig:
    """Shape and options of a MegaByte.

    Raises:
        ConfigError: sizes that are not positive or do not fit together.
    """

    model_type: Literal["megabyte"] = "megabyte"
    layout: Layout = "prefix"
    patch_size: int = 8  # bytes in a patch
    max_bytes: int = 8192  # longest context, in bytes
    vocab_size: int = 256  # bytes, and any special ids from 256 on
    byte_dim: int | None = None  # width of a byte's embedding inside a patch; global_dim / patch_size unless given

    global_layers: int = 12
    global_dim: int = 1024
    global_heads: int = 16
    global_ffn_dim: int | None = None  # from the kind of feed-forward unless given
    global_head_dim: int | None = None
    global_kv_heads: int | None = None
    global_positions: Positions = "rope"

    # Stages between global and local (megabyte_pytorch alone).
    middle: tuple[StageConfig, ...] = field(default=(), metadata={MOST_ENTRIES: 16})

    local_layers: int = 4
    local_dim: int = 512
    local_heads: int = 8
    local_ffn_dim: int | None = None
    local_head_dim: int | None = None
    local_kv_heads: int | None = None
    local_positions: Positions = "learned"

    ffn: Literal["swiglu", "gelu", "gelu_tanh", "relu", "silu"] = "swiglu"
    ffn_bias: bool = False
    norm: Literal["rmsnorm", "layernorm", "variance"] = "rmsnorm"  # variance: x * weight / sqrt(var(x) + eps)
    norm_eps: float = 1e-5
    qk_norm: bool = False  # normalise the queries and keys of each head
    attention_scale: float | None = None  # head_dim ** -0.5 unless given
    attention_window: int | None = None  # global attention sees at most this many patches back
    rope_theta: float = 10000.0
    rope_interleaved: bool = False  # rotate pairs (0, 1), (2, 3) .. instead of the two halves of a head
    token_shift: bool = False  # half of the channels come from the row before
    start_tokens: bool = True  # paper: learned pads lead; off, the byte `bos_byte` does
    bos_byte: int = 255

    def __post_init__(self) -> None:
        check_limits(self, LIMITS)
        if self.vocab_size < 256:
            raise ConfigError(f"vocab_size must hold every byte (256 or more), found {self.vocab_size}")
        if not 0 <= self.bos_byte < self.vocab_size:
            raise ConfigError(f"bos_byte must be an id below vocab_size, found {self.bos_byte}")
        if self.max_bytes % self.patch_size:
            raise ConfigError(f"max_bytes {self.max_bytes} is not a multiple of patch_size {self.patch_size}")
        if self.byte_dim is None and self.global_dim % self.patch_size:
            raise ConfigError(f"global_dim {self.global_dim} is not a multiple of patch_size {self.patch_size};"
                              " give byte_dim")  # fmt: skip
        if self.middle and self.layout != "megabyte_pytorch":
            raise ConfigError(f"layout {self.layout!r} has two stages; `middle` belongs to megabyte_pytorch")
        if self.layout == "paper" and self.byte_width * self.patch_size != self.global_dim:
            raise ConfigError("layout 'paper' has no patch projection: byte_dim x patch_size must be global_dim")
        if not self.start_tokens and self.layout != "paper":
            raise ConfigError(f"layout {self.layout!r} needs start_tokens")
        if self.patch_size % math.prod(stage.length for stage in self.middle):
            raise ConfigError("the lengths of the middle stages do not divide patch_size")
        widest = max(self.patch_size * max(self.byte_width, self.local_dim), *(s.length * s.dim for s in self.stages[1:]))
        if widest > WIDEST_ROW:
            raise ConfigError(f"patches and widths ask for rows of {widest:,} numbers, more than {WIDEST_ROW:,}")
        for stage in self.stages:
            if stage.head_dim is None and stage.dim % stage.heads:
                raise ConfigError(f"{stage.heads} heads do not divide a width of {stage.dim}; give the head_dim")
            if stage.kv_heads is not None and stage.heads % stage.kv_heads:
                raise ConfigError(f"{stage.kv_heads} kv_heads do not divide {stage.heads} heads")
            if stage.rope and stage.width_of_head % 2:
                raise ConfigError(f"rope needs an even head_dim, found {stage.width_of_head}")
            if self.token_shift and stage.dim % 2:
                raise ConfigError(f"token_shift needs an even width, found {stage.dim}")

    @property
    def byte_width(self) -> int:
        """Width of a byte's embedding inside a patch."""
        return self.byte_dim or self.global_dim // self.patch_size

    @cached_property  # decoding asks for it at every patch
    def stages(self) -> tuple[StageConfig, ...]:
        """All stages, coarse to fine."""
        local_length = self.patch_size // math.prod(stage.length for stage in self.middle)
        first = StageConfig(
            self.max_bytes // self.patch_size, self.global_layers, self.global_dim, self.global_heads,
            self.global_ffn_dim or default_ffn_dim(self.ffn, self.global_dim),
            self.global_positions, self.global_head_dim, self.global_kv_heads,
        )  # fmt: skip
        last = StageConfig(
            local_length, self.local_layers, self.local_dim, self.local_heads,
            self.local_ffn_dim or default_ffn_dim(self.ffn, self.local_dim),
            self.local_positions, self.local_head_dim, self.local_kv_heads,
        )  # fmt: skip
        return (first, *self.middle, last)

    @property
    def blocks(self) -> list[str]:
        """The path of every transformer block."""
        names = ["global", *(f"middle.{index}" for index in range(len(self.middle))), "local"]
        stages = zip(names, self.stages, strict=True)
        return [f"{name}.layers.{layer}" for name, stage in stages for layer in range(stage.layers)]

    def bytes_per_token(self, stage: int) -> int:
        """Bytes that one token of stage number `stage` stands for: the patch size for 0, one for the last."""
        return math.prod(later.length for later in self.stages[stage + 1 :])


def default_ffn_dim(ffn: str, dim: int) -> int:
    """4 x dim; for a gated feed-forward two thirds of that, rounded up to a multiple of 64."""
    return -(-8 * dim // 3 // 64) * 64 if ffn == "swiglu" else 4 * dim
