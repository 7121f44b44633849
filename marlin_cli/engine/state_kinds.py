"""What the states of a network look like, by its architecture and by what reads its prompts: kernels, or MLX's graph."""

from typing import Any

import mlx.core as mx

from marlin_cli.engine.cache import CacheBits
from marlin_cli.engine.decoding import fused_stages
from marlin_cli.engine.fingerprints import arithmetic_of, fingerprint_of
from marlin_cli.engine.fused import rotates
from marlin_cli.engine.fused_bygpt5 import fuse_bygpt5
from marlin_cli.engine.state_files import FORMAT, TYPES, VERSION, StateKind, TensorType
from marlin_cli.engine.states import is_cut_anywhere, units_of
from marlin_cli.errors import UsageError
from marlin_cli.models import architecture_of, continuing_of
from marlin_cli.models.architecture import Reading
from marlin_cli.ops.reference import PACKED_MODES
from marlin_cli.text import with_article
from marlin_cli.version import __version__


def kind_of(network: Any, cache_bits: CacheBits | None = None) -> StateKind:
    """The kind of the states of a network on this device; reads every weight once.

    Raises:
        UsageError: what such a network remembers of a prompt is not kept.
    """
    if continuing_of(network).reading not in (Reading.PATCHES, Reading.BYTES):
        title = architecture_of(network).title
        raise UsageError(f"states of prompts are of a MegaByte or ByGPT5; {with_article(title)} reads its prompts anew")
    bits, config = cache_bits or CacheBits(), network.config
    by_patches = continuing_of(network).reading is Reading.PATCHES
    if by_patches:
        stage, following = config.stages[0], config.stages[1]
        layers, heads, head_dim = stage.layers, stage.kv_heads or stage.heads, stage.width_of_head
        fused = fused_stages(network, bits)
        by_kernels = fused is not None and fused.has(0)
        dtype, lead = network.byte_embedding.weight.dtype, 1
        place: tuple[int, ...] = (1, 1 if config.layout == "prefix" else following.length, following.dim)
    else:
        layers, heads, head_dim = config.layers, config.heads, config.head_dim
        by_kernels = rotates(head_dim, bits) and fuse_bygpt5(network) is not None
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
