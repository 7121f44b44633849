"""Who decodes whole patches on the device in use, chosen in one place; else decoding goes operation by operation."""

from marlin_cli.engine import cuda_patches
from marlin_cli.engine.compiled_patches import CompiledPatches, compiled_patches
from marlin_cli.engine.cuda_patches import PatchDecoder
from marlin_cli.models.megabyte import MegaByte
from marlin_cli.ops.dispatch import by_operations, gpu


def patch_decoder(network: MegaByte, streams: int) -> PatchDecoder | CompiledPatches | None:
    """The decoder of whole patches, or None where they are decoded operation by operation."""
    device = gpu()
    if device is None or by_operations():
        return None
    return compiled_patches(network, streams) if device == "metal" else cuda_patches.patch_decoder(network, streams)
