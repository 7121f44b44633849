"""Shape and options of a SpaceByte; no arrays."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from marlin_cli.errors import ConfigError
from marlin_cli.models.limits import check_limits
from marlin_cli.models.megabyte_config import StageConfig

_MOST = 1 << 20


@dataclass(frozen=True)
class SpaceByteConfig:
    """Shape and options. A text begins with an id that stands before it, which begins its first patch.

    Raises:
        ConfigError: sizes that are not positive or do not fit together.
    """

    model_type: Literal["spacebyte"] = "spacebyte"
    vocab_size: int = 256
    max_bytes: int = 6143  # longest text, beside the id before it
    max_patches: int = 1024  # patches of a text at most, after which it ends
    patch_rule: Literal["utf8", "periodic"] = "utf8"  # what begins a patch, see `spacebyte_patches`

    global_layers: int = 12
    global_dim: int = 1024
    global_heads: int = 16
    global_head_dim: int | None = None  # dim / heads unless given
    global_kv_heads: int | None = None  # heads unless given
    global_ffn_dim: int = 4096
    global_window: int | None = None  # patches that a patch sees before itself; None: all

    initial_layers: int = 6  # of bytes, before patches
    final_layers: int = 6  # of bytes, after them
    local_dim: int = 512
    local_heads: int = 8
    local_head_dim: int | None = None
    local_kv_heads: int | None = None
    local_ffn_dim: int = 2048
    local_window: int | None = 512  # bytes that a byte sees before itself; None: all

    positions: Literal["learned", "learned+rope"] = "learned+rope"  # of bytes and of patches
    ffn: Literal["gelu", "gelu_tanh", "relu", "silu"] = "relu"
    norm: Literal["layernorm", "variance"] = "layernorm"  # variance: x * weight / sqrt(var(x) + eps)
    norm_eps: float = 1e-5
    qk_norm: bool = True  # normalise the queries and keys of each head
    attention_scale: float | None = None  # head_dim ** -0.5 unless given
    rope_theta: float = 10000.0
    start_id: int = 255  # leads every text, and ends it

    def __post_init__(self) -> None:
        check_limits(
            self,
            {
                "vocab_size": (256, _MOST), "max_bytes": (1, 1 << 30), "max_patches": (1, 1 << 30),
                "initial_layers": (0, 1 << 8), "final_layers": (0, 1 << 8), "global_window": (1, 1 << 30),
                "local_window": (1, 1 << 30), "norm_eps": (1e-30, 1), "attention_scale": (1e-6, 1e3),
                "rope_theta": (1e-3, 1e12), "start_id": (0, self.vocab_size - 1),
            },
        )  # fmt: skip
        for name, stage in (("global", self.global_stage), ("local", self.local_stage)):
            if stage.head_dim is None and stage.dim % stage.heads:
                raise ConfigError(f"{name}_heads {stage.heads} do not divide {name}_dim {stage.dim}; give the head_dim")
            if stage.kv_heads is not None and stage.heads % stage.kv_heads:
                raise ConfigError(f"{name}_kv_heads {stage.kv_heads} do not divide {stage.heads} heads")
            if stage.rope and stage.width_of_head % 2:
                raise ConfigError(f"rope needs heads of an even width, found {stage.width_of_head}")
        if self.local_dim > self.global_dim:
            raise ConfigError(f"local_dim {self.local_dim} is more than global_dim {self.global_dim}, of which it is a part")
        if self.patch_rule == "periodic" and self.ids % self.max_patches:
            raise ConfigError(f"max_patches {self.max_patches} do not divide the {self.ids} ids of a text, as periodic ones do")

    @property
    def ids(self) -> int:
        """Ids of the longest text, that before it among them."""
        return self.max_bytes + 1

    @property
    def patch_bytes(self) -> int:
        """Bytes of a periodic patch; of others those that a patch should have on average, so that a text has room."""
        return max(1, self.ids // self.max_patches)

    @cached_property
    def global_stage(self) -> StageConfig:
        """The transformer of patches."""
        return StageConfig(
            self.max_patches, self.global_layers, self.global_dim, self.global_heads, self.global_ffn_dim, self.positions,
            self.global_head_dim, self.global_kv_heads,
        )  # fmt: skip

    @cached_property
    def local_stage(self) -> StageConfig:
        """The transformers of bytes, before patches and after them, taken together."""
        return StageConfig(
            self.ids, self.initial_layers + self.final_layers, self.local_dim, self.local_heads, self.local_ffn_dim,
            self.positions, self.local_head_dim, self.local_kv_heads,
        )  # fmt: skip

    # What layers of bytes and of patches have in common with those of every model of its authors; see `megabyte_layers`.

    @property
    def rope_interleaved(self) -> bool:
        """Neighbours are rotated."""
        return True

    @property
    def ffn_bias(self) -> bool:
        """There are no biases."""
        return False

    @property
    def blocks(self) -> list[str]:
        """The path of every transformer block, in the order in which a byte passes them."""
        stacks = (("initial", self.initial_layers), ("global", self.global_layers), ("final", self.final_layers))
        return [f"{name}.layers.{layer}" for name, layers in stacks for layer in range(layers)]
