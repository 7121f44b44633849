"""marlin: calibrate, quantise and run byte-level language models (MegaByte, ByT5, CANINE) on MLX."""

from typing import TYPE_CHECKING, Any

from marlin_cli.version import __version__ as __version__

__all__ = [
    "AnsweringModel",
    "ByT5Config",
    "ByT5Model",
    "ContinuingModel",
    "EncodingModel",
    "ImportOptions",
    "MegaByteConfig",
    "MegaByteModel",
    "decode",
    "encode",
    "load",
]

if TYPE_CHECKING:
    from marlin_cli.api import ImportOptions, MegaByteModel, decode, encode, load
    from marlin_cli.models.byt5_config import ByT5Config
    from marlin_cli.models.megabyte_config import MegaByteConfig


def __getattr__(name: str) -> Any:
    """Import on first use: `marlin --help` must not wait for MLX."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from marlin_cli.backend import require_mlx

    require_mlx()
    if name == "MegaByteConfig":
        from marlin_cli.models.megabyte_config import MegaByteConfig

        return MegaByteConfig
    if name == "ByT5Config":
        from marlin_cli.models.byt5_config import ByT5Config

        return ByT5Config
    from marlin_cli import api

    return getattr(api, name)
