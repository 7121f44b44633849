"""What the states of a network look like, by its architecture and by what reads its prompts: kernels, or MLX's graph."""

from typing import Any

import mlx.core as mx

from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.fingerprints import arithmetic_of, fingerprint_of
from marlin_cli.engine.fused import fuse
from marlin_cli.engine.fused_bygpt5 import fuse_bygpt5
from marlin_cli.engine.state_files import FORMAT, TYPES, VERSION, StateKind, TensorType
from marlin_cli.engine.states import Units
from marlin_cli.models import continuing_of
from marlin_cli.models.architecture import Reading
from marlin_cli.models.megabyte_config import MegaByteConfig
from marlin_cli.ops.reference import PACKED_MODES
from marlin_cli.version import __version__


def units_of(config: Any) -> Units:
    """How a network of this configuration reads ids into rows."""
    if isinstance(config, MegaByteConfig):
        # megabyte_pytorch predicts from the patch that ends a prompt, so that patch is read by the finer stages.
        return Units(config.patch_size, 1 if config.layout == "megabyte_pytorch" else 0)
    return Units()


def is_cut_anywhere(config: Any) -> bool:
    """See `StreamState`."""
    return not getattr(config, "token_shift", False)


def kind_of(network: Any, cache_bits: CacheBits | None = None) -> StateKind:
    """The kind of the states of a network on this device; reads every weight once."""
    bits, config = cache_bits or CacheBits(), network.config
    by_patches = continuing_of(network).reading is Reading.PATCHES
    if by_patches:
        stage, following = config.stages[0], config.stages[1]
        layers, heads, head_dim = stage.layers, stage.kv_heads or stage.heads, stage.width_of_head
        by_kernels = (bits == CacheBits() or head_dim & (head_dim - 1) == 0) and fuse(network) is not None
        dtype, lead = network.byte_embedding.weight.dtype, 1
        place: tuple[int, ...] = (1, 1 if config.layout == "prefix" else following.length, following.dim)
    else:
        layers, heads, head_dim = config.layers, config.heads, config.head_dim
        by_kernels = fuse_bygpt5(network) is not None
        dtype, lead = network.embedding.weight.dtype, int(config.starts_all)
        place = (1, config.vocab_size)
    delayed = None
    if not is_cut_anywhere(config):
        delayed = (dtype, (layers, 2, 1, stage.dim // 2) if by_kernels else (layers, 2, 1, 1, stage.dim // 2))

    def tensors(rows: int) -> dict[str, TensorType]:
        found: dict[str, TensorType] = {}
        for layer in range(layers):
            for name, width in (("keys", bits.keys), ("values", bits.values)):
                shape = (1, heads, rows)
                if width == 16:
                    found[f"{layer}.{name}"] = (dtype, (*shape, head_dim))
                    continue
                words, word_bits = (mx.uint8, 8) if by_kernels else (mx.uint32, 32)
                found[f"{layer}.{name}"] = (words, (*shape, head_dim * width // word_bits))
                found[f"{layer}.{name}.scales"] = (mx.uint8, (*shape, head_dim // PACKED_MODES[width][1]))
        return found

    return StateKind(
        facts={
            "format": FORMAT,
            "version": VERSION,
            "marlin": __version__,
            "model": fingerprint_of(network),
            "architecture": config.model_type,
            "layout": getattr(config, "layout", "bytes"),
            "patch_size": str(units_of(config).size),
            "key_bits": str(bits.keys),
            "value_bits": str(bits.values),
            "arithmetic": arithmetic_of(by_kernels=by_kernels),
            "dtype": TYPES[dtype],
        },
        units=units_of(config),
        lead=lead,
        tensors=tensors,
        place=(dtype if by_patches else mx.float32, place),
        delayed=delayed,
    )
