"""The configuration of Block-Recurrent Transformers: two ways to compute them, one layout of ours."""

from dataclasses import dataclass
from typing import Literal

from marlin_cli.errors import ConfigError
from marlin_cli.models.limits import check_limits


@dataclass(frozen=True)
class BlockRecurrentConfig:
    """Shape and options; the defaults are those of the package's training script, its feed-forward filled up to 32.

    Raises:
        ConfigError: sizes that are not positive or do not fit together.
    """

    model_type: Literal["block_recurrent"] = "block_recurrent"
    vocab_size: int = 256
    d_model: int = 512
    ffn_dim: int = 1376
    heads: int = 8  # of queries; keys and values have one, with meliad's equations as many
    head_dim: int = 64
    layers: int = 6
    recurrent_layers: tuple[int, ...] = (3,)  # from 0
    block_bytes: int = 512
    state_vectors: int = 512  # of each recurrent layer
    all_layers_qk_norm: bool = False  # or the recurrent ones alone?
    equations: Literal["lucidrains", "meliad"] = "lucidrains"  # whose: the package's, or the authors'
    gate: Literal["bias", "lstm"] | None = None  # how states take what is new; meliad's equations alone
    state_update: Literal["dual", "single", "skip"] | None = None  # gates after attention and feed-forward, or one of them
    start_id: int = 0  # stands for what comes before the first byte
    max_bytes: int = 1 << 30  # longest text: memory does not grow with it

    def __post_init__(self) -> None:
        most = 1 << 20
        check_limits(
            self,
            {
                "vocab_size": (256, 1 << 16), "d_model": (1, most), "ffn_dim": (1, most), "heads": (1, 1 << 12),
                "head_dim": (2, 1 << 12), "layers": (1, 1 << 8), "block_bytes": (1, most), "state_vectors": (1, most),
                "start_id": (0, self.vocab_size - 1), "max_bytes": (1, 1 << 40),
            },
        )  # fmt: skip
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even, found {self.head_dim}")
        wanted = sorted(set(self.recurrent_layers))
        if list(self.recurrent_layers) != wanted or any(not 0 <= layer < self.layers for layer in wanted):
            raise ConfigError(f"recurrent_layers must rise from 0 to {self.layers - 1}, found {list(self.recurrent_layers)}")
        self._check_equations()

    def _check_equations(self) -> None:
        """Raises ConfigError for options that the equations do not have, or that they want."""
        if self.equations == "meliad":
            if self.gate is None or self.state_update is None:
                missing, known = ("gate", "bias or lstm") if self.gate is None else ("state_update", "dual, single or skip")
                raise ConfigError(f"equations 'meliad' want {missing}, which is left out; give {known}")
            if self.all_layers_qk_norm:
                raise ConfigError("all_layers_qk_norm has no meaning with equations 'meliad', which always do; leave it out")
        elif self.gate is not None or self.state_update is not None:
            name = "state_update" if self.gate is None else "gate"
            raise ConfigError(f"{name} has no meaning with equations 'lucidrains', which have one update; leave it out")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.equations == "meliad" else 1

    @property
    def blocks(self) -> list[str]:
        """The path of every layer."""
        return [f"layers.{layer}" for layer in range(self.layers)]

    def states_of(self, layer: int) -> int | None:
        """The number of a layer's states among all, None where it is not recurrent."""
        return self.recurrent_layers.index(layer) if layer in self.recurrent_layers else None
